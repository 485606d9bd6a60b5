"""Whiten in float64 NumPy, from the definition, and hold the inputs of the tests of whitening."""

import jax.numpy as jnp
import numpy as np

from jaxbn import BatchNormParams
from jaxbn.whitening import whiten_init

ROWS, FEATURES = 64, 4
rng = np.random.default_rng(0)
MIX = rng.standard_normal((FEATURES, FEATURES))
X = (rng.standard_normal((ROWS, FEATURES)) @ MIX + [0, 3, -5, 100]).astype(np.float32)
G = rng.standard_normal(X.shape).astype(np.float32)
PARAMS = BatchNormParams(jnp.array([1.0, -2.0, 0.5, 1.0]), jnp.array([0.0, 1.0, 2.0, 3.0]))
_, STATE = whiten_init(FEATURES)
NONE = BatchNormParams(None, None)


def covariance(y):
    y = np.asarray(y, np.float64).reshape(-1, y.shape[-1])
    return np.cov(y.T, bias=True)


def exact(x, steps, epsilon=1e-5, mean=None, cov=None):
    """Compute the layer without parameters in float64, from the definition."""
    x = np.asarray(x, np.float64)
    mean = x.mean(0) if mean is None else mean
    s = (np.cov(x.T, bias=True) if cov is None else cov) + epsilon * np.eye(x.shape[1])
    a, p, eye = s / np.trace(s), np.eye(len(s)), np.eye(len(s))
    for _ in range(steps):
        q = (3 * eye - a) / 2
        a, p = a @ q @ q, p @ q
    return (x - mean) @ p / np.sqrt(np.trace(s))
