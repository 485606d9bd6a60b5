"""Batch normalization for JAX: exact, lean, and the same on one device and on a thousand.

    params, state = jaxbn.bn_init(num_features)
    y, state = jaxbn.bn_apply(params, state, x, train=True)

How it is built, from the ground up; a file imports from lower floors only:

0. `_moments`: the count, mean and variance of a group of values, and how groups pool. `_scope`: whose values are a
   group, on one device and on many. `_momentum`: schedules of the running average. `_save_inputs`: what a
   rematerialized network keeps. `_check`: what may be passed.
1. `_normalize`: normalization by given statistics, and the one rule from which every derivative follows. `_complex`:
   the same for complex input, by JAX's own differentiation. `_renorm`: statistics tied to the running ones. `_state`:
   what is learned and what is averaged.
2. `_batch_norm`: `bn_apply`. Take the moments, normalize, update the running ones. `_adapt`: statistics of other data,
   or of each example.
3. `_pool_updates`: one update from several microbatches. `_domains`: statistics for each of several domains.
   `_recalibrate`: moments of a stream of batches. `_fold`: evaluation as a part of the next linear layer. `_health`:
   what is wrong with a layer's statistics. `_whiten`: uncorrelated features. `_recurrent_state`, `_recurrent`: an LSTM
   with statistics for each step. `_flax`: what the Flax modules share.
4. `linen`, `nnx`: the same for Flax; storage and names only. `convert`: other libraries' checkpoints.
5. `_linen_model`, `_nnx_model`, and the files of both on folding, recalibration and health: all layers of a model.

`jaxbn.linen`, `jaxbn.nnx` and `jaxbn.convert` are imported by name; `import jaxbn` needs jax alone.
"""

from jaxbn._adapt import adapt, weighed_apply
from jaxbn._batch_moments import moments
from jaxbn._batch_norm import bn_apply
from jaxbn._domains import domain_apply, domain_init
from jaxbn._fold import fold, fold_into_next
from jaxbn._health import health
from jaxbn._health_report import Health, LayerHealth
from jaxbn._moments import Moments, pool, pool_named
from jaxbn._momentum import cumulative_average, zero_debiased
from jaxbn._pool_updates import pool_updates
from jaxbn._recalibrate import pool_batches
from jaxbn._recurrent import lstm_apply, lstm_step
from jaxbn._recurrent_state import LSTMCarry, LSTMParams, LSTMState, lstm_carry, lstm_init
from jaxbn._renorm import Renorm, renorm_warmup
from jaxbn._save_inputs import save_inputs
from jaxbn._state import BatchNormParams, BatchNormState, bn_init
from jaxbn._whiten import WhitenState, whiten_apply, whiten_init

__all__ = [
    "BatchNormParams",
    "BatchNormState",
    "Health",
    "LSTMCarry",
    "LSTMParams",
    "LSTMState",
    "LayerHealth",
    "Moments",
    "Renorm",
    "WhitenState",
    "adapt",
    "bn_apply",
    "bn_init",
    "cumulative_average",
    "domain_apply",
    "domain_init",
    "fold",
    "fold_into_next",
    "health",
    "lstm_apply",
    "lstm_carry",
    "lstm_init",
    "lstm_step",
    "moments",
    "pool",
    "pool_batches",
    "pool_named",
    "pool_updates",
    "renorm_warmup",
    "save_inputs",
    "weighed_apply",
    "whiten_apply",
    "whiten_init",
    "zero_debiased",
]
