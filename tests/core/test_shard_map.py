"""`shard_map` with `scan`, `checkpoint` and `vmap` inside, and with input that all members hold."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from device_cases import CASES, FEATURES, ROWS, Case, X, arguments, each_check, shards, train_step
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from ways import AXIS, ONE, assert_close, assert_replicated, mesh_of, shard_map_way

import jaxbn


@each_check
def test_scan_of_steps(check_vma):
    """The state is a carry of `lax.scan` inside `shard_map`: it goes in and comes out of one type, replicated."""
    way = shard_map_way(check_vma)
    whole, parts = arguments(Case(X))
    scales = np.linspace(0.5, 2, 3, dtype=np.float32)

    def member(axis_name, whole, parts):
        def body(state, scale):
            x, momentum = parts["x"] * scale, jaxbn.zero_debiased(0.9)
            _, new = jaxbn.bn_apply(whole["params"], state, x, True, momentum=momentum, axis_name=axis_name)
            return new, new.mean

        state, means = lax.scan(body, whole["state"], scales)
        return {}, (state, means)

    got, wanted = (w.run(partial(member, w.axis_name), whole, parts)[1] for w in (way, ONE))
    assert_replicated(got)
    assert_close(got, wanted)
    assert got[0].count == 3


@each_check
def test_checkpointed_layer(check_vma):
    """Under `jax.checkpoint` the layer runs twice; gradients are the same, and the state is updated once."""
    whole, parts = arguments(CASES["mask-nan"])

    def member(way, whole, parts):
        @jax.checkpoint
        def layer(params, x):
            return jaxbn.bn_apply(params, whole["state"], x, True, mask=parts["mask"], axis_name=way.axis_name)

        def loss(params, x):
            y, new = layer(params, x)
            return jnp.sum(jnp.where(parts["mask"], jnp.sin(y) * parts["cotangent"], 0)), new

        (d_params, d_x), new = jax.grad(loss, argnums=(0, 1), has_aux=True)(whole["params"], parts["x"])
        return {"x": d_x}, (way.total(d_params), new)

    way = shard_map_way(check_vma)
    got, wanted = way.run(partial(member, way), whole, parts), ONE.run(partial(member, ONE), whole, parts)
    assert_replicated(got[1])
    assert_close(got, wanted)
    assert got[1][1].count == 1


@pytest.mark.parametrize(("pooled", "check_vma"), [(False, True), (False, False), (True, False)])
def test_ensemble(pooled, check_vma):
    """`vmap` over an ensemble inside `shard_map`: by a name of its own, its models may pool with each other as well.

    The latter without `check_vma` alone: with it JAX itself sums over no name of an inner `vmap`.
    """
    x = shards(2 * ROWS).reshape(2, ROWS, FEATURES) * np.array([1, 3], np.float32)[:, None, None]
    state = arguments(Case(X))[0]["state"]
    stacked = [jax.tree.map(lambda v: jnp.stack([v, 2 * v]), p) for p in (arguments(Case(X))[0]["params"], state)]

    def member(params, state, x):
        names = (AXIS, "ensemble") if pooled else AXIS
        return jax.vmap(partial(train_step, names), axis_name="ensemble")(params, state, x)[:2]

    mesh = mesh_of(AxisType.Auto)
    ins, outs = (P(), P(), P(None, AXIS)), (P(None, AXIS), P())
    got = jax.jit(jax.shard_map(member, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=check_vma))(*stacked, x)
    assert_replicated(got[1])
    for i in range(2):
        params, state = (jax.tree.map(lambda v, i=i: v[i], tree) for tree in stacked)
        # Pooled, each model normalizes the values of both by its own parameters.
        y, new, _, _ = train_step(None, params, state, x if pooled else x[i])
        assert_close([got[0][i], jax.tree.map(lambda v, i=i: v[i], got[1])], [y[i] if pooled else y, new])


@each_check
def test_replicated_input(check_vma):
    """Members that all hold the same batch: the statistics and gradients of that batch, counted once a member."""

    def member(whole, parts):
        def loss(x):
            y, new = jaxbn.bn_apply(whole["params"], whole["state"], x, True, axis_name=AXIS)
            return jnp.sum(y * whole["cotangent"]), (y, new)

        d_x, (y, new) = jax.grad(loss, has_aux=True)(whole["x"])
        return {}, (y, new, d_x)

    whole, parts = arguments(Case(X))
    whole |= {name: parts[name] for name in ("x", "cotangent")}
    _, got = shard_map_way(check_vma).run(member, whole, {})
    y, new, _, _ = train_step(None, whole["params"], whole["state"], X)
    y, new = jaxbn.bn_apply(whole["params"], whole["state"], X, True)
    d_x = jax.grad(lambda x: jnp.sum(jaxbn.bn_apply(whole["params"], whole["state"], x, True)[0] * whole["cotangent"]))
    assert_replicated(got)
    assert_close(got, (y, new, d_x(X)))
