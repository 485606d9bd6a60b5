"""Train with gradient accumulation and loss scaling: one update of the statistics a step, or none."""

from functools import partial
from typing import Any

import chex
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


MICRO = X.reshape(4, 2, 2) * np.array([1, 2, 3, 4], np.float32)[:, None, None]
MOMENTA = pytest.mark.parametrize("momentum", [0.9, jaxbn.zero_debiased(0.9)], ids=["constant", "schedule"])


def only_norm(momentum):
    """Put a layer after a parameter, so that gradients and statistics are both there, with a past."""
    layer = jaxbn.linen.BatchNorm(use_running_average=False, momentum=momentum)
    variables = layer.init(KEY, MICRO[0])
    past = layer.apply(variables, X - 5, mutable=STATS)[1]
    variables = {**variables, **past}

    def loss(params, stats, x):
        y, update = layer.apply({"params": params, "batch_stats": stats}, x, mutable=STATS)
        return jnp.mean(jnp.sin(y)), update["batch_stats"]

    return variables["params"], variables["batch_stats"], loss


@MOMENTA
def test_accumulation_with_multisteps(momentum):
    """google/flax#2031: `optax.MultiSteps` makes one step of k gradients, `pool_updates` one update of k states."""
    params, stats, loss = only_norm(momentum)
    optimizer = optax.MultiSteps(optax.sgd(0.1), every_k_schedule=len(MICRO))
    memory = optimizer.init(params)

    @jax.jit
    def micro_step(params, memory, x):
        grads, new = jax.grad(loss, has_aux=True)(params, stats, x)
        updates, memory = optimizer.update(grads, memory, params)
        return optax.apply_updates(params, updates), memory, new

    trained, seen = params, []
    for x in MICRO:
        trained, memory, new = micro_step(trained, memory, x)
        seen.append(new)
    assert optimizer.has_updated(memory)
    assert not np.array_equal(trained["bias"], params["bias"])
    pooled = jaxbn.pool_updates(jax.tree.map(lambda *leaves: jnp.stack(leaves), *seen), momentum)
    chex.assert_trees_all_close(pooled, loss(params, stats, MICRO.reshape(8, 2))[1], rtol=1e-6, atol=1e-6)


@MOMENTA
def test_accumulation_with_a_scan(momentum):
    params, stats, loss = only_norm(momentum)

    @jax.jit
    def step(params, stats):
        def body(total, x):
            grads, new = jax.grad(loss, has_aux=True)(params, stats, x)
            return jax.tree.map(jnp.add, total, grads), new

        total, seen = jax.lax.scan(body, jax.tree.map(jnp.zeros_like, params), MICRO)
        return jax.tree.map(lambda g: g / len(MICRO), total), jaxbn.pool_updates(seen, momentum)

    grads, pooled = step(params, stats)
    assert np.abs(grads["bias"]).min() > 0
    one_batch = loss(params, stats, MICRO.reshape(8, 2))[1]
    chex.assert_trees_all_equal_shapes_and_dtypes(pooled, one_batch)
    chex.assert_trees_all_close(pooled, one_batch, rtol=1e-6, atol=1e-6)
    # Updates by one microbatch after another give another state.
    naive: Any = stats
    for x in MICRO:
        naive = loss(params, naive, x)[1]
    assert np.abs(naive["mean"] - one_batch["mean"]).max() > 0.1


@MOMENTA
def test_accumulation_in_nnx(momentum):
    """An `nnx.State` of a whole model; microbatches of unequal size by their weights."""
    model: Any = nnx.List(
        [jaxbn.nnx.BatchNorm(2, momentum=momentum, rngs=nnx.Rngs(0)), nnx.Linear(2, 2, rngs=nnx.Rngs(1))]
    )
    model[0](X - 5)
    graph, stats, rest = nnx.split(model, nnx.BatchStat, ...)
    mask = np.arange(2)[None, :, None] < np.array([2, 1, 2, 1])[:, None, None]

    def update(x, mask):
        merged: Any = nnx.merge(graph, stats, rest, copy=True)
        merged[0](x, mask=mask)
        return nnx.state(merged, nnx.BatchStat)

    seen = jax.jit(jax.vmap(update))(MICRO, mask)
    one_batch = update(MICRO.reshape(8, 2), mask.reshape(8, 1))
    nnx.update(model, jaxbn.pool_updates(seen, momentum, weights=np.array([2.0, 1, 2, 1], np.float32)))
    chex.assert_trees_all_close(nnx.state(model, nnx.BatchStat), one_batch, rtol=1e-6, atol=1e-6)


def test_pooling_leaves_out_batches_without_an_update():
    """A microbatch that is not finite, or that is all masked, did not change the state, and its count says so."""
    params, state = jaxbn.bn_init(2)
    micro = MICRO.copy()
    micro[1] = np.nan
    seen = jax.vmap(lambda x: jaxbn.bn_apply(params, state, x, True)[1])(micro)
    wanted = jaxbn.bn_apply(params, state, micro[[0, 2, 3]].reshape(6, 2), True)[1]
    chex.assert_trees_all_close(jaxbn.pool_updates(seen), wanted, rtol=1e-6, atol=1e-6)


