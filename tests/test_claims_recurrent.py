"""Claim 12: gradients through time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.claims.judged.recurrent import _decay
from experiments.claims.measured.recurrent import ARMS, STEPS, gradients, order
from experiments.models import gaussian
from experiments.recurrent import lstm, outputs, pieces
from experiments.train import loss_of

pytestmark = pytest.mark.usefixtures("ordinary_promotion")
HIDDEN, ROWS = 3, 4


@pytest.mark.parametrize("arm", ["none", "batch"])
def test_gradients_are_those_of_a_push(arm):
    """The loss moves by the norm of the gradient where h is pushed along it, at any step."""
    rng = np.random.default_rng(0)
    images, labels = rng.random((ROWS, 2 * STEPS), np.float32), np.arange(ROWS, dtype=np.int32)
    first = 0.5 * jax.random.normal(jax.random.key(1), (ROWS, HIDDEN))
    how, permuted = ARMS[arm], order(2 * STEPS)
    model = lstm(how, HIDDEN, STEPS, gaussian(1.0, he=True), 2 * STEPS, permuted)
    params, state = model.init(jax.random.key(0))
    found = jax.jit(lambda p, s: gradients(how, p, s, images, labels, first))(params, state)
    start = jnp.zeros((STEPS, ROWS, HIDDEN)).at[0].set(first)

    @jax.jit
    def loss(added):
        last = outputs(how, params, state, pieces(images, STEPS, permuted), added)[-1]
        return loss_of(last @ params["head"] + params["last"], labels)

    gradient = jax.grad(loss)(start)
    for at in (0, STEPS - 1):
        norm = np.linalg.norm(gradient[at])
        step = 1e-2 / norm  # so that the loss moves by some 0.01, far above float32's rounding
        push = jnp.zeros_like(start).at[at].set(step * gradient[at] / norm)
        if float(step) < 0.1:  # where a push of this size is still small
            # Central differences: the second derivative drops out.
            moved = (loss(start + push) - loss(start - push)) / (2 * step)
            np.testing.assert_allclose(moved, norm, rtol=0.05)
        np.testing.assert_allclose(found[at], norm, rtol=1e-4)


def test_decay_of_a_power():
    norms = 3.0 * 10 ** (0.25 * np.arange(STEPS))[None]
    np.testing.assert_allclose(_decay(norms), [0.25], rtol=1e-12)
