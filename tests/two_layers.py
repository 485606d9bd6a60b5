"""Hold the network whose statistics the tests of recalibration compare: in float64, in linen and in nnx."""

from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from oracle import EPSILON, training

import jaxbn.linen
import jaxbn.nnx

recalibrate_linen, recalibrate_nnx = jaxbn.linen.recalibrate, jaxbn.nnx.recalibrate

ROWS, FEATURES = 24, 3
rng = np.random.default_rng(0)
X = (rng.standard_normal((ROWS, FEATURES)) * [0.5, 2, 8] + [0, 3, -5]).astype(np.float32)
W = [rng.standard_normal((FEATURES, 4)).astype(np.float32), rng.standard_normal((4, 2)).astype(np.float32)]
MASK = (np.arange(ROWS) % 5 != 2)[:, None]
HIDDEN = np.where(MASK, X, np.nan).astype(np.float32)
EVEN = [X[:8], X[8:16], X[16:]]
UNEVEN = [X[20:24], X[:16], X[16:20]]
# Sums of a few dozen float32 products and squares.
TOLERANCE = {"rtol": 2e-6, "atol": 2e-6}


# The float64 reference: two layers `norm(x @ w)` with a ReLU between them.


def once(batches, masks=None):
    """Mean and variance of both layers, each batch normalized by its own."""
    first = [x.astype(np.float64) @ W[0] for x in batches]
    masks = [np.ones((len(x), 1), bool) for x in batches] if masks is None else masks
    units = [training(h, mask=mask).y for h, mask in zip(first, masks, strict=True)]
    return _statistics(first, units, masks)


def by_layers(batches, masks=None):
    """Mean and variance of both layers, the second after normalization by the first's."""
    masks = [np.ones((len(x), 1), bool) for x in batches] if masks is None else masks
    first = [x.astype(np.float64) @ W[0] for x in batches]
    _, mean, var, _ = training(np.concatenate(first), mask=np.concatenate(masks))
    return _statistics(first, [(h - mean) / np.sqrt(var + EPSILON) for h in first], masks)


def _statistics(first, units, masks):
    second = [np.maximum(u, 0) @ W[1] for u in units]
    found = [training(np.concatenate(h), mask=np.concatenate(masks)) for h in (first, second)]
    return [v for f in found for v in (f.mean, f.var)]


# The same network four times.


class Linen(nn.Module):
    norm: object

    @nn.compact
    def __call__(self, x, mask=None):
        x = self.norm(name="first")(x @ W[0], mask=mask)
        return self.norm(name="second")(nn.relu(x) @ W[1], mask=mask)


class Stateful(nnx.Module):
    def __init__(self, norm):
        self.first, self.second = norm(4, rngs=nnx.Rngs(0)), norm(2, rngs=nnx.Rngs(0))

    def __call__(self, x, mask=None):
        return self.second(nnx.relu(self.first(x @ W[0], mask=mask)) @ W[1], mask=mask)


@cache
def initial():
    return Linen(partial(nn.BatchNorm, use_running_average=True)).init(jax.random.key(0), X)


def of_linen(norm, batches, train=True, **options):
    model = Linen(partial(norm, use_running_average=not train))
    apply = partial(model.apply, mutable=["batch_stats"])
    variables = initial()
    new = recalibrate_linen(lambda v, batch: apply(v, *_pair(batch)), variables, batches, **options)
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    stats = new["batch_stats"]
    return [stats[name][part] for name in ("first", "second") for part in ("mean", "var")]


def of_nnx(norm, batches, train=True, **options):
    model = Stateful(norm)
    model.set_attributes(use_running_average=not train)
    kinds = jax.tree.structure(nnx.state(model))
    assert recalibrate_nnx(model, batches, lambda m, batch: m(*_pair(batch)), **options) is None
    assert jax.tree.structure(nnx.state(model)) == kinds
    assert type(model.first) is getattr(norm, "func", norm)
    return [getattr(layer, part)[...] for layer in (model.first, model.second) for part in ("mean", "var")]


def _pair(batch):
    return batch if isinstance(batch, tuple) else (batch,)


def assert_statistics(got, wanted, **tolerance):
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, **(tolerance or TOLERANCE))
