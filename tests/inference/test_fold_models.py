"""Whole models after folding: the same outputs from the same definition, or a refusal that names the pair at fault."""

import re
from functools import partial
from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

import jaxbn.linen
import jaxbn.nnx
from jaxbn.linen._fold import fold as linen_fold
from jaxbn.nnx._fold import fold as nnx_fold

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = np.asarray(RNG.normal(size=(3, 6, 5, 2)), np.float32)
BOTH = pytest.mark.parametrize(
    "norm", [pytest.param(nn.BatchNorm, marks=pytest.mark.slow), jaxbn.linen.BatchNorm], ids=["flax", "ours"]
)
NNX = pytest.mark.parametrize(
    "norm", [pytest.param(nnx.BatchNorm, marks=pytest.mark.slow), jaxbn.nnx.BatchNorm], ids=["flax", "ours"]
)

# flax's layers need JAX's usual promotion.
pytestmark = pytest.mark.usefixtures("ordinary_promotion")


class Block(nn.Module):
    """Every kind of layer, normalized; with and without biases."""

    norm: Any = nn.BatchNorm
    use_bias: bool = True

    @nn.compact
    def __call__(self, x, train=False):
        """Logits."""
        norm = partial(self.norm, use_running_average=not train, epsilon=1e-3)
        with_bias = {"use_bias": self.use_bias}
        x = nn.relu(norm()(nn.Conv(4, (3, 3), strides=2, **with_bias)(x)))
        x = nn.relu(norm(use_scale=False)(nn.Conv(4, (3, 2), feature_group_count=2, kernel_dilation=2, **with_bias)(x)))
        x = norm(use_bias=False)(nn.ConvTranspose(3, (2, 2), strides=(2, 2), transpose_kernel=True, **with_bias)(x))
        x = nn.relu(norm()(nn.ConvTranspose(4, (3, 3), **with_bias)(x)))
        x = norm(axis=(-2, -1))(nn.DenseGeneral((2, 3), axis=(-3, -2, -1), **with_bias)(x))
        return nn.Dense(3, name="last")(nn.relu(x).reshape(len(x), -1))


class Net(nn.Module):
    """A block deeper down, and a head."""

    norm: Any = nn.BatchNorm
    use_bias: bool = True

    @nn.compact
    def __call__(self, x, train=False):
        """Logits."""
        x = Block(self.norm, self.use_bias, name="block")(x, train)
        return nn.relu(self.norm(use_running_average=not train)(nn.Dense(3, use_bias=self.use_bias, name="head")(x)))


PAIRS = {
    "block/Conv_0": "block/BatchNorm_0",
    "block/Conv_1": "block/BatchNorm_1",
    "block/ConvTranspose_0": "block/BatchNorm_2",
    "block/ConvTranspose_1": "block/BatchNorm_3",
    "block/DenseGeneral_0": "block/BatchNorm_4",
    "head": "BatchNorm_0",
}


def trained(variables):
    """Variables with statistics, scales and biases of some age; kernels as they are."""
    rng = np.random.default_rng(1)

    def aged(path, leaf):
        name = path[-1].key
        value = rng.uniform(0.3, 3, leaf.shape) if name == "var" else rng.normal(0.3, 1, leaf.shape)
        return leaf if name in ("kernel", "count") else jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(aged, flax.core.unfreeze(variables))


def norms_of(variables):
    """The flattened variables of normalizations."""
    flat = traverse_util.flatten_dict(variables)
    return {path: v for path, v in flat.items() if "BatchNorm" in path[-2]}


def near(got, wanted, tolerance=1e-5):
    """Relative to the largest output: a few roundings of 6e-8 in each of six layers."""
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * np.max(np.abs(wanted)))


