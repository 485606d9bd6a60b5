"""Batch norm behind the activation, against its formula."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims.placement.measure import both
from experiments.training import layers
from experiments.training.layers import Pass


def test_both_is_one_layer_behind_the_other():
    """`(tanh(x + b) - mean) / std`, and the state is that of what the activation gives."""
    layer = both(layers.plain(jnp.tanh), layers.batch_norm(momentum=0.0))
    (_, norm), state = layer.init(3)
    x = jax.random.normal(jax.random.key(0), (16, 3))
    bias = jnp.array([0.5, -1.0, 2.0])
    y, (none, moments) = layer.apply((bias, norm), state, x, Pass(True))
    inner = np.tanh(np.asarray(x, np.float64) + np.asarray(bias))
    expected = (inner - inner.mean(0)) / np.sqrt(inner.var(0) + 1e-5)
    # Float32, and the third unit is nearly saturated: its variance of 0.02 magnifies rounding some ten times.
    np.testing.assert_allclose(y, expected, atol=2e-5)
    np.testing.assert_allclose(moments.mean, inner.mean(0), atol=1e-6)
    assert none is None


def test_bias_counts_behind_the_activation_only():
    """In front of batch norm a bias changes nothing; in front of the activation that comes first, it does."""
    x = jax.random.normal(jax.random.key(1), (16, 3))

    def moved(first, second):
        layer = both(first, second)
        (bias, norm), state = layer.init(3)
        y, z = (layer.apply((b, norm), state, x, Pass(True))[0] for b in (bias, bias + 1.0))
        return float(jnp.max(jnp.abs(y - z)))

    before = moved(layers.plain(lambda v: v), layers.batch_norm(activation=jnp.tanh))
    after = moved(layers.plain(jnp.tanh), layers.batch_norm())
    assert before < 1e-5 < 0.1 < after
