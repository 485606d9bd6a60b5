"""ResNets in Flax nnx, with flax's own layers: `resnet20` for small images, `resnet18` and `resnet50` for large ones.

`jaxbn.nnx.convert(model)` replaces the normalizations. Layers are named as in torchvision and timm, so that their
weights load by name. `dtype=jnp.bfloat16` computes in bfloat16; parameters, statistics and logits stay float32.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

he_uniform = nnx.initializers.variance_scaling(2.0, "fan_out", "uniform")


def conv(inputs: int, features: int, size: int, stride: int = 1, *, dtype: Any, rngs: nnx.Rngs) -> nnx.Conv:
    """Return a convolution that pads as PyTorch's does; "SAME" pads on one side only where the stride is 2."""
    pad = ((size // 2, size // 2),) * 2
    options = {"use_bias": False, "kernel_init": he_uniform, "dtype": dtype}
    return nnx.Conv(inputs, features, (size, size), stride, padding=pad, rngs=rngs, **options)


class Block(nnx.Module):
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1 of a bottleneck, beside a skip connection."""

    def __init__(
        self, inputs: int, width: int, stride: int, bottleneck: bool, *, momentum: float, dtype: Any, rngs: nnx.Rngs
    ):
        """Make the layers."""

        def layers(*arguments: int) -> tuple[nnx.Conv, nnx.BatchNorm]:
            norm = nnx.BatchNorm(arguments[1], momentum=momentum, dtype=dtype, rngs=rngs)
            return conv(*arguments, dtype=dtype, rngs=rngs), norm

        features = width * (4 if bottleneck else 1)
        if bottleneck:
            self.conv1, self.bn1 = layers(inputs, width, 1)
            self.conv2, self.bn2 = layers(width, width, 3, stride)
            self.conv3, self.bn3 = layers(width, features, 1)
        else:
            self.conv1, self.bn1 = layers(inputs, width, 3, stride)
            self.conv2, self.bn2 = layers(width, features, 3)
        self.bottleneck, self.downsamples = bottleneck, stride != 1 or inputs != features
        if self.downsamples:
            self.downsample_conv, self.downsample_bn = layers(inputs, features, 1, stride)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[batch, height, width, channels]` to `[batch, height / stride, width / stride, features]`."""
        y = self.bn2(self.conv2(nnx.relu(self.bn1(self.conv1(x)))))
        if self.bottleneck:
            y = self.bn3(self.conv3(nnx.relu(y)))
        return nnx.relu(y + (self.downsample_bn(self.downsample_conv(x)) if self.downsamples else x))


class ResNet(nnx.Module):
    """A residual network.

    Args:
        stages: the number of blocks in each stage; each stage after the first halves the image and doubles the width.
        width: the channels of the first stage.
        bottleneck: whether blocks are bottlenecks, with four times the width at their ends.
        channels: of the images.
        classes: the number of classes.
        small_images: a 3x3 first convolution and no pooling, for images of about 32x32.
        dtype: of the computation; None for that of the images and the parameters.
        momentum: of the running statistics, the fraction that is kept.
        rngs: for the initializers.
    """

    def __init__(
        self,
        stages: Sequence[int],
        width: int = 64,
        *,
        bottleneck: bool = False,
        channels: int = 3,
        classes: int = 1000,
        small_images: bool = False,
        dtype: Any = None,
        momentum: float = 0.9,
        rngs: nnx.Rngs,
    ):
        """Make the layers."""
        size, stride = (3, 1) if small_images else (7, 2)
        self.conv1 = conv(channels, width, size, stride, dtype=dtype, rngs=rngs)
        self.bn1 = nnx.BatchNorm(width, momentum=momentum, dtype=dtype, rngs=rngs)
        self.small_images, self.dtype, self.num_stages = small_images, dtype, len(stages)
        inputs = width
        for i, blocks in enumerate(stages):
            stage, own = [], width * 2**i
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                stage.append(Block(inputs, own, stride, bottleneck, momentum=momentum, dtype=dtype, rngs=rngs))
                inputs = own * (4 if bottleneck else 1)
            setattr(self, f"layer{i + 1}", nnx.List(stage))
        self.fc = nnx.Linear(inputs, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the logits `[batch, classes]`, float32, of images `[batch, height, width, channels]`."""
        x = nnx.relu(self.bn1(self.conv1(x if self.dtype is None else x.astype(self.dtype))))
        if not self.small_images:
            x = nnx.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for i in range(self.num_stages):
            for block in getattr(self, f"layer{i + 1}"):
                x = block(x)
        return self.fc(jnp.mean(x.astype(jnp.float32), (1, 2)))


# He et al. 2016, section 4.2: 20 layers for CIFAR-10. The skip connections that change shape are 1x1 convolutions.
resnet20 = partial(ResNet, stages=(3, 3, 3), width=16, classes=10, small_images=True)
resnet18 = partial(ResNet, stages=(2, 2, 2, 2))
resnet50 = partial(ResNet, stages=(3, 4, 6, 3), bottleneck=True)
