"""ResNets in Flax linen: `resnet20` for small images, `resnet18` and `resnet50` for large ones.

Layers are named as in torchvision and timm, so that their weights load by name. The ReLUs and the skip connections are
inside the normalizations, where they cost no memory for the backward pass. `dtype=jnp.bfloat16` computes in bfloat16;
parameters, statistics and logits stay float32.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxbn.linen

he_uniform = nn.initializers.variance_scaling(2.0, "fan_out", "uniform")


class Block(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1 of a bottleneck, beside a skip connection."""

    width: int
    stride: int
    bottleneck: bool
    conv: Callable[..., nn.Module]
    norm: Callable[..., Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[batch, height, width, channels]` to `[batch, height / stride, width / stride, features]`."""
        features, stride, relu = self.width * (4 if self.bottleneck else 1), self.stride, nn.relu
        if self.bottleneck:
            y = self.norm(name="bn1", activation=relu)(self.conv(self.width, 1, name="conv1")(x))
            y = self.norm(name="bn2", activation=relu)(self.conv(self.width, 3, stride, name="conv2")(y))
            y = self.conv(features, 1, name="conv3")(y)
        else:
            y = self.norm(name="bn1", activation=relu)(self.conv(self.width, 3, stride, name="conv1")(x))
            y = self.conv(features, 3, name="conv2")(y)
        if x.shape != y.shape:
            x = self.norm(name="downsample_bn")(self.conv(features, 1, stride, name="downsample_conv")(x))
        return self.norm(name="bn3" if self.bottleneck else "bn2", activation=relu)(y, residual=x)


class ResNet(nn.Module):
    """A residual network.

    Attributes:
        stages: the number of blocks in each stage; each stage after the first halves the image and doubles the width.
        width: the channels of the first stage.
        bottleneck: whether blocks are bottlenecks, with four times the width at their ends.
        classes: the number of classes.
        small_images: a 3x3 first convolution and no pooling, for images of about 32x32.
        dtype: of the computation; None for that of the images and the parameters.
        momentum: of the running statistics, the fraction that is kept.
        frozen: normalize by the running statistics in training, too, and leave them as they are.
        folded: without normalizations and with a bias in each convolution, for the variables that
            `jaxbn.linen.fold(..., drop=True)` gives.
    """

    stages: Sequence[int]
    width: int = 64
    bottleneck: bool = False
    classes: int = 1000
    small_images: bool = False
    dtype: Any = None
    momentum: float = 0.9
    frozen: bool = False
    folded: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return the logits `[batch, classes]`, float32, of images `[batch, height, width, channels]`."""
        x = x if self.dtype is None else x.astype(self.dtype)

        def conv(features: int, size: int, stride: int = 1, name: str | None = None) -> nn.Conv:
            pad = ((size // 2, size // 2),) * 2  # as in PyTorch: "SAME" pads on one side only where the stride is 2
            options = {"use_bias": self.folded, "kernel_init": he_uniform, "dtype": self.dtype}
            return nn.Conv(features, (size, size), stride, pad, name=name, **options)

        norm = partial(jaxbn.linen.BatchNorm, not train, momentum=self.momentum, dtype=self.dtype, frozen=self.frozen)
        norm = activate if self.folded else norm
        if self.small_images:
            x = norm(name="bn1", activation=nn.relu)(conv(self.width, 3, name="conv1")(x))
        else:
            x = norm(name="bn1", activation=nn.relu)(conv(self.width, 7, 2, name="conv1")(x))
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for i, blocks in enumerate(self.stages):
            for j in range(blocks):
                stride, name = 2 if i > 0 and j == 0 else 1, f"layer{i + 1}_{j}"
                x = Block(self.width * 2**i, stride, self.bottleneck, conv, norm, name=name)(x)
        return nn.Dense(self.classes, name="fc")(jnp.mean(x.astype(jnp.float32), (1, 2)))


# He et al. 2016, section 4.2: 20 layers for CIFAR-10. The skip connections that change shape are 1x1 convolutions.
resnet20 = partial(ResNet, stages=(3, 3, 3), width=16, classes=10, small_images=True)
resnet18 = partial(ResNet, stages=(2, 2, 2, 2))
resnet50 = partial(ResNet, stages=(3, 4, 6, 3), bottleneck=True)


def activate(name: str, activation: Callable[[jax.Array], jax.Array] = lambda y: y) -> Callable[..., jax.Array]:
    """Return the rest of a normalization that was folded away: the skip connection and the activation."""
    del name
    return lambda y, residual=None: activation(y if residual is None else y + residual)
