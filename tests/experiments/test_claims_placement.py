"""Batch norm after the activation against its formula, prepared inputs, and steps that are read from curves."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from experiments.claims._lib.trained import Log, Trained
from experiments.claims.placement.measure import _steps, both, prepared
from experiments.training import data, layers
from experiments.training.layers import Pass


def test_both_is_one_layer_after_the_other():
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


def test_bias_counts_after_the_activation_only():
    """Before batch norm a bias changes nothing; before an activation that comes first, it does."""
    x = jax.random.normal(jax.random.key(1), (16, 3))

    def moved(first, second):
        layer = both(first, second)
        (bias, norm), state = layer.init(3)
        y, z = (layer.apply((b, norm), state, x, Pass(True))[0] for b in (bias, bias + 1.0))
        return float(jnp.max(jnp.abs(y - z)))

    before = moved(layers.plain(lambda v: v), layers.batch_norm(activation=jnp.tanh))
    after = moved(layers.plain(jnp.tanh), layers.batch_norm())
    assert before < 1e-5 < 0.1 < after


def test_inputs_are_prepared_by_the_training_images():
    """Mean 0 and deviation 1 of every pixel that varies; Gaussian ones keep their order, and are less skewed."""
    images = data.digits()
    raw = images.train.images
    varies = raw.std(0) > 0.1
    standard, gaussian = (prepared(name, images) for name in ("standard", "gaussian"))
    np.testing.assert_allclose(standard.train.images.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(standard.train.images.std(0)[varies], 1, rtol=1e-4)
    assert np.all(np.abs(standard.test.images.mean(0)[varies]) < 0.5)
    pixel = int(np.argmax(raw.std(0)))
    order = np.argsort(raw[:, pixel], kind="stable")
    assert np.all(np.diff(gaussian.train.images[order, pixel]) >= -1e-6)
    np.testing.assert_allclose(gaussian.train.images.mean(0), 0, atol=1e-5)
    skewed = [np.mean(np.abs(stats.skew(own.train.images[:, varies]))) for own in (standard, gaussian)]
    assert skewed[1] < 0.6 * skewed[0]  # as far as their 17 values allow
    assert gaussian.train.labels is images.train.labels


def test_steps_are_read_from_curves():
    """The first step at the target, and the first at which the mean loss of six chunks is small; or never."""
    steps = 5 * np.arange(1, 11)
    accuracy = np.stack([np.linspace(0.1, 1.0, 10), np.full(10, 0.5)])[None]
    loss = np.stack([np.r_[np.ones(2), np.zeros(8)], np.ones(10)])[None]
    found = _steps(0.95, Trained(Log(steps, loss, loss, accuracy, accuracy), None, None))
    assert found["to_target"].tolist() == [[50.0, math.inf]]
    assert found["to_minimum"].tolist() == [[40.0, math.inf]]
    assert found["curve"].shape == (1, 2, 10)
    np.testing.assert_array_equal(found["at"][0, 1], steps)