@BOTH
@pytest.mark.parametrize("use_bias", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_linen(norm, use_bias):
    """Every kind of layer: same outputs; the normalizations are the identity, or a shift where layers have no bias."""
    model = Net(norm, use_bias)
    variables = trained(model.init(KEY, X))
    before = jax.tree.map(np.asarray, variables)
    wanted = model.apply(variables, X)
    new = linen_fold(lambda v, x: model.apply(v, x, train=False), variables, PAIRS, X)
    near(model.apply(new, X), wanted)
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    assert jax.tree.map(lambda v: (v.shape, v.dtype), new) == jax.tree.map(lambda v: (v.shape, v.dtype), variables)
    for path, value in norms_of(new).items():
        epsilon = 1e-3 if path[1] == "block" else 1e-5
        if path[-1] == "mean" and not use_bias:
            assert np.any(np.asarray(value) != 0)
        else:
            exact = {"scale": 1, "bias": 0, "mean": 0, "var": np.float32(1) - np.float32(epsilon)}[path[-1]]
            np.testing.assert_array_equal(value, np.full(value.shape, exact, np.float32))
    # Folding again changes nothing: the normalizations are the identity to the last bit.
    if use_bias:
        jax.tree.map(np.testing.assert_array_equal, linen_fold(model.apply, new, PAIRS, X), new)
    # Without them: the same model with the identity in their place and biases in its layers.
    dropped = linen_fold(model.apply, variables, PAIRS, X, drop=True)
    assert "batch_stats" not in dropped
    near(Net(lambda **_: lambda x: x).apply(dropped, X), wanted)


@pytest.mark.parametrize("epsilon", [1e-12, 1e-5, 1e-3, 3e-4, 0.3, 5.0])
def test_the_identity_is_exact(epsilon):
    """`sqrt((1 - epsilon) + epsilon)` is 1 in float32, so that a layer folded anew stays as it is."""
    model = nn.Sequential([nn.Dense(3), jaxbn.linen.BatchNorm(use_running_average=True, epsilon=epsilon)])
    x = X[:, 0, 0]
    new = linen_fold(model.apply, trained(model.init(KEY, x)), {"layers_0": "layers_1"}, x)
    np.testing.assert_array_equal(model.apply(new, x), model.layers[0].apply({"params": new["params"]["layers_0"]}, x))


def test_linen_stacked_boxed_frozen_and_counted():
    """Layers that `nn.scan` stacks, sharded initializers, `FrozenDict`, a count: all kept as they came."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            kernel = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
            x = nn.Dense(2, use_bias=False, kernel_init=kernel)(x)
            norm = jaxbn.linen.BatchNorm(use_running_average=True, momentum=jaxbn.cumulative_average)
            return nn.relu(norm(x)), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"params": 0, "batch_stats": 0}
            name = {nn.PARTITION_NAME: "layers"}
            return nn.scan(Layer, axes, split_rngs={"params": True}, length=3, metadata_params=name)()(x, None)[0]

    model, x = Stack(), X[:, 0, 0]
    start = model.init(KEY, x)
    boxed = start["params"]["ScanLayer_0"]["Dense_0"]["kernel"]
    assert isinstance(boxed, nn.Partitioned)
    values = trained(nn.unbox(start))
    variables = {
        "params": {**values["params"], "ScanLayer_0": dict(values["params"]["ScanLayer_0"])},
        "batch_stats": values["batch_stats"],
    }
    variables["params"]["ScanLayer_0"]["Dense_0"] = {"kernel": boxed}
    variables = flax.core.freeze(variables)
    new = linen_fold(model.apply, variables, {"ScanLayer_0/Dense_0": "ScanLayer_0/BatchNorm_0"}, x)
    near(model.apply(new, x), model.apply(variables, x))
    kernel = new["params"]["ScanLayer_0"]["Dense_0"]["kernel"]
    assert kernel.names == boxed.names
    assert np.any(np.asarray(kernel.unbox()) != np.asarray(boxed.unbox()))
    assert "count" in new["batch_stats"]["ScanLayer_0"]["BatchNorm_0"]


@pytest.mark.parametrize("tolerance", [1e-4, 3e-2])
def test_half_precision_needs_more_room(tolerance):
    """bfloat16 rounds by 4e-3: refused by default, with the way out in the message."""
    model = nn.Sequential([nn.Dense(8), jaxbn.linen.BatchNorm(use_running_average=True, dtype=jnp.bfloat16)])
    x = X.reshape(3, -1).astype(jnp.bfloat16)
    variables = jax.tree.map(lambda v: v.astype(jnp.bfloat16), trained(model.init(KEY, x)))
    call = partial(linen_fold, model.apply, variables, {"layers_0": "layers_1"}, x, tolerance=tolerance)
    if tolerance == 1e-4:
        with pytest.raises(ValueError, match="tolerance=3e-2"):
            call()
    else:
        new = call()
        assert new["params"]["layers_0"]["kernel"].dtype == jnp.bfloat16
        near(model.apply(new, x).astype(np.float32), np.asarray(model.apply(variables, x), np.float32), 3e-2)


class Wrong(nn.Module):
    """What cannot be folded, beside what can."""

    @nn.compact
    def __call__(self, x, train=False, early=False):
        """Some number."""
        norm = partial(jaxbn.linen.BatchNorm, use_running_average=not train)
        x = norm(name="right_norm")(nn.Dense(2, name="right")(x))
        x = norm(name="after_relu")(nn.relu(nn.Dense(2, name="relu")(x)))
        shared = nn.Dense(2, name="shared")
        x = norm(name="second")(shared(norm(name="first")(shared(x))))
        x = norm(name="rows", axis=1)(nn.Dense(5, name="square")(x))
        x = norm(name="wide")(nn.Dense(7, name="narrow")(x)[..., :5])
        return x if early else norm(name="late_norm")(nn.LayerNorm(name="plain")(nn.Dense(5, name="late")(x)))


RIGHT = {"right": "right_norm"}
BAD = {
    "not directly behind": ({**RIGHT, "relu": "after_relu"}, {}, ["'relu' -> 'after_relu'", "activation"]),
    "a shared layer": ({**RIGHT, "shared": "second"}, {}, ["'shared' -> 'second'"]),
    "statistics of rows": ({**RIGHT, "square": "rows"}, {}, ["'square' -> 'rows'"]),
    "feature counts": ({"narrow": "wide"}, {}, ["'wide'", "'narrow'", "(5,)", "(7,)"]),
    "misspelt layer": ({"rihgt": "right_norm"}, {}, ["'rihgt'", "Did you mean 'right'"]),
    "misspelt normalization": ({"right": "right_norn"}, {}, ["'right_norn'", "Did you mean 'right_norm'"]),
    "no normalization": ({"late": "plain"}, {}, ["'plain'", "mean and var"]),
    "one normalization twice": ({**RIGHT, "relu": "right_norm"}, {}, ["'right_norm'", "twice", "once"]),
    "training": (RIGHT, {"train": True}, ["`apply`", "evaluation", "'right_norm'", "train=False"]),
    "not called": ({"late": "late_norm"}, {"early": True}, ["'late'", "not call", "plain function"]),
}


@pytest.mark.parametrize("name", BAD)
def test_linen_refuses(name):
    """Also at initialization, where all biases and means are 0 and a ReLU and a normalization commute."""
    pairs, options, words = BAD[name]
    model, x = Wrong(), X[:, :5, :, :]
    variables = model.init(KEY, x)
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        linen_fold(partial(model.apply, **options), variables, pairs, x)
    assert all(word in str(error.value) for word in words), error.value
    assert "'right' ->" not in str(error.value)


def test_statistics_of_something_else():
    """A module of the user's own that keeps mean and var may do anything with them."""

    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            mean, var = (self.variable("batch_stats", name, lambda: jnp.ones(3)) for name in ("mean", "var"))
            return (x - mean.value) * var.value

    model = nn.Sequential([nn.Dense(3), Own()])
    with pytest.raises(ValueError, match="'layers_1' is a Own"):
        linen_fold(model.apply, model.init(KEY, X), {"layers_0": "layers_1"}, X)


@pytest.mark.parametrize("pairs", [{}, None, ["Dense_0"]])
def test_pairs_must_be_pairs(pairs):
    model = Wrong()
    with pytest.raises(TypeError, match="`pairs` must map"):
        linen_fold(model.apply, model.init(KEY, X[:, :5]), pairs, X[:, :5])


def aged(model):
    """The model, with statistics, scales and biases of some age."""
    rng = np.random.default_rng(2)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, (nnx.BatchNorm, jaxbn.nnx.BatchNorm)):
            module.mean.set_value(jnp.asarray(rng.normal(size=module.mean.shape), jnp.float32))
            module.var.set_value(jnp.asarray(rng.uniform(0.3, 3, module.var.shape), jnp.float32))
            for v in (module.scale, module.bias):
                if v is not None:
                    v.set_value(jnp.asarray(rng.normal(size=v.shape), jnp.float32))
    return model


