"""The moments algebra: laws, against float64 NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxbn

FEATURES = 3
# Pooling rounds a handful of times in float32; means are compared in units of the spread around them.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
GROUPS = st.lists(st.integers(0, 9), min_size=1, max_size=5)
SEEDS = st.integers(0, 10**6)
LAWS = settings(deadline=None, max_examples=40, derandomize=True)


def groups(sizes, seed, offset=100.0):
    """Arrays `[size, features]` with means that differ, about `offset`."""
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal((n, FEATURES)) * 2 + offset + 5 * i).astype(np.float32) for i, n in enumerate(sizes)]


def stacked(parts):
    """Their moments, `[groups, features]`, from one padded array and a mask: one compilation for all sizes."""
    padded = np.full((5, 9, FEATURES), np.nan, np.float32)
    mask = np.zeros((5, 9, 1), bool)
    for i, part in enumerate(parts):
        padded[i, : len(part)], mask[i, : len(part)] = part, True
    return MOMENTS(padded, mask)


MOMENTS = jax.jit(jax.vmap(lambda x, mask: jaxbn.moments(x, mask=mask)))
POOL = jax.jit(jaxbn.pool)


def assert_moments_of(m, x):
    """`m` are the moments of the rows of `x`."""
    np.testing.assert_array_equal(m.count, np.full(FEATURES, len(x), np.float32))
    if len(x):
        exact = x.astype(np.float64)
        np.testing.assert_allclose(np.float64(m.mean) + np.float64(m.tail), exact.mean(0), rtol=0, atol=2e-6)
        np.testing.assert_allclose(m.var, exact.var(0), **CLOSE)


@LAWS
@given(GROUPS, SEEDS)
def test_pooled_is_concatenated(sizes, seed):
    parts = groups(sizes, seed)
    assert_moments_of(POOL(stacked(parts)), np.concatenate(parts))


@LAWS
@given(GROUPS, SEEDS, st.randoms(use_true_random=False))
def test_pooling_is_commutative_and_associative(sizes, seed, random):
    parts = groups(sizes, seed)
    m = stacked(parts)
    whole = POOL(m)
    order = list(range(5))
    random.shuffle(order)
    shuffled = jax.tree.map(lambda v: v[jnp.array(order)], m)
    head, tail = (jax.tree.map(lambda v, at=at: v[at], shuffled) for at in (slice(0, 2), slice(2, 5)))
    for other in (POOL(shuffled), POOL(jax.tree.map(lambda a, b: jnp.stack([a, b]), POOL(head), POOL(tail)))):
        np.testing.assert_array_equal(other.count, whole.count)
        np.testing.assert_allclose(other.mean, whole.mean, rtol=1e-6)
        np.testing.assert_allclose(other.var, whole.var, **CLOSE)


@pytest.mark.parametrize("nothing", [0.0, np.nan, np.inf])
def test_the_empty_group_is_the_identity(nothing):
    m = jaxbn.moments(groups([7], 0)[0])
    empty = jaxbn.Moments(jnp.zeros(FEATURES), *[jnp.full(FEATURES, nothing, jnp.float32)] * 3)
    pooled = POOL(jax.tree.map(lambda a, b: jnp.stack([a, b]), m, empty))
    for got, wanted in zip(pooled, m, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)
    both = POOL(jax.tree.map(lambda a: jnp.stack([a, a]), empty))
    np.testing.assert_array_equal(np.stack(both), np.zeros((4, FEATURES)))


def test_the_empty_array():
    np.testing.assert_array_equal(np.stack(jaxbn.moments(np.zeros((0, FEATURES), np.float32))), np.zeros((4, FEATURES)))
    assert jaxbn.moments(np.zeros((4, 0), np.float32)).mean.shape == (0,)


def test_pool_takes_plain_means_and_several_axes():
    """The moments may lack the tail, have one count for all features, or lie over two axes."""
    x = np.random.default_rng(0).standard_normal((2, 3, 8, FEATURES)).astype(np.float32)
    m = jaxbn.Moments(jnp.float32(8), jnp.asarray(x.mean(2)), jnp.asarray(x.var(2)))
    assert_moments_of(jaxbn.pool(m, axis=(0, 1)), x.reshape(-1, FEATURES))
    last = jaxbn.Moments(*(jnp.moveaxis(jnp.broadcast_to(v, m.mean.shape), (0, 1), (1, 2)) for v in m))
    assert_moments_of(jaxbn.pool(last, axis=(1, -1)), x.reshape(-1, FEATURES))


@pytest.mark.slow
@pytest.mark.parametrize("axis", [-1, 0, 2, (1, 3), (3, 1), (-1, 0, 1)])
def test_axes_in_the_callers_order(axis):
    x = np.random.default_rng(0).normal(3, 2, (2, 3, 4, 5)).astype(np.float32)
    m = jaxbn.moments(x, axis=axis)
    kept = [a % 4 for a in (axis if isinstance(axis, tuple) else [axis])]
    exact = np.moveaxis(x.astype(np.float64), kept, range(len(kept))).reshape(*[x.shape[a] for a in kept], -1)
    np.testing.assert_allclose(m.mean, exact.mean(-1), rtol=1e-6)
    np.testing.assert_allclose(m.var, exact.var(-1), rtol=1e-5)
    np.testing.assert_array_equal(m.count, np.full(m.mean.shape, exact.shape[-1], np.float32))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_sums_are_float32_at_least(dtype):
    """The mean of ones with a small step is not lost in half precision, nor a variance beyond its range."""
    x = jnp.asarray(np.linspace(-60000, 60000, 4096)[:, None], dtype)
    m = jaxbn.moments(x)
    exact = np.asarray(x, np.float64)
    assert m.mean.dtype == m.var.dtype == m.count.dtype == jnp.float32
    np.testing.assert_allclose(m.var, exact.var(0), rtol=1e-5)
    assert m.var[0] > 1e9


def test_float64_stays():
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(1e8, 1, (100, FEATURES))
        m = jaxbn.moments(x)
        assert m.mean.dtype == jnp.float64
        np.testing.assert_allclose(m.var, x.var(0), rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_moments_and_pool_have_the_right_derivatives(masked):
    """Compare with float64 differences of the definition, with NaN under the mask."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, weight = rng.standard_normal((2, 6, FEATURES)), rng.standard_normal((2, FEATURES))
        mask = rng.random((2, 6, 1)) < 0.7 if masked else np.ones((2, 6, 1), bool)

        def ours(x):
            m = jaxbn.pool(jax.vmap(lambda x, mask: jaxbn.moments(x, mask=mask))(x, jnp.asarray(mask)))
            return jnp.sum(weight[0] * jnp.sin(m.mean + m.tail) + weight[1] * m.var)

        def plain(x):
            mean = jnp.mean(x, (0, 1), where=mask)
            var = jnp.mean((x - mean[None, None]) ** 2, (0, 1), where=mask)
            return jnp.sum(weight[0] * jnp.sin(mean) + weight[1] * var)

        hidden = jnp.asarray(np.where(mask, x, np.nan))
        wanted = jax.grad(plain)(jnp.asarray(x))
        np.testing.assert_allclose(jax.grad(ours)(hidden), wanted, atol=1e-12)
        np.testing.assert_allclose(jax.jit(jax.grad(ours))(hidden), wanted, atol=1e-12)
        hessian = jax.jit(jax.hessian(ours))(jnp.asarray(x))
        np.testing.assert_allclose(hessian, jax.jit(jax.hessian(plain))(jnp.asarray(x)), atol=1e-12)


