"""Fold layers whose bias has more axes than the features, and normalizations that share statistics."""

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

KEY = jax.random.key(0)
X = np.asarray(np.random.default_rng(0).normal(2, 3, size=(8, 3)), np.float32)
pytestmark = pytest.mark.usefixtures("ordinary_promotion")


def rngs():
    return nnx.Rngs(0)


def norm(**options) -> Any:
    return jaxbn.nnx.BatchNorm(3, **options, rngs=rngs())


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("kind", ["LinearGeneral", "DenseGeneral", "ConvLocal"])
def test_fold_where_a_bias_has_more_axes(kind, use_bias):
    init = nn.initializers.normal()
    if kind == "LinearGeneral":
        layer = nnx.LinearGeneral(3, (2, 4), use_bias=use_bias, bias_init=init, rngs=rngs())
        model = nnx.Sequential(layer, jaxbn.nnx.BatchNorm(4, rngs=rngs()))
        model(X)
        new = jaxbn.nnx.fold(model, X)
        model.eval()
        np.testing.assert_allclose(new(X), model(X), atol=1e-5)
        return
    x = X if kind == "DenseGeneral" else np.asarray(np.random.default_rng(3).normal(size=(4, 6, 3)), np.float32)

    def make(use_bias, norm=True):
        made = {
            "DenseGeneral": lambda: nn.DenseGeneral((2, 4), use_bias=use_bias, bias_init=init),
            "ConvLocal": lambda: nn.ConvLocal(4, (3,), use_bias=use_bias, bias_init=init),
        }[kind]()
        return nn.Sequential([made, jaxbn.linen.BatchNorm(use_running_average=True)] if norm else [made])

    model = make(use_bias)
    variables: Any = model.init(KEY, x)
    variables["batch_stats"] = jax.tree.map(lambda v: v + 0.5, variables["batch_stats"])
    wanted = model.apply(variables, x)
    new = jaxbn.linen.fold(model.apply, variables, x)
    np.testing.assert_allclose(model.apply(new, x), wanted, atol=1e-5)
    dropped = jaxbn.linen.fold(model.apply, variables, x, drop=True)
    np.testing.assert_allclose(make(True, norm=False).apply(dropped, x), wanted, atol=1e-5)


def test_a_bias_of_other_features_is_refused():
    with pytest.raises(ValueError, match="`bias`"):
        jaxbn.inference.fold(*jaxbn.bn_init(4), np.ones((3, 2, 4), np.float32), np.ones((4, 2), np.float32))


def test_folding_where_only_the_statistics_are_shared():
    """Two normalizations with their own scale and bias, one of them right after a layer."""

    class Shared(nnx.Module):
        def __init__(self):
            self.first, self.second = nnx.Linear(3, 3, rngs=rngs()), nnx.Linear(3, 3, rngs=rngs())
            self.one, self.other = norm(), norm()
            self.other.mean, self.other.var = self.one.mean, self.one.var
            self.other.scale[...] = jnp.full(3, 2.0)

        def __call__(self, x):
            return self.other(jax.nn.relu(self.second(jax.nn.relu(self.one(self.first(x))))))

    model = Shared()
    model(X)
    new = jaxbn.nnx.fold(model, X, pairs={"first": "one"})
    model.eval()
    np.testing.assert_allclose(new(X), model(X), atol=1e-5)
    assert isinstance(new.other, jaxbn.nnx.BatchNorm)
    found = jaxbn.nnx.health(model, X)
    gaps = [layer.batch.mean for layer in found]
    assert gaps[0] != gaps[1]  # each has its own input