class Model(nnx.Module):
    """Every kind of layer, normalized; a skip connection and an activation, inside where they can be."""

    def __init__(self, norm: Any, use_bias: bool, relu: bool = False):
        rngs, bias = nnx.Rngs(0), {"use_bias": use_bias}
        self.inside = norm is jaxbn.nnx.BatchNorm
        self.relu = relu
        self.conv = nnx.Conv(2, 4, (3, 3), feature_group_count=2, **bias, rngs=rngs)
        self.up = nnx.ConvTranspose(4, 4, (2, 2), transpose_kernel=True, **bias, rngs=rngs)
        self.norms = nnx.List([
            norm(4, epsilon=1e-3, rngs=rngs),
            norm(4, use_scale=False, **({"activation": jax.nn.relu} if self.inside else {}), rngs=rngs),
            norm(3, use_bias=False, dtype=jnp.float32, rngs=rngs),
        ])  # fmt: skip
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.LinearGeneral((5, 4), 3, axis=(-2, -1), **bias, rngs=rngs)

    def __call__(self, x):
        """Logits."""
        h = self.conv(x)
        h = self.norms[0](jax.nn.relu(h) if self.relu else h)
        x = self.up(h)
        x = self.norms[1](x, residual=h) if self.inside else jax.nn.relu(self.norms[1](x) + h)
        return self.norms[2](self.last(self.drop(x)))


