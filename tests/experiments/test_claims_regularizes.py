"""Dropout, and statistics of all images that there are to learn from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.claims.regularizes.measure import dropout, whole
from experiments.training import layers
from experiments.training.layers import Layer, Pass
from experiments.training.models import gaussian, mlp

pytestmark = pytest.mark.usefixtures("ordinary_promotion")
NOTHING = Layer(lambda features: (None, None), lambda params, state, x, run: (x, state))


def test_dropout_keeps_the_mean_and_is_off_in_evaluation():
    layer, wide = dropout(NOTHING, 0.2), jnp.ones((400, 50))
    y = np.asarray(layer.apply(None, None, wide, Pass(True, None, jax.random.key(0)))[0])
    assert set(np.unique(y)) == {np.float32(0), np.float32(1.25)}
    assert np.mean(y == 0) == pytest.approx(0.2, abs=5 * np.sqrt(0.16 / y.size))  # five standard deviations
    assert np.array_equal(layer.apply(None, None, wide, Pass(False))[0], wide)


@pytest.mark.slow
def test_statistics_of_the_whole_set():
    """The batch is normalized by all images and enters no statistic; and its gradient flows through them."""
    rng, rounding = np.random.default_rng(0), {"rtol": 0, "atol": 2e-6}
    images = jnp.asarray(rng.standard_normal((30, 6)), jnp.float32)

    def make(layer):
        return mlp([layer], (4,), gaussian(0.4, he=False), 6, 3)

    options = {"momentum": 0.0, "activation": jnp.tanh}
    model, plain = whole(5, options, make, 30, 6), make(layers.batch_norm(**options))
    params, (own, _) = model.init(jax.random.key(0))
    state, batch = (own, images), images[:5] + 1

    def by_hand(params):
        entering, own = images @ params["kernels"][0], batch @ params["kernels"][0]
        mean, var = jnp.mean(entering, 0), jnp.var(entering, 0)
        shift = params["shifts"][0]
        hidden = jnp.tanh((own - mean) / jnp.sqrt(var + 1e-5) * shift.scale + shift.bias)
        return hidden @ params["kernels"][1] + params["last"]

    logits, new = model.apply(params, state, batch, True, None)
    np.testing.assert_allclose(logits, by_hand(params), **rounding)
    np.testing.assert_allclose(new[0][0].mean, jnp.mean(images @ params["kernels"][0], 0), **rounding)

    def gradient(apply):
        return jax.grad(lambda p: jnp.sum(jnp.sin(apply(p))))(params)

    ours, theirs = gradient(lambda p: model.apply(p, state, batch, True, None)[0]), gradient(by_hand)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), ours, theirs)
    evaluated = model.apply(params, new, batch, False, None)[0]
    np.testing.assert_allclose(evaluated, plain.apply(params, new[0], batch, False, None)[0], **rounding)
