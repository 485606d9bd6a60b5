"""Freeze and mask the batch normalizations of a model."""

import operator
from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small_models import KEY, STATS, Deep, Net, X

import jaxbn
import jaxbn.linen
import jaxbn.nnx

pytestmark = pytest.mark.usefixtures("ordinary_promotion")


def test_linen_frozen():
    """A frozen factory: running statistics in training, without an update; scale and bias still learn."""
    net = Net(norm=partial(jaxbn.linen.BatchNorm, frozen=True))
    variables = net.init(KEY, X)

    def loss(params):
        y: Any
        y, update = net.apply({**variables, "params": params}, X, mutable=STATS)
        return jnp.sum(y**2), update

    grads, update = jax.grad(loss, has_aux=True)(variables["params"])
    chex.assert_trees_all_equal(update["batch_stats"], variables["batch_stats"])
    assert np.abs(grads["bn"]["scale"]).min() > 0


@pytest.mark.parametrize("norm", [nn.BatchNorm, jaxbn.linen.BatchNorm], ids=["flax", "ours"])
def test_linen_mask(norm):
    """google-deepmind/optax#25: no weight decay for scale and bias; or they do not move at all."""
    variables = Net(norm=norm).init(KEY, X)
    mask = jaxbn.linen.affine_mask(variables)
    assert mask == {
        "first": {"kernel": False, "bias": False},
        "bn": {"scale": True, "bias": True},
        "last": {"kernel": False, "bias": False},
    }
    params = jax.tree.map(lambda v: v + 1, variables["params"])
    decay = optax.adamw(0.1, weight_decay=0.5, mask=jax.tree.map(operator.not_, mask))
    updates, _ = decay.update(jax.tree.map(jnp.zeros_like, params), decay.init(params), params)
    moved = jax.tree.map(lambda u: bool(jnp.any(u != 0)), updates)
    assert moved == jax.tree.map(operator.not_, mask)
    freeze = optax.chain(optax.sgd(0.1), optax.masked(optax.set_to_zero(), mask))
    updates, _ = freeze.update(jax.tree.map(jnp.ones_like, params), freeze.init(params), params)
    assert jax.tree.map(lambda u: bool(jnp.any(u != 0)), updates) == jax.tree.map(operator.not_, mask)


def test_whitening_is_in_both_masks():
    layer, linen = jaxbn.nnx.IterNorm(3, rngs=nnx.Rngs(0)), jaxbn.linen.IterNorm(use_running_average=False)
    assert jax.tree.leaves(jaxbn.nnx.affine_mask(layer)) == [True, True]
    assert jaxbn.linen.affine_mask(linen.init(KEY, X)) == {"scale": True, "bias": True}


def test_linen_mask_of_a_layer_and_of_sharded_parameters():
    layer = jaxbn.linen.BatchNorm(scale_init=nn.with_partitioning(nn.initializers.ones, ("model",)))
    variables = layer.init(KEY, X, use_running_average=True)
    mask = jaxbn.linen.affine_mask(variables)
    assert mask == {"scale": True, "bias": True}
    freeze = optax.masked(optax.set_to_zero(), mask)
    updates, _ = freeze.update(variables["params"], freeze.init(variables["params"]))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize("norm", [nnx.BatchNorm, jaxbn.nnx.BatchNorm], ids=["flax", "ours"])
def test_nnx_mask(norm):
    """Mask a model with shared layers by optax on the state, and by `nnx.Optimizer`, which gives optax bare arrays."""
    model = Deep(norm)
    mask = jaxbn.nnx.affine_mask(model)
    params = nnx.state(model, nnx.Param)
    # The shared scale and bias, the tied layer's bias, the last scale; and two kernels with their biases.
    assert sorted(jax.tree.leaves(mask)) == [False] * 4 + [True] * 4
    decay = optax.adamw(0.1, weight_decay=0.5, mask=jax.tree.map(operator.not_, mask))
    nothing, before = jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.copy, params)
    updates, _ = decay.update(nothing, decay.init(params), params)
    optimizer = nnx.Optimizer(model, decay, wrt=nnx.Param)
    optimizer.update(model, nothing)
    for after in (optax.apply_updates(before, updates), nnx.state(model, nnx.Param)):
        for kept, a, b in zip(*map(jax.tree.leaves, (mask, before, after)), strict=True):
            assert bool(jnp.all(a == b)) == (kept or not a.any())


def test_nnx_mask_of_containers_and_of_a_layer():
    layer = jaxbn.nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    assert jax.tree.leaves(jaxbn.nnx.affine_mask(layer)) == [True, True]
    assert jax.tree.leaves(jaxbn.nnx.affine_mask({"a": [layer], "b": nnx.Linear(2, 2, rngs=nnx.Rngs(0))})) == [
        True,
        True,
        False,
        False,
    ]


def test_frozen_statistics_with_learning_parameters():
    """A step of `nnx.Optimizer` over a frozen model moves scale and bias, and no statistic."""
    model = jaxbn.nnx.convert(Deep(), frozen=True)
    frozen = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    scale = np.array(model.alpha.scale[...])
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda model: jnp.sum(model(X) ** 2))(model))
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)), frozen)
    assert np.abs(model.alpha.scale[...] - scale).min() > 0


def test_frozen_needs_no_flag():
    """There is nothing to choose."""
    x = np.ones((4, 3), np.float32)
    layer = jaxbn.linen.BatchNorm(frozen=True)
    variables = layer.init(jax.random.key(0), x)
    chex.assert_trees_all_close(layer.apply(variables, x), x, rtol=1e-4)
    module = jaxbn.nnx.BatchNorm(3, frozen=True, use_running_average=None, rngs=nnx.Rngs(0))
    chex.assert_trees_all_close(module(x), x, rtol=1e-4)