NNX_PAIRS = {"conv": "norms/0", "up": "norms/1", "last": "norms/2"}


@pytest.mark.slow
@NNX
@pytest.mark.parametrize("use_bias", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_nnx(norm, use_bias):
    model = aged(Model(norm, use_bias))
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(nnx.clone(model), (nnx.Param, nnx.BatchStat))))
    reference = nnx.clone(model)
    reference.eval()
    new = nnx_fold(model, NNX_PAIRS, X)
    near(new(X), reference(X))
    twice = nnx_fold(model, NNX_PAIRS, {"image": X}, lambda model, batch: model(batch["image"]))
    near(twice(X), reference(X))
    near(nnx.jit(lambda model, x: model(x))(new, X), reference(X))
    near(nnx.view(new, use_running_average=True)(X), reference(X))
    assert not nnx.to_flat_state(nnx.state(new, nnx.BatchStat))
    assert {len(path) for path, _ in nnx.to_flat_state(nnx.state(new, nnx.Param))} == {2}
    assert all(isinstance(v, nnx.Param) for v in (new.conv.bias, new.up.bias, new.last.bias))
    # The old one is as it was, and in training.
    after = nnx.to_pure_dict(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert not model.norms[0].use_running_average
    new.conv.kernel.set_value(new.conv.kernel[...] * 0)
    assert np.any(model.conv.kernel[...] != 0)


@NNX
def test_nnx_stacked_and_reduced_precision(norm):
    """Layers stacked by `nnx.vmap`; and a folded normalization gives the dtype that it gave."""

    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(2, 2, use_bias=False, dtype=jnp.bfloat16, rngs=rngs)
            self.norm = norm(2, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.dense(x))

    class Stack(nnx.Module):
        def __init__(self):
            self.layers = nnx.vmap(Layer)(nnx.Rngs(0).split(3))

        def __call__(self, x):
            return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)

    model, x = aged(Stack()), X[:, 0, 0]
    reference = nnx.clone(model)
    reference.eval()
    new = nnx_fold(model, {"layers/dense": "layers/norm"}, x, tolerance=5e-2)
    assert new(x).dtype == reference(x).dtype == jnp.float32
    near(new(x), reference(x), 5e-2)


def test_nnx_refuses():
    model = Model(jaxbn.nnx.BatchNorm, True, relu=True)
    cases = [
        (NNX_PAIRS, ["'conv' -> 'norms/0'", "activation"]),
        ({"conv": "drop"}, ["'drop'", "mean and var"]),
        ({"cnov": "norms/0"}, ["Did you mean 'conv'"]),
        ({"conv": "norms/2"}, ["(3,)", "(4,)", "'conv'"]),
        ({"conv": "norms/1", "up": "norms/1"}, ["'norms/1'", "twice"]),
    ]
    for pairs, words in cases:
        with pytest.raises(ValueError, match=re.escape(words[0])) as error:
            nnx_fold(model, pairs, X)
        assert all(word in str(error.value) for word in words), error.value
        assert "'up' ->" not in str(error.value)
    with pytest.raises(TypeError, match="nnx module"):
        nnx_fold({"a": model}, NNX_PAIRS, X)


