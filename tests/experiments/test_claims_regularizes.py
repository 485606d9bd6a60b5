"""Dropout at a rate in the state, and the closed form of its shift of variances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.claims.regularizes.measure import adjustable, shift
from experiments.training import layers
from experiments.training.layers import Pass

LAYER = layers.batch_norm(activation=jax.nn.relu)


@pytest.mark.parametrize("before", [False, True])
def test_rate_in_the_state(before):
    """The same values as dropout with that rate, and without a rate the layer as it is; the rate stays."""
    x, run = jax.random.normal(jax.random.key(0), (8, 3)), Pass(True, None, jax.random.key(1))
    layer = adjustable(LAYER, before=before)
    params, (own, zero) = layer.init(3)
    y, (_, kept) = layer.apply(params, (own, jnp.asarray(0.3)), x, run)
    kept_units = jax.random.bernoulli(run.key, 0.7, x.shape)

    def dropped(v):
        return jnp.where(kept_units, v / 0.7, 0.0)

    expected = LAYER.apply(params, own, dropped(x) if before else x, run)[0]
    expected = expected if before else dropped(expected)
    np.testing.assert_allclose(y, expected, rtol=1e-6)  # one division, maybe by a reciprocal
    assert float(kept) == pytest.approx(0.3)
    plain, _ = LAYER.apply(params, own, x, run)
    np.testing.assert_array_equal(layer.apply(params, (own, zero), x, run)[0], plain)


def test_dropout_keeps_the_mean_and_is_off_in_evaluation():
    nothing = layers.Layer(lambda features: (None, None), lambda params, state, x, run: (x, state))
    layer, state, wide = adjustable(nothing), (None, jnp.asarray(0.2)), jnp.ones((400, 50))
    y = np.asarray(layer.apply(None, state, wide, Pass(True, None, jax.random.key(0)))[0])
    assert set(np.unique(y)) == {np.float32(0), np.float32(1.25)}
    assert np.mean(y == 0) == pytest.approx(0.2, abs=5 * np.sqrt(0.16 / y.size))  # five standard deviations
    assert np.array_equal(layer.apply(None, state, wide, Pass(False))[0], wide)


@pytest.mark.parametrize("keep", [0.5, 0.8])
def test_shift_of_variances(keep):
    """Against many draws of dropout; their variance is known to 1% or better, of which three times is allowed."""
    rng = np.random.default_rng(0)
    x = rng.normal([0.0, 1.0, 3.0], 1.0, size=(200_000, 3))
    dropped = np.where(rng.random(x.shape) < keep, x / keep, 0)
    found = shift(*(jnp.asarray(v, jnp.float32) for v in (x.mean(0), x.var(0), keep)))
    np.testing.assert_allclose(found, x.var(0) / dropped.var(0), rtol=0.03)
    assert np.all(np.diff(found) < 0)  # the larger the mean, the larger the shift
