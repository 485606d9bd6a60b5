"""Exact laws of variants: where they are the layer itself, and other layers that it is in another shape."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from hypothesis import given
from hypothesis import strategies as st
from law_cases import (
    EPSILONS,
    LAWS,
    NONE,
    RATIOS,
    SEEDS,
    STDS,
    VANISHING,
    all_near,
    compiled,
    example,
    fresh,
    near,
    passes,
    standard,
)

import jaxbn
from jaxbn import Renorm

pytestmark = pytest.mark.usefixtures("float64")


@LAWS
@given(SEEDS, STDS, RATIOS)
def test_variants_that_change_nothing(seed, std, ratio):
    """One ghost batch, a mask of ones, closed renormalization: in value, gradient and state."""
    given = *example(seed, (8, 3), std, ratio), 0.3
    y, (dx, *rest), state = passes(*given)
    closed = Renorm(jnp.ones(()), jnp.zeros(()))
    for options in ({"ghost_batches": 1}, {"mask": np.ones((8, 1), bool)}, {"renorm": closed}):
        other, (other_dx, *other_rest), other_state = passes(*given, **options)
        near(other, y, 10)
        near(other_dx, dx, 10 * np.abs(dx).max(0) + 1 / std)
        all_near(other_rest, rest, 100)
        near(other_state.mean, state.mean, std)
        near(other_state.var, state.var, std**2)


@LAWS
@given(SEEDS, EPSILONS, STDS, st.floats(1, 4), st.floats(0, 3))
def test_renormalization_is_the_layer_with_other_parameters(seed, epsilon, std, r_max, d_max):
    """y = scale (x_hat r + d) + bias has the gradient of the layer with scale `scale r`; open, y is evaluation's."""
    x, dy, scale, bias = example(seed, (8, 3), std, 1.0)
    running = std * np.array([0.5, 2.0, 3.0])
    state = fresh(3, mean=running, var=running**2)
    s = np.sqrt(running**2 + epsilon)
    unit = x - x.mean(0)
    for bounds in ((r_max, d_max), (np.inf, np.inf)):
        r = np.clip(np.sqrt(std**2 + epsilon) / s, 1 / bounds[0], bounds[0])
        d = np.clip((std - running) / s, -bounds[1], bounds[1])
        renorm = Renorm(*map(jnp.asarray, map(float, bounds)))
        y, (dx, dg, db), _ = passes(x, dy, scale, bias, epsilon, renorm=renorm, state=state)
        plain, (plain_dx, plain_dg, plain_db), _ = passes(x, dy, scale * r, scale * d + bias, epsilon)
        near(y, plain, 100)
        near(dx, plain_dx, 10 * np.abs(plain_dx).max(0) + 1 / std)
        near(dg, r * plain_dg + d * plain_db, 100)
        near(db, plain_db, 100)
    near(y, scale * (unit + (std - running)) / s + bias, 100)


EPSILON = 1e-2


@pytest.mark.usefixtures("ordinary_promotion")
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_norm_is_the_layer_by_example_and_group(groups):
    """One group of 6 channels is layer norm over positions and channels, six are instance norm. Value and gradient."""
    rng = np.random.default_rng(groups)
    x, dy = rng.normal(3, 2, (2, 2, 5, 6))
    split = (2, 5, groups, 6 // groups)
    by_group = {"axis": (0, 2), "epsilon": EPSILON}

    def ours(x):
        y, _ = jaxbn.bn_apply(NONE, fresh((2, groups)), x.reshape(split), True, **by_group)
        return y.reshape(x.shape)

    plain = {"epsilon": EPSILON, "use_bias": False, "use_scale": False, "use_fast_variance": False}
    kinds = [linen.GroupNorm(groups, **plain)]
    if groups == 1:
        kinds += [linen.LayerNorm(reduction_axes=(1, 2), feature_axes=-1, **plain)]
    if groups == 6:
        kinds += [linen.InstanceNorm(**plain)]

    @compiled()
    def pairs(x, dy):
        """`(y, dx)` of ours and of the others."""
        pulled = [jax.vjp(f, x) for f in (ours, *(partial(kind.apply, {}) for kind in kinds))]
        return [(y, pull(dy)[0]) for y, pull in pulled]

    own, *others = pairs(x, dy)
    for other in others:
        all_near(own, other, 10)


@compiled("steps", "epsilon")
def whitened(x, dy, steps, epsilon):
    """`(y, dx)` in training."""

    def layer(x):
        state = jaxbn.whitening.whiten_init(3, dtype=jnp.float64)[1]
        return jaxbn.whitening.whiten_apply(NONE, state, x, True, iterations=steps, epsilon=epsilon)[0]

    y, pull = jax.vjp(layer, x)
    return y, pull(dy)[0]


@pytest.mark.slow
@LAWS
@given(SEEDS, st.floats(0, 2))
def test_limits_of_whitening(seed, decades):
    """No iteration divides by sqrt(tr S). Many give S^-1/2: the identity as covariance, but for epsilon."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    z, _ = np.linalg.qr(standard(rng, (8, 3)))
    v = 10.0 ** np.array([0, -decades / 2, -decades])
    x = (z - z.mean(0)) * np.sqrt(8 * v) @ basis.T + [0, 3, -50]
    dy = rng.normal(size=(8, 3))
    near(np.cov(x.T, bias=True), basis * v @ basis.T)
    for epsilon in (VANISHING, 0.3):
        y, dx = whitened(x, dy, 0, epsilon)
        near(y, (x - x.mean(0)) / np.sqrt(np.sum(v + epsilon)), 10)
        near(np.trace(np.cov(y.T, bias=True)), v.sum() / np.sum(v + epsilon))
        near(dx.sum(0), 0, 10)
        y, dx = whitened(x, dy, 40, epsilon)
        near(y, (x - x.mean(0)) @ (basis / np.sqrt(v + epsilon)) @ basis.T, 10, digits=11)
        near(np.cov(y.T, bias=True), basis * (v / (v + epsilon)) @ basis.T, digits=11)
        near(dx.sum(0), 0, 1000)


@pytest.mark.slow
@LAWS
@given(SEEDS, st.sampled_from([0.05, -7.0]))
def test_scale_of_whitened_input(seed, a):
    """After few iterations too: with a^2 epsilon the same but for the sign of `a`, and 1 / |a| of the gradient."""
    rng = np.random.default_rng(seed)
    x, dy = rng.normal(1, 2, (2, 8, 3))
    y, dx = whitened(x, dy, 3, 0.3)
    other, other_dx = whitened(a * x, dy, 3, a * a * 0.3)
    near(other, np.sign(a) * y, 10)
    near(other_dx, dx / abs(a), 10 / abs(a))