@LAWS
@given(st.floats(0, 0.9999), SEEDS)
def test_zero_debiased_is_the_normalized_ema(decay, seed):
    """Compare with the sum of decaying weights, for any initial value."""
    keep = jaxbn.zero_debiased(decay)
    assert keep == jaxbn.zero_debiased(np.float64(decay))
    values = np.random.default_rng(seed).normal(3, 1, 12)
    running = -1e3
    for t, value in enumerate(values):
        m = float(keep(t))
        assert 0 <= m <= decay + 1e-6
        running = m * running + (1 - m) * value
        weights = decay ** np.arange(t, -1, -1.0)
        assert running == pytest.approx((weights * values[: t + 1]).sum() / weights.sum(), rel=2e-5, abs=1e-5)


@LAWS
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20))
def test_cumulative_average_is_the_mean(values):
    running = 1e6
    for t, value in enumerate(values):
        m = float(jaxbn.cumulative_average(t))
        running = m * running + (1 - m) * value
    assert running == pytest.approx(np.mean(values), rel=1e-4, abs=1e-2)


@pytest.mark.parametrize("cut", [1, 3, 7])
def test_two_parts_merge_as_chan_has_it(cut):
    """mean = mean1 + d n2 / n and M2 = M2a + M2b + d^2 n1 n2 / n, and so does `pool`, as the whole has it."""
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(1, 2, (8, FEATURES))
        a, b = x[:cut], x[cut:]
        d = b.mean(0) - a.mean(0)
        mean = a.mean(0) + d * len(b) / len(x)
        var = (a.var(0) * len(a) + b.var(0) * len(b) + d**2 * len(a) * len(b) / len(x)) / len(x)
        pooled = jaxbn.pool(jax.tree.map(lambda *v: jnp.stack(v), jaxbn.moments(a), jaxbn.moments(b)))
        for m in (pooled, jaxbn.moments(x)):
            np.testing.assert_allclose(m.mean, mean, rtol=1e-11, atol=1e-11)
            np.testing.assert_allclose(m.var, var, rtol=1e-11, atol=1e-11)


def test_batch_variance_is_biased_by_its_size():
    """E[var of m draws] = (m - 1) / m sigma^2, exactly: over all draws of three from five values."""
    with jax.enable_x64(True):
        values = np.random.default_rng(0).normal(size=5)
        draws = np.array(list(itertools.product(values, repeat=3))).T  # one feature a draw
        got = jaxbn.moments(draws).var
        np.testing.assert_allclose(got.mean(), 2 / 3 * values.var(), rtol=1e-11, atol=1e-11)
        state = jaxbn.bn_init(draws.shape[1], dtype=jnp.float64)[1]
        _, state = jaxbn.bn_apply(
            jaxbn.BatchNormParams(None, None), state, jnp.asarray(draws), True, momentum=0.0, unbiased_running_var=True
        )
        np.testing.assert_allclose(state.var.mean(), values.var(), rtol=1e-11, atol=1e-11)
