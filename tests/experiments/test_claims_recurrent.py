"""Claim 12: gradients through time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from experiments.claims.recurrent.judge import _decay
from experiments.claims.recurrent.measure import ARMS, STEPS, gradients, order
from experiments.training.models import gaussian
from experiments.training.recurrent import lstm
from experiments.training.train import loss_of

pytestmark = pytest.mark.usefixtures("ordinary_promotion")
HIDDEN, ROWS = 3, 4


@pytest.mark.slow
def test_the_gradient_by_the_first_output_is_that_of_the_library():
    """What `first` is, and in which order pixels are read; later steps go through the same derivative."""
    rng = np.random.default_rng(0)
    images, labels = rng.random((ROWS, 2 * STEPS), np.float32), np.arange(ROWS, dtype=np.int32)
    first = 0.5 * jax.random.normal(jax.random.key(1), (ROWS, HIDDEN))
    how, permuted = ARMS["batch"], order(2 * STEPS)
    params, state = lstm(how, HIDDEN, STEPS, gaussian(1.0, he=True), 2 * STEPS, permuted).init(jax.random.key(0))
    xs = jnp.asarray(np.moveaxis(images[:, permuted].reshape(ROWS, STEPS, 2), 0, 1))

    def loss(h):
        start = jaxbn.lstm.lstm_carry(params["cell"], ROWS)._replace(h=h)
        last = jaxbn.lstm.lstm_apply(params["cell"], state, start, xs, True)[0].h
        return loss_of(last @ params["head"] + params["last"], jnp.asarray(labels))

    found, expected = jax.jit(lambda h: (gradients(how, params, state, images, labels, h), jax.grad(loss)(h)))(first)
    assert found.shape == (STEPS,)
    # Rounding grows through 16 steps, each of which divides by a standard deviation.
    np.testing.assert_allclose(found[0], np.linalg.norm(expected), rtol=1e-3)


def test_decay_of_a_power():
    norms = 3.0 * 10 ** (0.25 * np.arange(STEPS))[None]
    np.testing.assert_allclose(_decay(norms), [0.25], rtol=1e-12)
