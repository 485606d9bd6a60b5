"""Claim 11: the norm with moving averages in both directions, against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.claims.small_batches.measure import EPSILON, KEEP, Moving, centred
from experiments.training.layers import Pass, plain
from experiments.training.models import gaussian, mlp

pytestmark = pytest.mark.usefixtures("ordinary_promotion")
PARTS, ROWS, FEATURES, RATE, MOMENTUM, WARM, STEPS = 2, 3, 4, 0.1, 0.9, 1, 4
rng = np.random.default_rng(0)
# Batches of growing size, so that the correction r is neither 1 nor at its limit of 5.
XS = (rng.standard_normal((STEPS, PARTS * ROWS, FEATURES)) * np.arange(1, STEPS + 1)[:, None, None]).astype(np.float32)
DY = rng.standard_normal((PARTS * ROWS, FEATURES)).astype(np.float32)
SCALE = rng.uniform(0.5, 2, FEATURES).astype(np.float32)


def test_moving_averages_in_both_directions():
    made = Moving(PARTS, MOMENTUM, RATE, WARM, lambda v: v).layer()
    params, state = made.init(FEATURES)
    params["affine"] = params["affine"]._replace(scale=jnp.asarray(SCALE))

    @jax.jit
    def step(params, state, x):
        y, pull, state = jax.vjp(lambda p, v: made.apply(p, state, v, Pass(train=True)), params, x, has_aux=True)
        moved, dx = pull(jnp.asarray(DY))
        return y, dx, moved, state

    squares, running, q = [], np.ones(FEATURES), np.zeros((PARTS, FEATURES))
    for t, x in enumerate(XS):
        y, dx, moved, state = step(params, state, jnp.asarray(x))
        parts, dy = (v.astype(np.float64).reshape(PARTS, ROWS, FEATURES) for v in (x, DY))
        squares.append((parts**2).mean(1))
        weights = KEEP ** np.arange(t, -1, -1)
        s = np.sqrt(np.einsum("t,tpf->pf", weights, np.array(squares)) / weights.sum() + EPSILON)
        r = np.ones_like(s) if t < WARM else np.clip(s / np.sqrt(running + EPSILON), 1 / 5, 5)
        z = parts / s[:, None]
        dz = SCALE * r[:, None] * dy
        q = KEEP * q + (1 - KEEP) * (dz * z).mean(1)
        running = MOMENTUM * running + (1 - MOMENTUM) * squares[-1].mean(0)
        # Some tens of float32 roundings of values of about 1.
        np.testing.assert_allclose(y, (SCALE * r[:, None] * z).reshape(y.shape), atol=1e-5)
        np.testing.assert_allclose(dx, ((dz - z * q[:, None]) / s[:, None]).reshape(y.shape), atol=1e-5)
        # Plain SGD of that rate is what moves the backward average.
        params["q"] = params["q"] - RATE * moved["q"]
        np.testing.assert_allclose(params["q"], q, atol=1e-5)
        np.testing.assert_allclose(state["running"], running, rtol=1e-5)
    evaluated, same = made.apply(params, state, jnp.asarray(XS[0][:1]), Pass(train=False))
    np.testing.assert_allclose(evaluated, SCALE * XS[0][:1] / np.sqrt(running + EPSILON), rtol=1e-5, atol=1e-6)
    assert same is state


def test_centred_kernels():
    """An input that is shifted by a constant changes nothing before the last layer."""
    model = centred(mlp([plain(jnp.tanh)], (3,), gaussian(1.0, he=True), FEATURES), 1)
    params, state = model.init(jax.random.key(0))
    given, shifted = (model.apply(params, state, v, False, None)[0] for v in (XS[0], XS[0] + 7))
    np.testing.assert_allclose(given, shifted, atol=1e-4)  # roundings of 7 times a kernel of 1
    assert np.max(np.abs(given)) > 0.1
