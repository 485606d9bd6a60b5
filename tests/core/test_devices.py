"""Eight devices equal one: value, new state and every gradient, in every way to run on several devices."""

from functools import cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from params import param
from ways import (
    AXIS,
    MEMBERS,
    NAMED,
    ONE,
    QUICK,
    WAYS,
    Way,
    assert_close,
    assert_replicated,
    each_named_way,
    each_way,
    mesh_of,
    shard_map_way,
    vmap_way,
)

import jaxbn

ROWS, FEATURES = 32, 3
LOCAL = ROWS // MEMBERS
# How many of its rows each member counts: none, all, and different numbers between.
COUNTED = np.arange(LOCAL)[None, :] < np.array([0, 1, 4, 2, 3, 1, 4, 2])[:, None]
each_check = pytest.mark.parametrize("check_vma", [True, False])


def shards(rows: int = ROWS, members: int = MEMBERS, features: int = FEATURES, seed: int = 0) -> np.ndarray:
    """Values of unit spread whose mean grows from 0 on the first member to 14 on the last."""
    offset = np.linspace(0, 14, members)[:, None, None]
    values = np.random.default_rng(seed).standard_normal((members, rows // members, features)) + offset
    return values.reshape(rows, features).astype(np.float32)


X = shards()
MASK = COUNTED.reshape(ROWS, 1)
FEATURE_MASK = np.stack([np.roll(MASK[:, 0], 5 * i) for i in range(FEATURES)], 1)


class Case(NamedTuple):
    """An input, what counts of it, and options of `bn_apply`. `traced`: `train` is data rather than program."""

    x: np.ndarray
    mask: np.ndarray | None = None
    train: bool = True
    traced: bool = False
    options: dict[str, Any] = {}  # noqa: RUF012 (never written)


CASES = {
    "plain": Case(X),
    "mask-nan": Case(np.where(MASK, X, np.nan).astype(np.float32), MASK),
    "mask-inf": Case(np.where(MASK, X, -np.inf).astype(np.float32), MASK),
    "mask-huge": Case(np.where(MASK, X, 3e38).astype(np.float32), MASK),
    "mask-per-feature": Case(np.where(FEATURE_MASK, X, np.nan).astype(np.float32), FEATURE_MASK),
    "mask-all": Case(np.full_like(X, np.nan), np.zeros((ROWS, 1), bool)),
    "activation": Case(X, options={"activation": jax.nn.relu}),
    "unbiased": Case(np.where(MASK, X, np.nan).astype(np.float32), MASK, options={"unbiased_running_var": True}),
    "no-update": Case(X, options={"update": False}),
    "traced-train": Case(X, MASK, traced=True),
    "traced-evaluate": Case(X, MASK, train=False, traced=True),
    "one-row-each": Case(shards(MEMBERS)),
    "no-rows": Case(np.zeros((0, FEATURES), np.float32)),
    "no-features": Case(np.zeros((ROWS, 0), np.float32)),
}


def arguments(case: Case) -> tuple[dict, dict]:
    """Return the arrays that every member has, and those that are split over them."""
    rng = np.random.default_rng(1)
    width = case.x.shape[1]
    scale, bias, mean = rng.standard_normal((3, width)).astype(np.float32)
    params, state = jaxbn.bn_init(width, scale=scale, bias=bias, mean=mean, var=2.0)
    parts = {name: rng.standard_normal(case.x.shape).astype(np.float32) for name in ("residual", "cotangent")}
    parts |= {"x": case.x} | ({} if case.mask is None else {"mask": case.mask})
    return {"params": params, "state": state} | ({"train": np.asarray(case.train)} if case.traced else {}), parts


def step(way: Way, train: bool = True, **options):
    """Return a member function: value, new state and gradients of one layer."""

    def member(whole, parts):
        def loss(params, x, residual):
            y, state = jaxbn.bn_apply(
                params,
                whole["state"],
                x,
                whole.get("train", train),
                momentum=0.9,
                axis_name=way.axis_name,
                mask=parts.get("mask"),
                residual=residual,
                **options,
            )
            terms = y.astype(jnp.float32) * parts["cotangent"]
            return jnp.sum(jnp.where(parts["mask"], terms, 0) if "mask" in parts else terms), (y, state)

        of = (whole["params"], parts["x"], parts["residual"])
        (d_params, d_x, d_residual), (y, state) = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*of)
        return {"y": y, "x": d_x, "residual": d_residual}, {"params": way.total(d_params), "state": state}

    return member


STEP = jax.jit(step(ONE))


@cache
def on_one_device(name: str) -> tuple[Any, Any]:
    """Return the answer on the whole batch, with `train` a Python bool."""
    case = CASES[name]
    whole, parts = arguments(case)
    whole.pop("train", None)
    return ONE.run(step(ONE, case.train, **case.options), whole, parts)


def counted(parts: Any, mask: np.ndarray | None) -> Any:
    """`parts` with what does not count set to 0: what padding is normalized to is not compared."""
    return parts if mask is None else jax.tree.map(lambda v: np.where(mask, v, np.zeros((), v.dtype)), parts)


# Two cases in every way, every case in two ways; the rest is slow.
CASES_AND_WAYS = [
    param(name, way, quick=way.name in QUICK or name in ("plain", "mask-nan"), id=f"{name}-{way.name}")
    for name in CASES
    for way in WAYS
]


@pytest.mark.parametrize(("name", "way"), CASES_AND_WAYS)
def test_equals_one_device(name, way):
    """Value, state and gradients are those of one device on the whole batch; the state is replicated."""
    case = CASES[name]
    parts, shared = way.run(step(way, case.train, **case.options), *arguments(case))
    wanted_parts, wanted = on_one_device(name)
    assert_replicated(shared)
    assert_close(shared, wanted)
    assert_close(counted(parts, case.mask), counted(wanted_parts, case.mask))
    assert all(np.all(np.isfinite(v)) for v in jax.tree.leaves(parts)), "what the mask hides must stay harmless"


def in_numpy(case: Case) -> tuple[np.ndarray, tuple]:
    """y and the new state in float64."""
    whole, parts = arguments(case)
    mask = np.broadcast_to(True if case.mask is None else case.mask, case.x.shape)
    x = np.where(mask, case.x, 0).astype(np.float64)
    n = mask.sum(0)
    scale, bias, old_mean, old_var, old_count = (np.asarray(v, np.float64) for v in (*whole["params"], *whole["state"]))
    mean = x.sum(0) / np.maximum(n, 1)
    var = (np.where(mask, x - mean, 0) ** 2).sum(0) / np.maximum(n, 1)
    used = (mean, var) if case.train else (old_mean, old_var)
    y = (x - used[0]) / np.sqrt(used[1] + 1e-5) * scale + bias + parts["residual"]
    y = np.maximum(y, 0) if "activation" in case.options else y
    if case.options.get("unbiased_running_var"):
        var = var * n / np.maximum(n - 1, 1)
    takes_part = (n > 0) & case.train & case.options.get("update", True)
    kept = [np.where(takes_part, 0.9 * o + 0.1 * b, o) for o, b in ((old_mean, mean), (old_var, var))]
    return np.where(mask, y, 0), (*kept, old_count + np.any(takes_part))


def assert_equals_numpy(case: Case, parts: Any, state: Any, rtol: float = 0.0) -> None:
    """y and state are those of float64 NumPy."""
    y, wanted = in_numpy(case)
    np.testing.assert_allclose(counted(parts["y"], case.mask), y, rtol=0, atol=2e-5)
    for a, b in zip(state, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=rtol)


@pytest.mark.parametrize("name", CASES)
def test_one_device_equals_numpy(name):
    """The answer that all others are compared with is itself right."""
    parts, shared = on_one_device(name)
    assert_equals_numpy(CASES[name], parts, shared["state"])


@each_way
def test_bfloat16(way):
    """Half of the precision is in x and y alone: the state agrees to float32, y and x's gradient to one rounding."""
    whole, parts = arguments(Case(X, MASK))
    parts |= {name: jnp.asarray(parts[name], jnp.bfloat16) for name in ("x", "residual")}
    (got_parts, got), (wanted_parts, wanted) = (w.run(step(w), whole, parts) for w in (way, ONE))
    assert_replicated(got)
    assert_close(got, wanted)
    assert_close(got_parts, wanted_parts, rtol=2**-7, atol=1e-6)
    assert got_parts["y"].dtype == got_parts["x"].dtype == jnp.bfloat16


@each_way
def test_state_is_without_gradient(way):
    """The new state follows x and the old state, but no gradient flows through it."""

    def member(whole, parts):
        def loss(shared, x):
            state = whole["state"]._replace(**shared["state"])
            _, new = jaxbn.bn_apply(shared["params"], state, x, True, axis_name=way.axis_name)
            return jnp.sum(new.mean) + jnp.sum(new.var)

        shared = {"params": whole["params"], "state": {"mean": whole["state"].mean, "var": whole["state"].var}}
        d_shared, d_x = jax.grad(loss, argnums=(0, 1))(shared, parts["x"])
        return {"x": d_x}, way.total(d_shared)

    assert not any(np.any(v) for v in jax.tree.leaves(way.run(member, *arguments(Case(X)))))


def test_mean_of_means_fails():
    """These comparisons can fail: statistics averaged without their counts, as flax does it, are off by far more."""
    case = CASES["mask-nan"]
    layer = nn.BatchNorm(use_running_average=False, momentum=0.9, axis_name=AXIS)
    whole, parts = arguments(case)
    variables = {
        "params": whole["params"]._asdict(),
        "batch_stats": {"mean": whole["state"].mean, "var": whole["state"].var},
    }

    def member(whole, parts):
        y, new = layer.apply(whole, parts["x"], mask=parts["mask"], mutable=["batch_stats"])
        return {"y": y}, new["batch_stats"]

    # The member that counts nothing makes flax's statistics NaN; leave it out, to show that the weights matter too.
    for first in (0, 1):
        members = MEMBERS - first
        rows = slice(first * LOCAL, None)
        way, left = vmap_way(members), {name: parts[name][rows] for name in ("x", "mask", "cotangent", "residual")}
        _, flax_state = way.run(member, variables, left)
        _, ours = way.run(step(way), whole, left)
        _, wanted = ONE.run(step(ONE), whole, left)
        assert_close(ours["state"], wanted["state"])
        assert not np.all(np.abs(flax_state["mean"] - wanted["state"].mean) < 100 * 2e-4)


def test_replication_check_sees_difference():
    """`assert_replicated` looks at what each device holds: a promise that is not kept fails it."""
    way = shard_map_way(check_vma=False)
    _, index = way.run(lambda whole, parts: (parts, lax.axis_index(AXIS)), {}, {"x": X})
    with pytest.raises(AssertionError):
        assert_replicated(index)


GROUPS = {
    "strided": [[0, 2, 4, 6], [1, 3, 5, 7]],
    "uneven": [[3], [6, 1], [0, 7, 2, 5, 4]],
    "alone": [[i] for i in range(MEMBERS)],
}


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


def train_step(axis_name, params, state, x, mask=None, **options):
    """Value, new state and gradients of one layer with a loss that every entry enters differently."""

    def loss(params, x):
        y, new = jaxbn.bn_apply(
            params, state, x, True, momentum=0.9, mask=mask, axis_name=axis_name, activation=jnp.tanh, **options
        )
        return jnp.sum(jnp.where(mask, y * y, 0) if mask is not None else y * y), (y, new)

    (d_params, d_x), (y, new) = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return y, new, d_params, d_x


PLAIN = jax.jit(partial(train_step, None))


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
    """Under `jit`, x or parameters or both sharded over a model axis: the state comes back sharded as it went in."""
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


@pytest.mark.parametrize("way", [shard_map_way(True, 1), shard_map_way(False, 1), vmap_way(1)], ids=lambda w: w.name)
def test_one_member(way):
    """An axis of size one is one device."""
    case = CASES["mask-nan"]
    got = way.run(step(way), *arguments(case))
    wanted = on_one_device("mask-nan")
    assert_close(got[1], wanted[1])
    assert_close(*(counted(v[0], MASK) for v in (got, wanted)))


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


def plain_formula(params, x, mask=True):
    """Batch normalization as JAX differentiates it unaided."""
    mean, var = (v[None] for v in (jnp.mean(x, 0, where=mask), jnp.var(x, 0, where=mask)))
    return (x - mean) / jnp.sqrt(var + 1e-5) * params.scale[None] + params.bias[None]


def derivatives(layer, total, params, x, directions, weights):
    """Return derivatives of `y = layer(params, x)` by x, and of `sum(weights sin(y))` by both, nested in four ways."""

    def loss(params, x):
        return jnp.sum(weights * jnp.sin(layer(params, x)))

    forward = jax.jvp(partial(layer, params), (x,), (directions,))[1]
    gradient, by_x = jax.grad(loss, argnums=(0, 1))(params, x), jax.grad(loss, argnums=1)
    over_reverse = jax.jvp(partial(by_x, params), (x,), (directions,))[1]
    twice = jax.grad(lambda p, x: jnp.sum(by_x(p, x) * directions), argnums=(0, 1))(params, x)
    shared, own = zip(gradient, twice, strict=True)
    return (forward, over_reverse, *own), total(shared)


@each_named_way
def test_derivatives(way):
    """Forward, reverse, forward over reverse and reverse over reverse, taken by each member, to 1e-9.

    What the mask hides is finite here, and its outputs enter the loss: normalized by the statistics, not part of them.
    """
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        params, state = jaxbn.bn_init(FEATURES, dtype=jnp.float64, scale=rng.standard_normal(FEATURES), bias=0.5)
        parts = {name: rng.standard_normal((16, FEATURES)) for name in ("directions", "weights")}
        parts |= {"x": shards(16).astype(np.float64), "mask": np.arange(16)[:, None] % 5 > 1}

        def layer(params, x, mask):
            return jaxbn.bn_apply(params, state, x, True, mask=mask, axis_name=AXIS)[0]

        def member(formula, total, whole, parts):
            of = {name: v for name, v in parts.items() if name != "mask"}
            return derivatives(partial(formula, mask=parts["mask"]), total, whole["params"], **of)

        got = way.run(partial(member, layer, way.total), {"params": params}, parts)
        wanted = ONE.run(partial(member, plain_formula, lambda v: v), {"params": params}, parts)
        assert_close(got, wanted, atol=1e-9)


@pytest.mark.parametrize(
    "check_vma",
    [param(True, quick=True, id="vma"), param(False, quick=False, id="unchecked"), param(None, quick=False, id="vmap")],
)
def test_jacobians(check_vma):
    """Differentiated from outside, forward and reverse mode give the plain formula's Jacobian, to 1e-9.

    `jit` is outermost: a `jit` between `vmap(axis_name=)` and the derivative puts off JAX's look at the derivative
    rule until the name is no longer bound.
    """
    with jax.enable_x64(True):
        params, state = jaxbn.bn_init(2, dtype=jnp.float64, scale=np.array([0.5, 2.0]))
        x = shards(MEMBERS, features=2).astype(np.float64)

        def member(params, x):
            return jaxbn.bn_apply(params, state, x, True, axis_name=AXIS)[0]

        if check_vma is None:
            by_row = jax.vmap(member, in_axes=(None, 0), axis_name=AXIS)
            everything = lambda params, x: by_row(params, x[:, None])[:, 0]  # noqa: E731
        else:
            mesh, ins = mesh_of(AxisType.Auto), (P(), P(AXIS))
            everything = jax.shard_map(member, mesh=mesh, in_specs=ins, out_specs=P(AXIS), check_vma=check_vma)
        wanted = jax.jit(jax.jacrev(plain_formula, argnums=(0, 1)))(params, x)
        for jacobian in (jax.jacfwd, jax.jacrev):
            assert_close(jax.jit(jacobian(everything, argnums=(0, 1)))(params, x), wanted, atol=1e-9)


def test_messages():
    """What is wrong is said in the caller's terms, with what to do."""
    way, (whole, parts) = vmap_way(), arguments(Case(X))
    with pytest.raises(ValueError, match=r"`axis_name` must be bound.*'rows'.*shard_map.*leave `axis_name` out"):
        jax.jit(partial(train_step, "rows"))(whole["params"], whole["state"], X)
    for groups in ([[0, 1], [2, 3]], [[0, 1, 2, 3], [3, 4, 5, 6, 7]], [list(range(9))], [[-1, *range(7)]]):
        with pytest.raises(ValueError, match=r"each index 0 to 7 .* exactly once"):
            way.run(step(way, axis_index_groups=groups), whole, parts)
    with pytest.raises(TypeError, match="list of lists of ints"):
        way.run(step(way, axis_index_groups=[0, 1]), whole, parts)
    with pytest.raises(ValueError, match="needs `axis_name`"):
        jaxbn.bn_apply(whole["params"], whole["state"], X, True, axis_index_groups=[[0]])
    with pytest.raises(ValueError, match="must not name an axis twice"):
        jax.vmap(partial(train_step, (AXIS, AXIS)), in_axes=(None, None, 0), axis_name=AXIS)(
            whole["params"], whole["state"], X[:, None]
        )


def test_derivative_after_the_name_is_gone():
    """What JAX cannot do is said in our words: it forgets a mapped name inside an inner `jit`."""
    whole, _ = arguments(Case(X))
    apply = partial(jaxbn.bn_apply, whole["params"], whole["state"], train=True, axis_name=AXIS)
    inner = jax.jit(jax.vmap(lambda x: apply(x)[0], axis_name=AXIS))
    with pytest.raises(ValueError, match=r"differentiated.*`jax.jit` outermost"):
        jax.grad(lambda x: jnp.sum(inner(x)))(X[:, None])
    outer = jax.jit(jax.grad(lambda x: jnp.sum(jax.vmap(lambda x: apply(x)[0], axis_name=AXIS)(x))))
    assert outer(X[:, None]).shape == X[:, None].shape


@each_named_way
def test_evaluation_needs_no_axis(way):
    """In evaluation a name may stay, bound or not: the statistics are at hand."""
    whole, parts = arguments(Case(X))
    wanted, _ = jaxbn.bn_apply(whole["params"], whole["state"], X, False)
    y, _ = jaxbn.bn_apply(whole["params"], whole["state"], X, False, axis_name="unbound")
    assert_close(y, wanted, atol=0)

    def member(whole, parts):
        y, new = jaxbn.bn_apply(whole["params"], whole["state"], parts["x"], False, axis_name=AXIS)
        return {"y": y}, new

    got, new = way.run(member, whole, parts)
    assert_close(new, whole["state"], atol=0)
    assert_close(got["y"], wanted)


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
