"""Make normalizations to fold, and compute in float64 what they do after a layer."""

import jax
import jax.numpy as jnp
import numpy as np
from oracle import evaluation

import jaxbn


def dense(x, kernel):
    return jnp.matmul(x, kernel, precision="highest")


def layer(rng, features, ratio=1.0, present=(True, True), dtype=jnp.float32):
    """Make a normalization of some age; its mean is `ratio` deviations, its scale of both signs."""
    var = rng.uniform(0.1, 4, features)
    params, state = jaxbn.bn_init(
        features,
        dtype=dtype,
        scale=rng.normal(1, 1, features) if present[0] else None,
        bias=rng.normal(size=features) if present[1] else None,
        mean=ratio * np.sqrt(var) * rng.choice([-1, 1], features),
        var=var,
    )
    return params, state


def exact(linear, *arrays):
    """Apply a linear layer in float64."""
    with jax.enable_x64(True):
        return np.asarray(linear(*(jnp.asarray(np.asarray(v, np.float64)) for v in arrays)))


def normalized(params, state, h, axis=-1, epsilon=1e-5):
    parts = [None if v is None else np.asarray(v, np.float64) for v in params]
    return evaluation(h, state.mean, state.var, *parts, axis=axis, epsilon=epsilon)


def plus(y, bias):
    return np.asarray(y) + np.asarray(bias)


def far(got, wanted):
    """Return the largest error, relative to the largest output."""
    return np.max(np.abs(np.asarray(got, np.float64) - wanted)) / np.max(np.abs(wanted))
