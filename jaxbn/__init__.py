"""Batch normalization for JAX: exact, lean, and the same on one device and on a thousand.

    params, state = jaxbn.bn_init(num_features)
    y, state = jaxbn.bn_apply(params, state, x, train=True)

How it is built, from the ground up; a file imports from lower floors only:

0. `_moments`: the count, mean and variance of a group of values, and how groups pool. `_momentum`: schedules of the
   running average. `_save_inputs`: what a rematerialized network keeps. `_check`: what may be passed.
1. `_normalize`: normalization by given statistics, and the one rule from which every derivative follows. `_complex`:
   the same for complex input, by JAX's own differentiation.
2. `_batch_norm`: `bn_init` and `bn_apply`. Take the moments, normalize, update the running ones.
3. `_pool_updates`: one update from several microbatches. `_flax`: what the two Flax modules share.
4. `linen`, `nnx`: the same for Flax; storage and names only. `convert`: other libraries' checkpoints.
5. `_linen_model`, `_nnx_model`: all layers of a model at once.

`jaxbn.linen`, `jaxbn.nnx` and `jaxbn.convert` are imported by name; `import jaxbn` needs jax alone.
"""

from jaxbn._batch_norm import BatchNormParams, BatchNormState, bn_apply, bn_init
from jaxbn._moments import Moments, moments, pool, pool_named
from jaxbn._momentum import cumulative_average, zero_debiased
from jaxbn._pool_updates import pool_updates
from jaxbn._save_inputs import save_inputs

__all__ = [
    "BatchNormParams",
    "BatchNormState",
    "Moments",
    "bn_apply",
    "bn_init",
    "cumulative_average",
    "moments",
    "pool",
    "pool_named",
    "pool_updates",
    "save_inputs",
    "zero_debiased",
]