def test_pooling_nothing_changes_nothing():
    """All microbatches masked: k copies of the old state, and weights that are all zero."""
    params, state = jaxbn.bn_init(2, mean=1.0, var=2.0)
    masked = partial(jaxbn.bn_apply, params, state, train=True, mask=np.zeros((2, 1), bool))
    seen = jax.vmap(lambda x: masked(x=x)[1])(MICRO)
    chex.assert_trees_all_close(jaxbn.pool_updates(seen), state)
    chex.assert_trees_all_close(jaxbn.pool_updates(seen, weights=np.zeros(4, np.float32)), state)
    assert jaxbn.pool_updates({}) == {}


@pytest.mark.parametrize(
    ("states", "kwargs", "message"),
    [
        ({"mean": np.zeros((4, 2))}, {}, "mean and var"),
        ({"mean": np.zeros((4, 2)), "var": np.zeros((3, 2))}, {}, "leading axis"),
        ({"mean": np.zeros((4, 2)), "var": np.zeros((4, 2)), "scale": np.zeros((4, 2))}, {}, "scale"),
        ({"mean": np.zeros((4, 2)), "var": np.zeros((4, 2))}, {"weights": np.ones(3)}, "one for each"),
        ({"mean": np.zeros((4, 2)), "var": np.zeros((4, 2))}, {"momentum": 1.0}, r"in \[0, 1\)"),
        ({"mean": np.zeros((4, 2)), "var": np.zeros((4, 2))}, {"momentum": jaxbn.cumulative_average}, "count"),
    ],
    ids=["no var", "lengths", "a stranger", "weights", "momentum", "no count"],
)
def test_pooling_refuses_wrong_states(states, kwargs, message):
    with pytest.raises(ValueError, match=message):
        jaxbn.pool_updates(states, **kwargs)


def finite(tree):
    """Return whether all of it is."""
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


@pytest.mark.parametrize("overflow", [False, True])
def test_a_skipped_step_leaves_everything(overflow):
    """Flax's imagenet example restores parameters and optimizer and keeps the statistics (pytorch/pytorch#90342).

    Here the batch and its statistics are finite, and only the scaled gradients are not: the step must select.
    """
    net = Net()
    variables = net.init(KEY, X)
    optimizer = optax.adam(0.1)
    before = (variables["params"], variables["batch_stats"], optimizer.init(variables["params"]))

    @jax.jit
    def step(training, x, scale):
        params, stats, memory = training

        def loss(params):
            y, new = net.apply({"params": params, "batch_stats": stats}, x, mutable=STATS)
            return scale * jnp.mean(y**2), new["batch_stats"]

        grads, new_stats = jax.grad(loss, has_aux=True)(params)
        updates, new_memory = optimizer.update(jax.tree.map(lambda g: g / scale, grads), memory, params)
        stepped = (optax.apply_updates(params, updates), new_stats, new_memory)
        return jax.tree.map(partial(jnp.where, finite(grads)), stepped, training)

    after = step(before, X, jnp.float32(jnp.inf if overflow else 1024.0))
    chex.assert_tree_all_finite(after)
    changed = [not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True)]
    # The first dense layer's bias has no gradient: the normalization takes it out again.
    assert not any(changed) if overflow else sum(changed) >= len(changed) - 3


def test_a_skipped_step_in_the_functions():
    """`update` cancels it where the state is made, by a flag that only the program knows."""
    params, state = jaxbn.bn_init(2)
    step = jax.jit(lambda keep: jaxbn.bn_apply(params, state, X, True, update=keep)[1])
    chex.assert_trees_all_equal(step(jnp.array(False)), state)
    assert step(jnp.array(True)).count == 1


def test_a_skipped_step_in_nnx():
    """Keep a copy, step, select: statistics, parameters and optimizer by one rule."""
    model = jaxbn.nnx.convert(Deep(), momentum=jaxbn.zero_debiased(0.9))
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, scale):
        before = nnx.clone(nnx.state((model, optimizer)))
        grads = nnx.grad(lambda model: scale * jnp.mean(model(X) ** 2))(model)
        optimizer.update(model, jax.tree.map(lambda g: g / scale, grads))
        after = nnx.state((model, optimizer))
        nnx.update((model, optimizer), jax.tree.map(partial(jnp.where, finite(grads)), after, before))

    before = nnx.to_pure_dict(nnx.state((model, optimizer)))
    step(model, optimizer, jnp.float32(jnp.inf))
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state((model, optimizer))), before)
    step(model, optimizer, jnp.float32(8.0))
    assert (model.alpha.count[...], model.tied.count[...]) == (2, 1)
