"""Recurrent batch normalization on many devices and over microbatches, against one device with the whole batch."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from lstm_oracle import KEEP, PARTS, ROWS, TRAIN, XS, model, run
from ways import assert_close, each_way, shard_map_way

import jaxbn


def member(name, total):
    def one(whole, parts):
        def loss(params):
            xs = jnp.moveaxis(parts["xs"], 1, 0)
            _, ys, state = run(params, whole["state"], xs, True, parts["lengths"], axis_name=name)
            ys = jnp.moveaxis(ys, 0, 1)
            return jnp.sum(ys * parts["g"]), (ys, state)

        gradients, (ys, state) = jax.grad(loss, has_aux=True)(whole["params"])
        return ys, (state, total(gradients))

    return one


@pytest.fixture(scope="module")
def one_device():
    params, state = model()
    return jax.jit(member(None, lambda g: g))({"params": params, "state": state}, PARTS)


@pytest.mark.slow
@each_way
def test_eight_devices_equal_one(way, one_device):
    """Outputs, states and gradients, with sequences that have ended on whole devices and NaN after them."""
    params, state = model()
    got = way.run(member(way.axis_name, way.total), {"params": params, "state": state}, PARTS)
    assert_close(got, one_device, atol=1e-5)
    assert got[1][0].cell_norm.count.tolist() == [1, 1, 1, 2]


@pytest.mark.slow
def test_each_device_its_own():
    """Statistics differ between devices without an axis name, which `shard_map` knows, and each is as if alone."""
    params, state = model()

    def alone(whole, parts):
        _, ys, after = run(whole["params"], whole["state"], jnp.moveaxis(parts["xs"], 1, 0), True, parts["lengths"])
        return (jnp.moveaxis(ys, 0, 1), jax.tree.map(lambda v: v[None], after)), ()

    (ys, states), _ = shard_map_way(True).run(alone, {"params": params, "state": state}, PARTS)
    for i in (0, 5):
        own = jax.tree.map(lambda v, i=i: v[2 * i : 2 * i + 2], PARTS)
        (y, after), _ = alone({"params": params, "state": state}, own)
        assert_close(ys[2 * i : 2 * i + 2], y, atol=2e-5)
        assert_close(jax.tree.map(lambda v, i=i: v[i], states), jax.tree.map(lambda v: v[0], after), atol=2e-5)


@pytest.mark.slow
def test_microbatches_pool_to_the_whole_batch():
    """The statistics of the inputs do not pass through h, so their update by parts is exactly that of the whole."""
    params, state = model()
    parts = [TRAIN(params, state, XS[:, at])[2] for at in (slice(0, 3), slice(3, 6))]
    pooled = jaxbn.pool_updates(jax.tree.map(lambda *v: jnp.stack(v), *parts), KEEP)
    whole = TRAIN(params, state, XS)[2]
    kept = slice(ROWS - 1)  # the last row has had two updates in one pass, which do not pool
    for got, wanted in zip(pooled.input_norm, whole.input_norm, strict=True):
        assert_close(got[kept], wanted[kept], atol=2e-6)


@pytest.mark.parametrize("kind", ["an Explicit mesh", "shard_map over some axes"])
def test_meshes_that_the_state_does_not_know(kind):
    """The state was made before the mesh; or the compiler handles an axis of it, and arrays name none."""
    params, state = model()
    explicit, xs = kind == "an Explicit mesh", jnp.nan_to_num(jnp.moveaxis(PARTS["xs"], 1, 0))
    mesh = jax.make_mesh((4, 2), ("data", "other"), axis_types=(AxisType.Explicit if explicit else AxisType.Auto,) * 2)

    def apply(params, state, xs, axis_name=None):
        return run(params, state, xs, True, None, axis_name=axis_name)[1:]

    if explicit:
        with jax.set_mesh(mesh):
            got = jax.jit(apply)(params, state, jax.device_put(xs, P(None, "data")))
    else:
        one, spec = partial(apply, axis_name="data"), P(None, "data")
        specs = {"in_specs": (P(), P(), spec), "out_specs": (spec, P()), "axis_names": {"data"}}
        got = jax.jit(jax.shard_map(one, mesh=mesh, **specs))(params, state, xs)
    assert_close(got, jax.jit(apply)(params, state, xs), atol=1e-5)
