"""Exact laws of the statistics of many batches: pooled, averaged, expected, and after dropout."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from law_cases import LAWS, NONE, RATIOS, SEEDS, STDS, VANISHING, compiled, fresh, near, standard

import jaxbn

pytestmark = pytest.mark.usefixtures("float64")

MOMENTS, POOL = jax.jit(jaxbn.moments), jax.jit(jaxbn.pool)


@compiled()
def over_batches(batches, kept):
    """Moments of each batch; and states: averaged plainly, exponentially, and updated once by all together."""
    state = fresh(batches.shape[-1])

    def averaged(momentum):
        def step(state, x):
            return jaxbn.bn_apply(NONE, state, x, True, momentum=momentum)[1], None

        return lax.scan(step, state, batches)[0]

    each = jax.vmap(lambda x: jaxbn.bn_apply(NONE, state, x, True, momentum=0.0)[1])(batches)
    pooled = jaxbn.pool_updates(each, 0.0)
    return jax.vmap(jaxbn.moments)(batches), averaged(jaxbn.cumulative_average), averaged(kept), pooled


@LAWS
@given(SEEDS, st.sampled_from([(2, 3), (6, 4)]), STDS, RATIOS, st.floats(0, 0.999))
def test_equal_batches(seed, sizes, std, ratio, kept):
    """Pooled they are the whole, V. An average of their variances is V less the variance of their means."""
    k, m = sizes
    whole = (standard(np.random.default_rng(seed), (k * m, 2)) + ratio) * std
    batches = whole.reshape(k, m, 2)
    means, variances = batches.mean(1), batches.var(1)
    found, plain, exponential, once = over_batches(batches, kept)
    for pooled in (POOL(found), jaxbn.statistics.pool_batches(MOMENTS, batches), once):
        near(pooled.mean, np.full(2, ratio * std), std)
        near(pooled.var, std**2, std**2)
    near(plain.mean, np.full(2, ratio * std), std)
    near(plain.var, std**2 - means.var(0), std**2)
    weights = (1 - kept) * kept ** np.arange(k - 1, -1, -1.0)
    near(exponential.mean, weights @ means, std)
    near(exponential.var, kept**k + weights @ variances, std**2 + kept**k)


@LAWS
@given(SEEDS, st.sampled_from([(4, 1), (6, 2), (4, 3), (3, 4)]), STDS, RATIOS)
def test_expectation_over_every_sample(seed, sizes, std, ratio):
    """E var_B = (m - 1) / m sigma^2 and Var mean_B = sigma^2 / m, by all samples of m from a few values."""
    n, m = sizes
    values = (standard(np.random.default_rng(seed), n) + ratio) * std
    samples = np.array(list(itertools.product(values, repeat=m))).T  # a feature each
    found = MOMENTS(samples)
    mean = np.asarray(found.mean) + np.asarray(found.tail)
    near(mean.mean(), ratio * std, std)
    near(mean.var(), std**2 / m, std**2)
    near(np.mean(found.var), (m - 1) / m * std**2, std**2)


@LAWS
@given(SEEDS, st.sampled_from([(1, 2), (1, 3), (3, 4)]), STDS, st.floats(-3, 3))
def test_variance_shift_of_dropout(seed, keep, std, ratio):
    """Dropout before the layer: in evaluation its output has variance v / ((c^2 + v) / p - c^2), not 1.

    Over all masks of four values: each is kept by `keep[0]` of `keep[1]` equally likely draws.
    """
    x, p = (standard(np.random.default_rng(seed), (4, 1)) + ratio) * std, keep[0] / keep[1]
    masks = np.array(list(itertools.product(np.arange(keep[1]) < keep[0], repeat=4)))
    dropped = np.where(masks[..., None], x / p, 0).reshape(-1, 1)
    options = {"momentum": 0.0, "epsilon": VANISHING}
    y, state = jaxbn.bn_apply(NONE, fresh(1), dropped, True, **options)
    near(np.var(y), 1)
    second = (ratio**2 + 1) / p - ratio**2
    near(state.mean, ratio * std, 10 * std)
    near(state.var, second * std**2, second * std**2)
    y, _ = jaxbn.bn_apply(NONE, state, x, False, **options)
    near(np.var(y), 1 / second)
