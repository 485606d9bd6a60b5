"""Draw examples for the laws, run the layer on them in float64, and compare to twelve digits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

import jaxbn
from jaxbn import BatchNormParams, BatchNormState

# Epsilon 0 is refused. Beside a variance that is not tiny too, this one is lost in rounding and is as good as 0.
VANISHING = 1e-300
LAWS = settings(deadline=None, max_examples=25, derandomize=True)
SEEDS = st.integers(0, 2**32 - 1)
# Few values of what is compiled in, so that there are few programs.
EPSILONS = st.sampled_from([VANISHING, 0.3])
SHAPES = st.sampled_from([(3, 1), (8, 3), (200, 2)])
STDS = st.floats(-3, 3).map(lambda decades: 10.0**decades)
RATIOS = st.floats(-100, 100)
NONE = BatchNormParams(None, None)


def near(got, wanted, size=1.0, digits=12):
    """Equal to `digits` digits of `size`: of float64's 16, means of 100 deviations take 2, sums and products 1 or 2."""
    size = np.maximum(size, np.finfo(float).tiny)
    np.testing.assert_allclose(np.asarray(got) / size, np.asarray(wanted) / size, rtol=0, atol=10.0**-digits)


def all_near(got, wanted, size=1.0, digits=12):
    jax.tree.map(partial(near, size=size, digits=digits), got, wanted)


def standard(rng, shape):
    """Values of mean 0 and variance 1 along the rows, so that how hard an example is does not depend on chance."""
    z = rng.normal(size=shape)
    return (z - z.mean(0)) / z.std(0)


def example(seed, shape, std=1.0, ratio=0.0):
    """`(x, dy, scale, bias)`: x with the given std and ratio of mean to std; a scale of either sign, away from 0."""
    rng = np.random.default_rng(seed)
    scale = rng.choice([-1, 1], shape[-1:]) * rng.uniform(0.3, 3, shape[-1:])
    return (standard(rng, shape) + ratio) * std, rng.normal(size=shape), scale, rng.normal(size=shape[-1:])


def fresh(features, **options) -> BatchNormState:
    return jaxbn.bn_init(features, dtype=jnp.float64, **options)[1]


def compiled(*static):
    """`jax.jit`, with NumPy arrays as the result."""

    def wrap(function):
        run = jax.jit(function, static_argnames=static)
        return lambda *given, **options: jax.tree.map(np.asarray, run(*given, **options))

    return wrap


@compiled("epsilon", "ghost_batches")
def passes(x, dy, scale, bias, epsilon, **options):
    """`(y, (dx, dscale, dbias), state)` in training; the new state is that of the batch."""

    def layer(x, scale, bias):
        params, state = BatchNormParams(scale, bias), options.get("state", fresh(x.shape[-1]))
        given = {k: v for k, v in options.items() if k != "state"}
        return jaxbn.bn_apply(params, state, x, True, epsilon=epsilon, momentum=0.0, **given)

    y, pull, state = jax.vjp(layer, x, scale, bias, has_aux=True)
    return y, pull(dy), state
