"""A small PyTorch ResNet, trained there, gives the same logits in linen and in nnx."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn.convert import from_torch_network

CLASSES = 5
# (input width, width, stride, groups) of the blocks; the last is depthwise, the others have a projection.
BLOCKS = [(4, 8, 2, 1), (8, 16, 2, 2), (16, 16, 1, 16)]
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(0.5, 2.0, size=(12, 8, 8, 3)).astype(np.float32)
LABELS = RNG.integers(CLASSES, size=12)


def torch_resnet(torch):
    """Blocks of two convolutions and a skip connection; everything has the name that torchvision would give it."""

    class Block(torch.nn.Module):
        def __init__(self, inputs, width, stride, groups):
            super().__init__()
            self.conv1 = torch.nn.Conv2d(
                inputs, width, 3, stride, 1, groups=groups if groups <= inputs else 1, bias=False
            )
            self.bn1 = torch.nn.BatchNorm2d(width)
            self.conv2 = torch.nn.Conv2d(width, width, 3, 1, 1, groups=groups)
            self.bn2 = torch.nn.BatchNorm2d(width)
            if stride > 1:
                conv = torch.nn.Conv2d(inputs, width, 1, stride, bias=False)
                self.downsample = torch.nn.Sequential(conv, torch.nn.BatchNorm2d(width))

        def forward(self, x):
            y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            return torch.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))

    class ResNet(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = torch.nn.Conv2d(3, 4, 3, 1, 1, bias=False)
            self.bn1 = torch.nn.BatchNorm2d(4)
            self.layers = torch.nn.ModuleList(Block(*block) for block in BLOCKS)
            self.fc = torch.nn.Linear(BLOCKS[-1][1], CLASSES)

        def forward(self, x):
            x = torch.relu(self.bn1(self.conv1(x)))
            for layer in self.layers:
                x = layer(x)
            return self.fc(x.mean((2, 3)))

    return ResNet()


class LinenBlock(nn.Module):
    """The block in linen."""

    width: int
    stride: int
    groups: int
    norm: Any

    @nn.compact
    def __call__(self, x):
        """`x` after the block."""

        def conv(size, stride, groups, bias, name):
            pad = size // 2
            return nn.Conv(
                self.width,
                (size, size),
                (stride, stride),
                ((pad, pad), (pad, pad)),
                feature_group_count=groups,
                use_bias=bias,
                name=name,
            )

        y = conv(3, self.stride, self.groups if self.groups <= x.shape[-1] else 1, False, "conv1")(x)
        y = nn.relu(self.norm(name="bn1")(y))
        y = self.norm(name="bn2")(conv(3, 1, self.groups, True, "conv2")(y))
        if self.stride > 1:
            x = self.norm(name="skip_bn")(conv(1, self.stride, 1, False, "skip_conv")(x))
        return nn.relu(x + y)


class LinenResNet(nn.Module):
    """The network in linen."""

    momentum: Any = 0.9

    @nn.compact
    def __call__(self, x):
        """Logits `[batch, classes]` of images `x` `[batch, height, width, 3]`, evaluated."""

        def norm(name):
            return jaxbn.linen.BatchNorm(use_running_average=True, momentum=self.momentum, name=name)

        x = nn.Conv(4, (3, 3), padding=((1, 1), (1, 1)), use_bias=False, name="stem_conv")(x)
        x = nn.relu(norm("stem_bn")(x))
        for i, (_, *settings) in enumerate(BLOCKS):
            x = LinenBlock(*settings, norm=norm, name=f"block{i}")(x)
        return nn.Dense(CLASSES, name="head")(x.mean((1, 2)))


class NnxBlock(nnx.Module):
    """The block in nnx, named as in PyTorch but for the skip connection."""

    def __init__(self, inputs, width, stride, groups, rngs):
        def conv(inputs, size, stride, groups, bias):
            pad = ((size // 2, size // 2),) * 2
            kernel = (size, size)
            return nnx.Conv(
                inputs, width, kernel, stride, padding=pad, feature_group_count=groups, use_bias=bias, rngs=rngs
            )

        self.conv1 = conv(inputs, 3, stride, groups if groups <= inputs else 1, False)
        self.bn1 = jaxbn.nnx.BatchNorm(width, use_running_average=True, rngs=rngs)
        self.conv2 = conv(width, 3, 1, groups, True)
        self.bn2 = jaxbn.nnx.BatchNorm(width, use_running_average=True, rngs=rngs)
        self.skip = nnx.List([])
        if stride > 1:
            norm = jaxbn.nnx.BatchNorm(width, use_running_average=True, rngs=rngs)
            self.skip = nnx.List([conv(inputs, 1, stride, 1, False), norm])

    def __call__(self, x):
        """`x` after the block."""
        y = self.bn2(self.conv2(nnx.relu(self.bn1(self.conv1(x)))))
        for layer in self.skip:
            x = layer(x)
        return nnx.relu(x + y)


class NnxResNet(nnx.Module):
    """The network in nnx."""

    def __init__(self, rngs):
        self.conv1 = nnx.Conv(3, 4, (3, 3), padding=((1, 1), (1, 1)), use_bias=False, rngs=rngs)
        self.bn1 = jaxbn.nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.layers = nnx.List([NnxBlock(*block, rngs) for block in BLOCKS])
        self.fc = nnx.Linear(BLOCKS[-1][1], CLASSES, rngs=rngs)

    def __call__(self, x):
        """Logits `[batch, classes]` of images `x` `[batch, height, width, 3]`, evaluated."""
        x = nnx.relu(self.bn1(self.conv1(x)))
        for layer in self.layers:
            x = layer(x)
        return self.fc(x.mean((1, 2)))


LINEN_NAMES = {"stem_conv": "conv1", "stem_bn": "bn1", "head": "fc"}
for i, (_, _, stride, _) in enumerate(BLOCKS):
    LINEN_NAMES |= {f"block{i}/{name}": f"layers.{i}.{name}" for name in ("conv1", "bn1", "conv2", "bn2")}
    if stride > 1:
        LINEN_NAMES |= {
            f"block{i}/skip_conv": f"layers.{i}.downsample.0",
            f"block{i}/skip_bn": f"layers.{i}.downsample.1",
        }


def nnx_names(layer):
    """Return the PyTorch layer of an nnx layer."""
    return layer.replace("/skip/", "/downsample/").replace("/", ".")


@pytest.fixture(scope="module")
def trained():
    """Return the PyTorch network's `state_dict` after ten steps of training, and its logits in evaluation."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = torch_resnet(torch).train()
    images, labels = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy()), torch.from_numpy(LABELS)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(10):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images * (1 + step / 10)), labels).backward()
        optimizer.step()
    with torch.no_grad():
        logits = model.eval()(images).numpy()
    return model.state_dict(), logits


