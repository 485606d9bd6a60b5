"""Hold the batches on which our modules and flax's are compared, and compare their results."""

from typing import Any

import chex
import jax
import numpy as np
from flax import nnx

import jaxbn.nnx

KEY: Any = jax.random.key(0)
X = np.asarray(np.random.default_rng(0).normal(size=(8, 3)), np.float32)
TWO = np.stack([X, 2 * X + 1])
STATS = ["batch_stats"]


def make(norm: Any = jaxbn.nnx.BatchNorm, **kwargs: Any) -> Any:
    return norm(**{"num_features": 3, "rngs": nnx.Rngs(0), **kwargs})


def stats(module):
    """Copy the running statistics as plain arrays."""
    return nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))


def close(got, wanted, tolerance=3e-6):
    chex.assert_trees_all_equal_shapes_and_dtypes(got, wanted)
    chex.assert_trees_all_close(got, wanted, rtol=tolerance, atol=tolerance)
