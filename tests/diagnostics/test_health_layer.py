"""Find each fault of a layer by its number, and no other; accuse no healthy layer."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import evaluation, training

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn.diagnostics import Health, health

linen_health, nnx_health = jaxbn.linen.health, jaxbn.nnx.health
RNG = np.random.default_rng(0)
CENTRE, WIDTH = np.array([2.0, -3, 0, 5], np.float32), np.array([1.0, 4, 0.2, 2], np.float32)
X = np.asarray(RNG.normal(size=(256, 4)) * WIDTH + CENTRE, np.float32)


def layer(count=100, **changes):
    """Make a layer that has seen a hundred batches like X."""
    params, state = jaxbn.bn_init(4, mean=CENTRE, var=WIDTH**2)
    state = state._replace(count=jnp.asarray(count, jnp.int32))
    parts = {name: jnp.asarray(v, jnp.float32) for name, v in changes.items()}
    return (
        params._replace(**{k: v for k, v in parts.items() if k in params._fields}),
        state._replace(**{k: v for k, v in parts.items() if k in state._fields}),
    )


def mixed(share):
    """Statistics that hold a share of the initial values."""
    return {"mean": (1 - share) * CENTRE, "var": share + (1 - share) * WIDTH**2}


ONE_BAD = np.where(np.arange(256)[:, None] == 7, np.float32(np.nan), X)
CASES = {
    "healthy": (layer(), X, {}, []),
    "healthy, no batch": (layer(), None, {}, []),
    "healthy, few of them": (layer(), X[:20], {}, []),
    "no scale, no bias": ((jaxbn.BatchNormParams(None, None), layer()[1]), X, {}, []),
    "never updated": (jaxbn.bn_init(4), X, {"untouched": True, "updates": 0}, ["never updated.*mutable.*recalibrate"]),
    "never updated, but loaded": (layer(0), None, {"untouched": True}, ["never updated.*set the count"]),
    "not finite": (layer(var=[1, np.nan, np.inf, 1]), X, {"not_finite": 2}, ["2 entries.*not finite.*checkpoint"]),
    "bias not finite": (layer(bias=[1, np.nan, 1, 1]), None, {"not_finite": 1}, ["1 entries.*not finite"]),
    "scale not finite": (layer(scale=[1, np.nan, 1, 1]), X, {"not_finite": 1}, ["1 entries.*not finite"]),
    "constant": (layer(var=[1, 16, 1e-6, 4]), None, {"flat": 1}, ["1 of 4 channels.*epsilon.*dead"]),
    "not scaled": (layer(scale=[1, 1e-4, 2, -0.0]), None, {"unscaled": 2}, ["2 of 4 .*scale.*weight decay"]),
    "not scaled at all": (layer(scale=np.zeros(4)), None, {"unscaled": 4}, ["4 of 4.*residual"]),
    "small but alike": (layer(scale=1e-6 * np.ones(4)), None, {"unscaled": 0}, []),
    "too few updates": (layer(3, **mixed(0.6)), X, {}, ["hold [56][0-9]% .*momentum.*zero_debiased"]),
    "another domain": (layer(), X * 2 + 1, {}, ["not those of this batch.*weights have moved.*domain.*adapt"]),
    "another spread": (layer(), CENTRE + 3 * (X - CENTRE), {}, ["not those of this batch.*factor of up to [89]"]),
    "few examples": (layer(), X[:5], {}, ["only 5 examples.*renorm"]),
    "few that count": (layer(), X, {}, ["only 5 examples"]),
    "batch not finite": (layer(), ONE_BAD, {}, ["batch has values that are not finite"]),
}


@pytest.mark.parametrize("name", CASES)
def test_the_fault_and_no_other(name):
    (params, state), x, fields, problems = CASES[name]
    mask = None if name != "few that count" else np.arange(256)[:, None] < 5
    (found,) = health(params, state, x, mask=mask)
    clean = {"channels": 4, "updates": 100, "untouched": False, "flat": 0, "unscaled": 0, "not_finite": 0}
    clean["updates"] = int(state.count)
    assert {k: getattr(found, k) for k in clean} == clean | fields
    assert (found.batch is None) == (x is None)
    assert len(found.problems) == len(problems), found.problems
    for problem, words in zip(found.problems, problems, strict=True):
        assert re.search(words, problem), problem


@pytest.mark.parametrize("axis", [-1, 1])
def test_gaps_are_those_of_the_definition(axis):
    """Compare with the float64 oracle, with NaN under the mask."""
    x = np.asarray(RNG.normal(1, 2, (6, 4, 4)), np.float32)
    mask = RNG.random((6, 4, 4)) < 0.8
    params, state = layer(scale=[1, -2, 3, 0.5], bias=[0, 1, 2, 3])
    exact = training(x, params.scale, params.bias, axis=axis, mask=mask)
    y = evaluation(x, state.mean, state.var, params.scale, params.bias, axis=axis)
    mean, var = np.asarray(state.mean, np.float64), np.asarray(state.var, np.float64)
    wanted = [
        np.max(np.abs(exact.mean - mean) / np.sqrt(var + 1e-5)),
        np.max(np.abs(np.log((exact.var + 1e-5) / (var + 1e-5)))),
        np.max(np.abs(exact.y - y)[mask]),
    ]
    (found,) = health(params, state, np.where(mask, x, np.nan), axis=axis, mask=mask)
    assert found.batch is not None
    assert found.batch.examples == 6
    # A few roundings of float32 in each.
    np.testing.assert_allclose(found.batch[1:4], wanted, rtol=1e-5)


@pytest.mark.slow
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 999), share=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]),
    ratio=st.sampled_from([0.1, 1.0, 30.0]), spread=st.sampled_from([0.05, 0.5, 3.0, 100.0]),
)  # fmt: skip
def test_the_share_of_the_initial_values(seed, share, ratio, spread):
    """A mixture is recognized at any mean and spread, to the digits of float32; beyond the batch there is none."""
    rng = np.random.default_rng(seed)
    x = np.asarray(spread * (rng.normal(size=(64, 8)) + ratio * rng.normal(size=8)), np.float32)
    m = jaxbn.moments(x)
    params, state = jaxbn.bn_init(8, mean=(1 - share) * m.mean, var=share + (1 - share) * m.var)
    batch = health(params, state, x)[0].batch
    assert batch is not None
    if share == 0:
        assert batch.unlearned is None
        assert max(batch.mean, batch.var) < 1e-5
        assert batch.output < 1e-4 * max(1, ratio)
    else:
        # Relative to a difference of the statistics that may be a tenth of them, at |mean| / std of 100.
        np.testing.assert_allclose(batch.unlearned, share, rtol=1e-3)
    away = state._replace(mean=2 * m.mean, var=jnp.where(m.var < 1, m.var / 2, 2 * m.var))
    batch = health(params, away, x)[0].batch
    assert batch is not None
    assert batch.unlearned is None


def test_a_long_training_is_healthy_and_a_short_one_is_not():
    """The real thing: a momentum of 0.99 has forgotten its start after 1000 updates, not after 30."""
    params, state = jaxbn.bn_init(4)
    step = jax.jit(lambda state, x: jaxbn.bn_apply(params, state, x, True)[1])
    problems = {}
    for i in range(1000):
        state = step(state, X[i % 4 * 64 : i % 4 * 64 + 64])
        if i + 1 in (30, 1000):
            problems[i + 1] = health(params, state, X)[0].problems
    assert problems[1000] == ()
    # 0.99^30 = 74 %.
    assert re.search("hold 7[34]% of their initial values", problems[30][0])
    state = jaxbn.bn_init(4)[1]
    for i in range(4):
        state = jaxbn.bn_apply(params, state, X[i * 64 :][:64], True, momentum=jaxbn.zero_debiased(0.99))[1]
    assert health(params, state, X)[0].problems == ()


def test_the_table():
    """A row a layer, a legend, and one sentence for each kind of problem, however many layers have it."""
    (params, state), x = jaxbn.bn_init(4), X[:, :4]
    five = [*health(params, state), *health(params, state, x, name="second"), *health(*layer())] * 2
    lines = str(Health(five)).splitlines()
    assert lines[0].split("  ")[0] == "layer"
    assert len({len(line) for line in lines[:7]}) == 1
    columns = [word for word in ("updates", "var ~ 0", "scale ~ 0", "not finite", "mean gap", "var gap", "y gap")]
    assert all(any(f"{column}:" in line or f"{column}," in line for line in lines[7:]) for column in columns)
    (sentence,) = [line for line in lines if "Never updated" in line]
    assert sentence.startswith("Never updated (the layer, second, the layer and 1 more): Keep the update")
    assert len(lines) == 7 + 1 + 6 + 1
    assert len(Health(five).problems) == 4
    assert "No problems found" in str(health(*layer(), X))
    assert "No batch was compared" in str(health(*layer()))
    assert "No batch was compared" not in str(health(*layer(), X))


def test_a_layer_of_one_feature_without_an_axis():
    params, state = jaxbn.bn_init(())
    for scale in (params.scale, jnp.ones(4)):  # of the layer, of each example
        x = np.arange(4.0, dtype=np.float32)
        assert health(params._replace(scale=scale), state, x, axis=())[0].channels == 1


@pytest.mark.parametrize("count", [None, 0])
def test_a_state_that_was_not_counted(count):
    params, state = layer()
    assert health(params, state._replace(count=count), X)[0].updates == count


def test_traced_and_wrong_arguments_are_refused():
    params, state = layer()
    stats = {"mean": state.mean, "var": state.var}
    whitened = {"mean": state.mean, "cov": np.ones((2, 2, 2), np.float32), "count": np.int32(0)}
    for call, error, words in [
        (partial(health, state, params), TypeError, "`params`.*bn_init"),
        (partial(health, params, state, X[:, :3]), ValueError, "params.scale"),
        (partial(health, jaxbn.bn_init(3)[0], state), ValueError, r"params.scale.*\(4,\); got \(3,\)"),
        (partial(health, params, state._replace(var=np.ones(3, np.float32))), ValueError, "state.var"),
        (partial(health, params, state._replace(mean="a")), TypeError, "state.mean"),
        (partial(health, params, state, np.ones((8, 4), int)), TypeError, "floating"),
        (lambda: jax.jit(lambda x: health(params, state, x)[0].flat)(X), TypeError, "traced"),
        (lambda: jax.jit(lambda state: health(params, state)[0].flat)(state), TypeError, "traced"),
        (lambda: jax.jit(lambda state: health(params, state, X)[0].flat)(state), TypeError, "traced"),
        (lambda: jax.jit(lambda v: linen_health({"batch_stats": v})[0].flat)(stats), TypeError, "traced"),
        (lambda: jax.jit(lambda v: linen_health({"batch_stats": v}))(whitened), TypeError, "traced"),
        (
            lambda: nnx.jit(lambda m: nnx_health(m)[0].flat)(jaxbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0))),
            TypeError,
            "traced",
        ),
        (partial(linen_health, {"params": {}}), ValueError, "batch_stats"),
        (partial(linen_health, {"batch_stats": {"mean": X, "var": X}}, x=X), ValueError, "`apply` and `x`"),
        (partial(nnx_health, nnx.Linear(2, 3, rngs=nnx.Rngs(0))), ValueError, "has none"),
    ]:
        with pytest.raises(error, match=words):
            call()
