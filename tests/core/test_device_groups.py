"""Groups of members, by `axis_index_groups`: each equals one device on its part of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from device_cases import CASES, FEATURES, LOCAL, MASK, Case, X, arguments, assert_equals_numpy, counted, shards, step
from params import param
from ways import AXIS, MEMBERS, NAMED, ONE, QUICK, Way, assert_close, assert_replicated, each_named_way, vmap_way

import jaxbn

GROUPS = {
    "strided": [[0, 2, 4, 6], [1, 3, 5, 7]],
    "uneven": [[3], [6, 1], [0, 7, 2, 5, 4]],
    "alone": [[i] for i in range(MEMBERS)],
}

STEP = jax.jit(step(ONE))


def compare_groups(way: Way, groups, case: Case, rtol: float = 0.0) -> None:
    """Each group of members equals one device on that group's part of the batch."""
    whole, parts = arguments(case)
    grouped = step(way, axis_index_groups=groups)

    def member(whole, parts):
        out, shared = grouped(whole, parts)
        # Groups differ in their state: it comes back one row a member.
        return out | {"state": jax.tree.map(lambda v: v[None], shared["state"])}, shared["params"]

    got, d_params = way.run(member, whole, parts)
    split = {name: v.reshape(way.members, -1, *v.shape[1:]) for name, v in parts.items()}
    total, one_device = jax.tree.map(jnp.zeros_like, whole["params"]), STEP
    for group in groups:
        mine = {name: v[group].reshape(-1, *v.shape[2:]) for name, v in split.items()}
        wanted, shared = one_device(whole, mine)
        total = jax.tree.map(jnp.add, total, shared["params"])
        for member_index in group:
            assert_close(jax.tree.map(lambda v, i=member_index: v[i], got["state"]), shared["state"], rtol=rtol)
        for name in ("y", "x", "residual"):
            v = np.asarray(got[name])
            v = v.reshape(way.members, -1, *v.shape[1:])[group].reshape(wanted[name].shape)
            assert_close(*(counted(u, mine.get("mask")) for u in (v, wanted[name])))
    assert_close(d_params, total)


GROUPS_AND_WAYS = [
    param(
        case,
        groups,
        way,
        quick=case == "mask-nan" and (groups == "uneven" or way.name in QUICK),
        id=f"{case}-{groups}-{way.name}",
    )
    for case in ("plain", "mask-nan")
    for groups in GROUPS
    for way in NAMED
]


@pytest.mark.parametrize(("name", "groups", "way"), GROUPS_AND_WAYS)
def test_groups(name, groups, way):
    """`axis_index_groups`, of equal and unequal sizes, with and without unequal masks."""
    compare_groups(way, GROUPS[groups], CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("groups", [None, [range(10), range(10, 75), range(75, 80)]], ids=["all", "groups"])
def test_eighty_members(groups):
    """Beyond the 64 rows of one collective, pooling takes two; it keeps its digits at a mean of 1e4."""
    way = vmap_way(80)
    x = shards(160, 80) + np.float32(1e4)
    mask = np.arange(160)[:, None] % 5 > 1
    case = Case(np.where(mask, x, np.nan).astype(np.float32), mask)
    if groups is not None:
        return compare_groups(way, groups, case, rtol=1e-6)
    (parts, shared), (wanted_parts, wanted) = (w.run(step(w), *arguments(case)) for w in (way, ONE))
    assert_equals_numpy(case, parts, shared["state"], rtol=1e-6)
    assert_close(shared, wanted, rtol=1e-6)
    assert_close(counted(parts, mask), counted(wanted_parts, mask))


@each_named_way
def test_pool_named(way):
    """`moments` of each member's rows, pooled over the axis, are those of all rows, and every member has them."""

    def member(whole, parts):
        mine = jaxbn.moments(parts["x"], mask=parts["mask"])
        groups = jaxbn.pool_named(mine, AXIS, [[0, 1, 2], [3, 4, 5, 6, 7]])
        return jax.tree.map(lambda v: v[None], groups), jaxbn.pool_named(mine, [AXIS])

    case = CASES["mask-nan"]
    groups, pooled = way.run(member, *arguments(case))
    assert_replicated(pooled)
    groups, pooled = jax.tree.map(np.asarray, (groups, pooled))
    everything = slice(None), pooled
    first, last = (
        (rows, jax.tree.map(lambda v, i=i: v[i], groups))
        for i, rows in ((0, slice(None, 3 * LOCAL)), (7, slice(3 * LOCAL, None)))
    )
    for rows, got in (everything, first, last):
        x = X[rows][MASK[rows, 0]].astype(np.float64)
        np.testing.assert_allclose(got.count, np.full(FEATURES, len(x)))
        np.testing.assert_allclose(got.mean.astype(np.float64) + got.tail, x.mean(0), rtol=0, atol=1e-5)
        np.testing.assert_allclose(got.var, x.var(0), rtol=0, atol=1e-5)


RNG = np.random.default_rng(0)

LARGE = [((2, 2, 2, 32), (1, 2, 3, 4), jnp.float32), ((2, 2, 32), (1, 2, 3), jnp.complex64)]


@pytest.mark.parametrize(("features", "axis", "dtype"), LARGE)
def test_groups_of_many_feature_axes(features, axis, dtype):
    """They crashed the process with JAX 0.10."""
    params, state = jaxbn.bn_init(features, dtype=dtype)
    x = jnp.asarray(RNG.normal(size=(5, 1, *features)), dtype)

    def layer(x):
        groups = [[0], [1, 2, 3, 4]]
        return jaxbn.bn_apply(params, state, x, True, axis=axis, axis_name="d", axis_index_groups=groups)[0]

    y = jax.vmap(layer, axis_name="d")(x)
    wanted = jaxbn.bn_apply(params, state, x[1:, 0], True, axis=axis)[0]
    np.testing.assert_allclose(y[1:, 0], wanted, atol=2e-6)
    np.testing.assert_array_equal(y[0], 0)


def test_moments_of_many_axes_in_groups():
    m = jaxbn.moments(RNG.normal(size=(5, 2, 2, 2, 2, 32)).astype(np.float32), axis=(0, 1, 2, 3, 4, 5))
    pooled = jax.vmap(lambda m: jaxbn.pool_named(m, "d", [[0], [1, 2, 3, 4]]), axis_name="d")(m)
    np.testing.assert_allclose(pooled.mean[1], np.mean(m.mean[1:], 0), rtol=1e-5, atol=1e-6)
