"""`jit` over sharded arguments, on Auto and on Explicit meshes: by rows, by features, or by both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from device_cases import CASES, PLAIN, Case, arguments, counted
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from params import param
from ways import AXIS, assert_close, mesh_of

import jaxbn
from experiments.compiled.counting import count_collectives

PARAMS, STATE = jaxbn.bn_init(3)
RNG = np.random.default_rng(0)

# Quick are all pairs: each of two things in two states, four of the eight.
SHARDINGS = [
    param(over, spec, kind, quick=(over == P(), spec == P("data"), kind is AxisType.Auto).count(True) % 2 == 1, id=id)
    for id, over, spec, kind in (
        (f"{p}-{x}-{kind.name}", over, spec, kind)
        for p, over in (("params", P("model")), ("params-not", P()))
        for x, spec in (("x-too", P("data", "model")), ("x-not", P("data")))
        for kind in (AxisType.Auto, AxisType.Explicit)
    )
]


@pytest.mark.parametrize(("over", "spec", "kind"), SHARDINGS)
@pytest.mark.parametrize("name", [pytest.param("plain", marks=pytest.mark.slow), "mask-nan"])
def test_sharded_features(name, over, spec, kind):
    """The state comes back sharded as it went in, with x or parameters or both sharded over a model axis."""
    case = CASES[name]
    x = np.concatenate([case.x, 3 * case.x[:, :1]], 1)
    whole, _ = arguments(Case(x))
    mesh = mesh_of(kind, (4, 2), ("data", "model"))
    plain = (whole["params"], whole["state"], x, *(() if case.mask is None else (case.mask,)))
    vector = NamedSharding(mesh, over)
    with jax.set_mesh(mesh):
        params = jax.device_put(whole["params"], vector)
        state = jax.device_put(whole["state"], jaxbn.BatchNormState(vector, vector, NamedSharding(mesh, P())))  # type: ignore[arg-type]
        shared = [jax.device_put(plain[2], NamedSharding(mesh, spec))]
        shared += [jax.device_put(m, NamedSharding(mesh, P("data"))) for m in plain[3:]]
        got = PLAIN(params, state, *shared)
    wanted = PLAIN(*plain)
    # Under Auto the compiler chooses where the program does not say: where neither is sharded by features, or both.
    for new, old in ((got[1], state), (got[2], params)) if kind is AxisType.Explicit or over != P() else ():
        for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.sharding, b.sharding)
    assert_close(got[1:3], wanted[1:3])
    assert_close(*(counted([v[0], v[3]], case.mask) for v in (got, wanted)))


def test_a_sharded_axis_of_an_explicit_mesh_can_be_mapped():
    """Each member has statistics of its own; nothing inside may be a constant that knows no mesh."""
    mesh = mesh_of(AxisType.Explicit, (4,))
    x = np.random.default_rng(0).normal(3, 2, (4, 8, 3)).astype(np.float32)
    params, state = jaxbn.bn_init(3)

    def step(params, x):
        def loss(params, x):
            y, new = jaxbn.bn_apply(params, state, x, True, activation=jax.nn.relu)
            return jnp.sum(y * y), new

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    wanted = [step(params, part) for part in x]
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, P(*mesh.axis_names)))
        found = jax.jit(jax.vmap(step, in_axes=(None, 0), spmd_axis_name=mesh.axis_names[0]))(params, placed)
    for got, want in zip(
        jax.tree.leaves(found), jax.tree.leaves(jax.tree.map(lambda *v: np.stack(v), *wanted)), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.compiler
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_accumulation_over_a_sharded_batch_moves_nothing(kind):
    mesh = mesh_of(kind)
    x = RNG.normal(1, 2, (64, 3)).astype(np.float32)

    @jax.jit
    def accumulated(x):
        placed = {"out_sharding": P(AXIS)} if kind == AxisType.Explicit else {}
        micro = jnp.swapaxes(jnp.reshape(x, (16, 4, 3), **placed), 0, 1)
        states = jax.lax.map(lambda part: jaxbn.bn_apply(PARAMS, STATE, part, True)[1], micro)
        return jaxbn.pool_updates(states)

    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, jax.NamedSharding(mesh, P(AXIS)))
        assert set(count_collectives(accumulated.lower(sharded).compile().as_text())) == {"all-reduce"}
        got = accumulated(sharded)
    wanted = jaxbn.bn_apply(PARAMS, STATE, x, True)[1]
    np.testing.assert_allclose(got.mean, wanted.mean, atol=1e-6)
    np.testing.assert_allclose(got.var, wanted.var, rtol=1e-5)
