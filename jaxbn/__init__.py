"""Batch normalization for JAX: exact, lean, and the same on one device and on a thousand.

    params, state = jaxbn.bn_init(num_features)
    y, state = jaxbn.bn_apply(params, state, x, train=True)

How it is built, from the ground up, one file a floor:

* `_moments`: the count, mean and variance of a group of values, and how groups pool.
* `_normalize`: normalization by given statistics, and the one rule from which every derivative follows.
* `_batch_norm`: `bn_init` and `bn_apply`. Take the moments, normalize, update the running ones.
* `linen`: the same for Flax; storage and names only.
"""

from jaxbn._batch_norm import BatchNormParams as BatchNormParams
from jaxbn._batch_norm import BatchNormState as BatchNormState
from jaxbn._batch_norm import bn_apply as bn_apply
from jaxbn._batch_norm import bn_init as bn_init
from jaxbn._moments import Moments as Moments
from jaxbn._moments import moments as moments
from jaxbn._moments import pool as pool
from jaxbn._moments import pool_named as pool_named
from jaxbn._momentum import cumulative_average as cumulative_average
from jaxbn._momentum import zero_debiased as zero_debiased
from jaxbn._pool_updates import pool_updates as pool_updates