def test_the_call_that_recalibrates_folds_too():
    """It returns statistics beside the output; only the output is compared."""
    model = nn.Sequential([nn.Dense(3), jaxbn.linen.BatchNorm(use_running_average=True)])
    x = np.random.default_rng(0).standard_normal((4, 2)).astype(np.float32)
    variables = model.init(jax.random.key(0), x)
    new = jaxbn.linen.fold(
        lambda v, x: model.apply(v, x, mutable=["batch_stats"]), variables, {"layers_0": "layers_1"}, x
    )
    np.testing.assert_allclose(model.apply(new, x), model.apply(variables, x), atol=1e-6)


BY_FEATURE = np.arange(6, dtype=np.float32).reshape(2, 3)


class Conditional(nn.Module):
    """A layer whose scale and bias the call computes, by example; and one with a bias by feature, the scale its own."""

    @nn.compact
    def __call__(self, x):
        given = partial(jaxbn.linen.BatchNorm, use_running_average=True, epsilon=1e-3, use_bias=False)
        film = nn.Dense(8, name="film")(x)
        x = nn.Dense(4, name="first")(x)
        x = given(use_scale=False, activation=jax.nn.relu, name="by_example")(x, scale=film[:, :4], bias=film[:, 4:])
        x = nn.DenseGeneral((2, 3), name="last")(x)
        return given(axis=(-2, -1), name="by_feature")(x, bias=BY_FEATURE)


class StatefulConditional(nnx.Module):
    """The same."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        given = partial(jaxbn.nnx.BatchNorm, epsilon=1e-3, use_bias=False, rngs=rngs)
        self.film, self.first = nnx.Linear(2, 8, rngs=rngs), nnx.Linear(2, 4, rngs=rngs)
        self.by_example = given(4, use_scale=False, activation=jax.nn.relu)
        self.last = nnx.LinearGeneral(4, (2, 3), rngs=rngs)
        self.by_feature = given((2, 3), axis=(-2, -1))

    def __call__(self, x):
        film = self.film(x)
        x = self.by_example(self.first(x), scale=film[:, :4], bias=film[:, 4:])
        return self.by_feature(self.last(x), bias=BY_FEATURE)


def test_scale_and_bias_of_the_call_stay():
    """Conditional layers: the statistics are folded, what the call gives is applied as before."""
    pairs, x = {"first": "by_example", "last": "by_feature"}, X[:, 0, 0]
    stateful = aged(StatefulConditional())
    new = nnx_fold(stateful, pairs, x)
    assert not nnx.to_flat_state(nnx.state(new, nnx.BatchStat))
    stateful.eval()
    near(new(x), stateful(x))
    model = Conditional()
    variables = trained(model.init(KEY, x))
    near(model.apply(linen_fold(model.apply, variables, pairs, x), x), model.apply(variables, x))


@pytest.mark.parametrize("options", [{"num_domains": 2}, {"example_weight": 0.5}])
def test_what_is_no_one_affine_map(options):
    words = "'norm' into 'dense'.*" + "=".join(map(str, *options.items()))
    call = {"domain": 1} if "num_domains" in options else {}

    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = jaxbn.linen.BatchNorm(use_running_average=True, name="norm", **options)
            return norm(nn.Dense(2, name="dense")(x), **call)

    stateful = nnx.Dict(
        dense=nnx.Linear(2, 2, rngs=nnx.Rngs(0)), norm=jaxbn.nnx.BatchNorm(2, **options, rngs=nnx.Rngs(0))
    )
    model, x = Own(), X[:, 0, 0]
    with pytest.raises(ValueError, match=words):
        linen_fold(model.apply, model.init(KEY, x), {"dense": "norm"}, x)
    with pytest.raises(ValueError, match=words):
        nnx_fold(stateful, {"dense": "norm"}, x, lambda m, x: m["norm"](m["dense"](x), **call))
