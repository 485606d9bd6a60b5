"""Pool the moments of batches, however the data are split into them."""

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import training
from two_layers import (
    EVEN,
    FEATURES,
    UNEVEN,
    X,
    rng,
)

import jaxbn
from jaxbn import Moments
from jaxbn.statistics import pool_batches


@settings(derandomize=True, deadline=None, max_examples=15)
@given(st.permutations(range(20)), st.permutations([1, 1, 1, 2, 2, 3, 5, 5]), st.sampled_from([0.0, 1e2, 1e4]))
def test_however_they_are_split(order, sizes, ratio):
    """The moments are those of all values in float64, with the digits of the mean that float32 has no place for."""
    x = (rng.standard_normal((20, 2)) + ratio).astype(np.float32)
    batches = np.split(x[np.array(order)], np.cumsum(sizes)[:-1])
    m = pool_batches(jax.jit(jaxbn.moments), iter(batches))
    exact = training(x)
    np.testing.assert_array_equal(m.count, exact.count)
    # Each batch's mean is good to a rounding of what it sums, in standard deviations; and so the pooled variance.
    np.testing.assert_allclose(np.asarray(m.mean, np.float64) + np.asarray(m.tail), exact.mean, rtol=1e-10, atol=1e-6)
    np.testing.assert_allclose(m.var, exact.var, rtol=1e-6)


def test_a_long_stream_does_not_drift():
    """Counts in float32 stop growing at 2^24, and thousands of roundings show."""
    x = rng.standard_normal(3000) + 100
    n = 2.0**21 + 1
    m = pool_batches(lambda v: Moments(np.float32(n), np.array([v], np.float32), np.float32(0)), x)
    x = x.astype(np.float32).astype(np.float64)
    # One rounding to float32.
    np.testing.assert_allclose(m.count, n * len(x), rtol=1e-7)
    np.testing.assert_allclose(m.mean, [x.mean()], rtol=1e-7)
    np.testing.assert_allclose(m.var, [x.var()], rtol=1e-7)


def test_trees_and_features_without_values():
    masks = [np.array([[True, False]] * 4), np.array([[False, False]] * 4), np.array([[True, False]] * 4)]
    batches = list(zip([X[:4, :2], np.full((4, 2), np.nan, np.float32), X[4:8, :2]], masks, strict=True))
    m = pool_batches(lambda b: {"a": [jaxbn.moments(b[0], mask=b[1])], "b": None}, batches)["a"][0]
    np.testing.assert_array_equal(m.count, [8, 0])
    np.testing.assert_allclose(m.var, [X[:8, 0].var(), 0], rtol=1e-6)
    np.testing.assert_array_equal(m.mean[1:], 0)


def test_of_functions_with_momentum_zero():
    """The recipe of the docstring: new states are moments."""
    params, state = jaxbn.bn_init(FEATURES)

    @jax.jit
    def moments_of(x):
        _, new = jaxbn.bn_apply(params, state, x, True, momentum=0.0)
        return Moments(len(x), new.mean, new.var)

    new = pool_batches(moments_of, UNEVEN)
    np.testing.assert_allclose(new.mean, X.mean(0, np.float64), rtol=1e-6)
    np.testing.assert_allclose(new.var, X.astype(np.float64).var(0), rtol=1e-6)


def test_progress(capsys):
    pool_batches(jaxbn.moments, EVEN, progress=True)
    pool_batches(jaxbn.moments, iter(EVEN), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "3/3 batches, 0 s left" in err
    assert "\r3 batches" in err
    assert err.count("\n") == 2