def abstract(momentum: Any = 0.9):
    """Shapes and dtypes of the linen network's variables."""
    return jax.eval_shape(LinenResNet(momentum).init, jax.random.key(0), IMAGES)


@pytest.mark.parametrize("momentum", [0.9, jaxbn.cumulative_average], ids=["constant", "schedule"])
def test_resnet_in_linen_gives_the_same_logits(trained, momentum):
    state_dict, logits = trained
    variables = from_torch_network(abstract(momentum), state_dict, LINEN_NAMES)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), variables) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), abstract(momentum)
    )
    if callable(momentum):
        assert variables["batch_stats"]["block0"]["bn1"]["count"] == 10
    statistics = variables["batch_stats"]["block0"]["bn1"]["var"]
    assert np.abs(statistics - 1).max() > 0.1  # they are not what they are initialized with
    here = np.asarray(jax.jit(LinenResNet(momentum).apply)(variables, IMAGES))
    np.testing.assert_allclose(here, logits, rtol=0, atol=1e-4)
    assert np.std(logits) > 0.1


def test_resnet_in_nnx_gives_the_same_logits(trained):
    state_dict, logits = trained
    graph, target = nnx.split(nnx.eval_shape(lambda: NnxResNet(nnx.Rngs(0))))
    model = nnx.merge(graph, from_torch_network(target, state_dict, nnx_names))
    np.testing.assert_allclose(model(jnp.asarray(IMAGES)), logits, rtol=0, atol=1e-4)
