"""Whole networks: a small PyTorch ResNet, trained there, gives the same logits in linen and in nnx."""

import os
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
from jaxbn.convert import from_keras_network, from_torch_network

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


def test_keras_network_gives_the_same_outputs():
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    norm = keras.layers.BatchNormalization(momentum=0.5, name="bn")
    layers = [keras.layers.Conv2D(4, 3, name="conv"), norm, keras.layers.Flatten(), keras.layers.Dense(2, name="out")]
    model = keras.Sequential([keras.layers.Input((4, 4, 3)), *layers], name="sequential")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for _ in range(3):
            model(IMAGES[:, :4, :4], training=True)
        outputs = model(IMAGES[:, :4, :4], training=False)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3), padding="VALID", name="conv")(x)
            x = jaxbn.linen.BatchNorm(use_running_average=True, epsilon=1e-3, name="bn")(x)
            return nn.Dense(2, name="head")(x.reshape(x.shape[0], -1))

    target = jax.eval_shape(Model().init, jax.random.key(0), IMAGES[:, :4, :4])
    source = {variable.path: variable for variable in model.weights}
    names = {"conv": "conv", "bn": "bn", "head": "out"}
    variables = from_keras_network(target, source, {layer: f"sequential/{name}" for layer, name in names.items()})
    here = np.asarray(Model().apply(variables, IMAGES[:, :4, :4]))
    np.testing.assert_allclose(here, outputs, rtol=0, atol=1e-5)
    assert np.abs(variables["batch_stats"]["bn"]["mean"]).max() > 0.1


def small():
    """Return a target and a source that fit, as NumPy arrays."""
    target = {
        "params": {
            "conv": {"kernel": np.zeros((1, 3, 2, 4), np.float32)},
            "bn": {"scale": np.zeros(4, np.float32), "bias": np.zeros(4, np.float32)},
            "head": {"kernel": np.zeros((4, 2), np.float32)},
        },
        "batch_stats": {"bn": {"mean": np.zeros(4, np.float32), "var": np.zeros(4, np.float32)}},
    }
    source = {
        "a.weight": RNG.normal(size=(4, 2, 1, 3)),
        "b.weight": np.full(4, 1.0),
        "b.bias": np.full(4, 2.0),
        "b.running_mean": np.full(4, 3.0),
        "b.running_var": np.full(4, 4.0),
        "b.num_batches_tracked": np.int64(7),
        "c.weight": RNG.normal(size=(2, 4)),
    }
    return target, source, {"conv": "a", "bn": "b", "head": "c"}


def test_every_leaf_comes_from_its_own_entry():
    target, source, names = small()
    found = from_torch_network(target, source, names)
    np.testing.assert_array_equal(
        found["params"]["conv"]["kernel"], source["a.weight"].astype(np.float32).transpose(2, 3, 1, 0)
    )
    np.testing.assert_array_equal(found["params"]["head"]["kernel"], source["c.weight"].astype(np.float32).T)
    bn = found["params"]["bn"] | found["batch_stats"]["bn"]
    assert {name: float(value[0]) for name, value in bn.items()} == {"scale": 1, "bias": 2, "mean": 3, "var": 4}
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(found))


def test_dtypes_are_those_of_the_target():
    target, source, names = small()
    target["params"] = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), target["params"])
    found = from_torch_network(target, source, names)
    assert {leaf.dtype for leaf in jax.tree.leaves(found["params"])} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(found["batch_stats"])} == {jnp.dtype(jnp.float32)}


def test_message_names_all_that_does_not_fit_and_nothing_changes():
    target, source, names = small()
    del names["head"], source["b.running_var"]
    names["neck"] = "d"
    target["params"]["bn"]["gain"] = np.zeros(4, np.float32)
    target["batch_stats"]["bn"]["count"] = np.float32(0)
    source |= {"a.weight": np.zeros((3, 2, 1, 3)), "b.weight": np.zeros(5), "e.weight": np.zeros(1)}
    before = jax.tree.map(np.copy, target)
    with pytest.raises(ValueError, match="nothing was converted") as error:
        from_torch_network(target, source, names)
    lines = str(error.value).splitlines()[1:]
    assert lines == [
        "  target leaves that no name matches: bn/gain (no rule for 'gain'), head/kernel",
        "  names of no target layer: neck",
        "  missing in the source: b.running_var (for bn/var)",
        "  of another shape: bn/scale (4,) from b.weight (5,),"
        " conv/kernel (1, 3, 2, 4) from a.weight (3, 2, 1, 3) as (1, 3, 2, 3)",
        "  of another type: bn/count float32 from b.num_batches_tracked int64",
        "  not used of the source: c.weight, e.weight",
    ]
    jax.tree.map(np.testing.assert_array_equal, target, before)


@pytest.mark.parametrize("as_function", [False, True], ids=["dict", "function"])
def test_layer_without_a_source_stays_as_it_is(as_function):
    target, source, names = small()
    del source["c.weight"]
    keep = names | {"head": None}
    found = from_torch_network(target, source, keep.get if as_function else keep)
    assert found["params"]["head"]["kernel"] is target["params"]["head"]["kernel"]
    assert found["batch_stats"]["bn"]["var"][0] == 4


def test_layer_at_the_root():
    target, source, _ = small()
    variables = {"params": target["params"]["bn"], "batch_stats": target["batch_stats"]["bn"]}
    entries = {name: value for name, value in source.items() if name.startswith("b.")}
    found = from_torch_network(variables, entries, {"": "b"})
    assert found["batch_stats"]["var"][0] == 4
    entries = {name.removeprefix("b."): value for name, value in entries.items()}
    assert from_torch_network(variables, entries, {"": ""})["params"]["scale"][0] == 1


def test_nnx_state_with_lists_and_without_random_state():
    _, source, _ = small()
    source = {name.replace("a.", "layers.0.").replace("b.", "layers.1."): value for name, value in source.items()}
    rngs = nnx.Rngs(0)
    conv, norm = nnx.Conv(2, 4, (1, 3), use_bias=False, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
    dense = nnx.Linear(4, 2, use_bias=False, rngs=rngs)
    model = nnx.Dict(layers=nnx.List([conv, norm]), drop=nnx.Dropout(0.5, rngs=rngs), c=dense)
    with pytest.raises(ValueError, match=r"drop/rngs/key \(no rule for 'key'\)"):
        from_torch_network(nnx.state(model), source, lambda layer: layer.replace("/", "."))
    state = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    nnx.update(model, from_torch_network(state, source, lambda layer: layer.replace("/", ".")))
    np.testing.assert_array_equal(conv.kernel[...], source["layers.0.weight"].astype(np.float32).transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(norm.var[...], np.full(4, 4.0))
    np.testing.assert_array_equal(dense.kernel[...], source["c.weight"].astype(np.float32).T)
