"""Layers over several axes: `shard_map` over a mesh of two, and with a `vmap` inside or around."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from device_cases import CASES, LOCAL, PLAIN, ROWS, Case, arguments, counted, each_check, shards, train_step
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from ways import AXIS, assert_close, assert_replicated, mesh_of

import jaxbn

PARAMS, STATE = jaxbn.bn_init(3)
RNG = np.random.default_rng(0)
X = RNG.normal(2, 3, (16, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("names", "check_vma"), [(("rows", "columns"), True), (["columns", "rows"], False)], ids=["tuple", "list"]
)
def test_two_axes(names, check_vma):
    """One layer over the product of two mesh axes, with groups and without; a list of names is as good as a tuple."""
    whole, parts = arguments(CASES["mask-nan"])
    args = whole["params"], whole["state"], parts["x"], parts["mask"]
    spec = P(tuple(names))

    def member(params, state, x, mask):
        y, new, d_params, d_x = train_step(names, params, state, x, mask)
        return y, new, d_params if check_vma else lax.psum(d_params, names), d_x

    mesh = mesh_of(AxisType.Auto, (2, 4), ("rows", "columns"))
    run = jax.shard_map(
        member, mesh=mesh, in_specs=(P(), P(), spec, spec), out_specs=(spec, P(), P(), spec), check_vma=check_vma
    )
    got = jax.jit(run)(*args)
    assert_replicated(got[1])
    assert_close(got, PLAIN(*args))

    def grouped(params, state, x, mask):
        groups = [[0, 1, 2], [3, 4, 5, 6, 7]]
        y, _ = jaxbn.bn_apply(params, state, x, True, mask=mask, axis_name=names, axis_index_groups=groups)
        return y

    run = jax.shard_map(grouped, mesh=mesh, in_specs=(P(), P(), spec, spec), out_specs=spec, check_vma=check_vma)
    y = jax.jit(run)(*args)
    for rows in (slice(None, 3 * LOCAL), slice(3 * LOCAL, None)):
        x, mask = parts["x"][rows], parts["mask"][rows]
        wanted, _ = jaxbn.bn_apply(*args[:2], x, True, mask=mask)
        assert_close(counted(y[rows], mask), counted(wanted, mask))


@each_check
@pytest.mark.parametrize("over", ["features", "rows"])
def test_one_axis_of_two(over, check_vma):
    """Statistics over one mesh axis; the other holds other features, or another part of the batch with its own."""
    x = shards(features=4)
    params, state = arguments(Case(x))[0].values()
    split = over == "features"
    vector, spec = (P("model"), P("data", "model")) if split else (P(), P(("model", "data")))
    old_spec: Any = jaxbn.BatchNormState(vector, vector, P())  # type: ignore[arg-type]

    def member(params, state, x):
        y, new, d_params, d_x = train_step("data", params, state, x)
        if not check_vma:
            d_params = lax.psum(d_params, "data" if split else ("data", "model"))
        # Which features take part is for each to know; that their counts agree is for the caller.
        new = new._replace(count=lax.pmax(new.count, "model")) if split else jax.tree.map(lambda v: v[None], new)
        return y, new, d_params, d_x

    mesh = mesh_of(AxisType.Auto, (4, 2), ("data", "model"))
    ins, outs = (vector, old_spec, spec), (spec, old_spec if split else P("model"), vector, spec)
    run = jax.shard_map(member, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=check_vma)
    got = jax.jit(run)(params, state, x)
    if split:
        assert_close(got, PLAIN(params, state, x))
        return
    halves = [PLAIN(params, state, half) for half in (x[: ROWS // 2], x[ROWS // 2 :])]
    wanted = [jax.tree.map(lambda *v: np.concatenate(v), *(half[i] for half in halves)) for i in (0, 3)]
    states = jax.tree.map(lambda *v: jnp.stack(v), *(half[1] for half in halves))
    total = jax.tree.map(jnp.add, *(half[2] for half in halves))
    assert_close((got[0], got[1], got[2], got[3]), (wanted[0], states, total, wanted[1]))


def test_an_axis_of_vmap_inside_shard_map_is_refused():
    def inner(x):
        return jax.vmap(lambda x: jaxbn.bn_apply(PARAMS, STATE, x, True, axis_name="v")[0], axis_name="v")(x)

    mapped = partial(jax.shard_map, inner, mesh=mesh_of(AxisType.Auto), in_specs=P(AXIS), out_specs=P(AXIS))
    with pytest.raises(ValueError, match="check_vma=False"):
        jax.jit(mapped(check_vma=True))(X.reshape(8, 2, 3))
    y = jax.jit(mapped(check_vma=False))(X.reshape(8, 2, 3))
    wanted = jnp.stack([jaxbn.bn_apply(PARAMS, STATE, x[:, None], True)[0][:, 0] for x in X.reshape(8, 2, 3)])
    assert y.shape == wanted.shape


def over_two_meshes(f, check_vma, kind=AxisType.Auto):
    """Map `f`, which runs on four devices, over two groups of devices."""
    mesh = mesh_of(kind, (2, 4), ("groups", AXIS))
    members = jax.shard_map(f, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=check_vma)
    run = jax.jit(jax.vmap(members, spmd_axis_name="groups"))
    return lambda x: run(jax.device_put(x, NamedSharding(mesh, P("groups", AXIS))))


@pytest.mark.parametrize(("kind", "check_vma"), [(AxisType.Auto, False), (AxisType.Explicit, True)], ids=str)
def test_shard_map_runs_under_vmap_with_an_axis_of_the_mesh(kind, check_vma):
    def gradient(x):
        return jax.grad(lambda x: jnp.sum(jaxbn.bn_apply(PARAMS, STATE, x, True, axis_name=AXIS)[0] ** 3))(x)

    dx = over_two_meshes(gradient, check_vma, kind)(X.reshape(2, 8, 3))
    for found, x in zip(dx, X.reshape(2, 8, 3), strict=True):
        y = oracle.training(x).y
        np.testing.assert_allclose(found, oracle.gradients(x, 3 * y**2)[0], atol=1e-5)


def test_jax_does_not_type_a_choice_by_platform_under_such_a_vmap():
    """The limit in `docs/devices.md`: no layer of ours, nor a constant; JAX alone."""

    def alone(x):
        return jax.lax.platform_dependent(x, default=lambda x: x + jnp.mean(x, 0, keepdims=True))

    assert over_two_meshes(alone, check_vma=False)(X.reshape(2, 8, 3)).shape == (2, 8, 3)
    with pytest.raises(ValueError, match="requires varying manual axes to match"):
        over_two_meshes(alone, check_vma=True)(X.reshape(2, 8, 3))


@pytest.mark.parametrize("ghost_batches", [1, 8])
@pytest.mark.parametrize("other", [AxisType.Auto, AxisType.Explicit])
def test_shard_map_over_some_axes_of_a_mesh(other, ghost_batches):
    """The other axes are left to the compiler. JAX makes no array there of a type that names no mesh."""
    mesh = jax.make_mesh((4, 2), ("rows", "columns"), axis_types=(AxisType.Auto, other))
    layer = partial(jaxbn.bn_apply, PARAMS, STATE, train=True, activation=jnp.tanh, ghost_batches=ghost_batches)
    weights = RNG.normal(size=X.shape).astype(np.float32)

    def value(run, x):
        y, new = run(x)
        return jnp.sum(y * weights), (y, new)

    mapped = jax.shard_map(
        partial(layer, axis_name="rows"), mesh=mesh, in_specs=P("rows"), out_specs=(P("rows"), P()), axis_names={"rows"}
    )
    got, wanted = (jax.jit(jax.grad(partial(value, run), has_aux=True))(X) for run in (mapped, layer))
    assert_close(got, wanted)
