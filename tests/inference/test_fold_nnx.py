"""Fold nnx models: the same outputs without the normalizations."""

import re
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from folded_models import KEY, X, aged, near, trained

import jaxbn.linen
import jaxbn.nnx

NNX = pytest.mark.parametrize(
    "norm", [pytest.param(nnx.BatchNorm, marks=pytest.mark.slow), jaxbn.nnx.BatchNorm], ids=["flax", "ours"]
)
pytestmark = pytest.mark.usefixtures("ordinary_promotion")


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
    new = jaxbn.nnx.fold(model, X, pairs=NNX_PAIRS)
    near(new(X), reference(X))
    twice = jaxbn.nnx.fold(model, {"image": X}, lambda model, batch: model(batch["image"]))
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
    new = jaxbn.nnx.fold(model, x, tolerance=5e-2)
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
            jaxbn.nnx.fold(model, X, pairs=pairs)
        assert all(word in str(error.value) for word in words), error.value
        assert "'up' ->" not in str(error.value)
    with pytest.raises(TypeError, match="nnx module"):
        jaxbn.nnx.fold({"a": model}, X)


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
    """Conditional layers: the statistics are folded, scale and bias of the call are applied as before."""
    pairs, x = {"first": "by_example", "last": "by_feature"}, X[:, 0, 0]
    stateful = aged(StatefulConditional())
    new = jaxbn.nnx.fold(stateful, x, pairs=pairs)
    assert not nnx.to_flat_state(nnx.state(new, nnx.BatchStat))
    stateful.eval()
    near(new(x), stateful(x))
    model = Conditional()
    variables = trained(model.init(KEY, x))
    near(model.apply(jaxbn.linen.fold(model.apply, variables, x, pairs=pairs), x), model.apply(variables, x))


class Rounded(nnx.Module):
    """A conditional layer in half precision, with a residual and an activation."""

    def __init__(self):
        self.dense = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        options: Any = {"use_scale": False, "use_bias": False, "activation": lambda y: y - 4.0, "dtype": jnp.bfloat16}
        self.norm = jaxbn.nnx.BatchNorm(3, **options, rngs=nnx.Rngs(0))

    def __call__(self, x, residual=None, bias=None):
        return self.norm(self.dense(x), residual=residual, bias=bias)


def test_a_folded_normalization_rounds_once():
    """Near 4 bfloat16 has steps of 1/64, which would show after the activation has subtracted 4."""
    x = X.reshape(-1, 2)
    model = Rounded()
    new = jaxbn.nnx.fold(model, x, tolerance=3e-2)
    model.eval()
    residual, bias = jnp.full((90, 3), 3.0), jnp.full(3, 1.0)
    y, wanted = new(x, residual, bias), model(x, residual, bias)
    assert y.dtype == wanted.dtype == jnp.bfloat16
    y, wanted = (np.asarray(v, np.float32) for v in (y, wanted))
    np.testing.assert_allclose(y, wanted, rtol=2**-7, atol=1e-4)  # a step apart where float32 rounds otherwise


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"residual": np.ones(3, np.float32)}, r"`residual` must have the shape of `x`, \(4, 3\); got \(3,\)"),
        ({"bias": np.ones(2, np.float32)}, r"`bias` must have shape \(3,\), or \(4, 3\).*got \(2,\)"),
    ],
)
def test_a_folded_normalization_refuses_what_the_layer_refuses(options, words):
    x = X[0, :4, 0]
    model = Rounded()
    for refusing in (model, jaxbn.nnx.fold(model, x, tolerance=3e-2)):
        with pytest.raises(ValueError, match=words):
            refusing(x, **options)
