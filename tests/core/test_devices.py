"""Eight devices equal one: value, new state and every gradient, in every way to run on several devices."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from device_cases import CASES, LOCAL, MASK, Case, X, arguments, assert_equals_numpy, counted, on_one_device, step
from jax import lax
from params import param
from ways import (
    AXIS,
    MEMBERS,
    ONE,
    QUICK,
    WAYS,
    assert_close,
    assert_replicated,
    each_named_way,
    each_way,
    shard_map_way,
    vmap_way,
)

import jaxbn

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


@pytest.mark.parametrize("way", [shard_map_way(True, 1), shard_map_way(False, 1), vmap_way(1)], ids=lambda w: w.name)
def test_one_member(way):
    """An axis of size one is one device."""
    case = CASES["mask-nan"]
    got = way.run(step(way), *arguments(case))
    wanted = on_one_device("mask-nan")
    assert_close(got[1], wanted[1])
    assert_close(*(counted(v[0], MASK) for v in (got, wanted)))


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
