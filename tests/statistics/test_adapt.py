"""Adaptation of statistics: its limits, and the published formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxbn
from jaxbn import BatchNormParams, BatchNormState, Moments
from jaxbn.statistics import adapt

rng = np.random.default_rng(0)
STATE = BatchNormState(jnp.array([0.3, 1.0, -4.0]), jnp.array([0.5, 4.0, 9.0]), jnp.array(7))
PARAMS = BatchNormParams(jnp.array([1.0, -2.0, 0.5]), jnp.array([0.0, 1.0, 2.0]))
TARGET = Moments(jnp.array([6.0, 6.0, 2.0]), jnp.array([1.3, 0.0, -5.0]), jnp.array([0.1, 5.0, 0.0]))
POISON = BatchNormState(jnp.full(3, jnp.nan), jnp.full(3, jnp.inf), jnp.array(0))


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_the_mixture(weight, other):
    """Compute it as published, in float64; the more the source is worth, the nearer the result is to it."""
    n = np.asarray(TARGET.count, np.float64)
    share = n / (weight + n)
    new, more = (adapt(STATE, TARGET, source_weight=w) for w in sorted([weight, weight + other]))
    for part in ("mean", "var"):
        source, target = (np.asarray(getattr(v, part), np.float64) for v in (STATE, TARGET))
        # A product or two, rounded; where they cancel, the roundings are those of the larger one.
        rounding = 3e-7 * np.maximum(np.abs(source), np.abs(target))
        assert np.all(np.abs(getattr(new, part) - (source + share * (target - source))) <= rounding)
        assert np.all(np.abs(getattr(more, part) - source) <= np.abs(getattr(new, part) - source) + 1e-6)
    assert int(new.count) == 7


def test_limits_are_exact():
    """N = 0 is the target, for any source; N infinite the source."""
    for source in (STATE, POISON):
        new = adapt(source, TARGET)
        np.testing.assert_array_equal(new.mean, TARGET.mean)
        np.testing.assert_array_equal(new.var, TARGET.var)
        assert int(new.count) == max(int(source.count), 1)
    kept = adapt(STATE, TARGET, source_weight=np.inf)
    jax.tree.map(np.testing.assert_array_equal, kept, STATE)


def test_features_without_finite_moments_keep_their_statistics():
    m = Moments(jnp.array([0.0, 4.0, 4.0]), jnp.array([9.0, jnp.inf, -5.0]), jnp.array([9.0, jnp.nan, 2.0]))
    new = jax.jit(adapt)(STATE, m)
    np.testing.assert_array_equal(new.mean, np.float32([0.3, 1, -5]))
    np.testing.assert_array_equal(new.var, [0.5, 4, 2])


def test_difference_to_exact_pooling():
    """The variance that the published rule leaves out, as the docstring says."""
    n, weight = TARGET.count, 3.0
    new = adapt(STATE, TARGET, source_weight=weight)
    both = jax.tree.map(
        lambda a, b: jnp.stack([a, b]), Moments(jnp.full(3, weight), STATE.mean, STATE.var, jnp.zeros(3)),
        TARGET._replace(tail=jnp.zeros(3)),
    )  # fmt: skip
    between = weight * n / (weight + n) ** 2 * (STATE.mean - TARGET.mean) ** 2
    np.testing.assert_allclose(jaxbn.pool(both).var, new.var + between, rtol=1e-6)
    np.testing.assert_allclose(jaxbn.pool(both).mean, new.mean, rtol=1e-6)


def test_shapes_and_dtypes_stay():
    state = BatchNormState(jnp.zeros((2, 3), jnp.bfloat16), jnp.ones((2, 3), jnp.bfloat16), jnp.array(0))
    x = jnp.asarray(rng.standard_normal((5, 3, 2)), jnp.bfloat16)
    new = adapt(state, jaxbn.moments(x, axis=(2, 1)), source_weight=jnp.float32(2))
    assert [(v.shape, v.dtype) for v in new] == [(v.shape, v.dtype) for v in state]


@pytest.mark.parametrize(
    ("state", "m", "weight", "kind", "words"),
    [
        (STATE, TARGET, -1, ValueError, "at least 0"),
        (STATE, TARGET, np.nan, ValueError, "at least 0"),
        (STATE, TARGET, None, TypeError, "source_weight"),
        (STATE, TARGET, "1", TypeError, "source_weight"),
        (STATE, TARGET, jnp.ones(3), TypeError, "source_weight"),
        (STATE, Moments(1.0, jnp.ones(2), 1.0), 0, ValueError, r"\(3,\); got \(2,\)"),
        (STATE, Moments(1.0, jnp.ones(3, int), 1.0), 0, TypeError, "floating"),
        (PARAMS, TARGET, 0, TypeError, "BatchNormParams"),
    ],
)
def test_adapt_refuses(state, m, weight, kind, words):
    with pytest.raises(kind, match=words):
        adapt(state, m, source_weight=weight)


@pytest.mark.parametrize("weight", [0.0, np.inf])
def test_what_takes_nothing_over_counts_no_update(weight):
    """Else a schedule would take the initial mean for that of a batch."""
    _, state = jaxbn.bn_init(3)
    empty = TARGET._replace(count=jnp.zeros(3)) if weight == 0 else TARGET
    assert int(adapt(state, empty, source_weight=weight).count) == 0
    assert int(adapt(state, TARGET).count) == 1
