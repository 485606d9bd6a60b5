"""Batch normalization for JAX: exact, lean, and the same on one device and on a thousand.

    params, state = jaxbn.bn_init(num_features)
    y, state = jaxbn.bn_apply(params, state, x, train=True)

`bn_apply` (in `_batch_norm`) is the algorithm: take the moments, normalize by them, update the running ones.

* The moments: `_batch_moments` of an array, `_moments` of groups and how they pool, `_reduction` says which entries and
  devices share them.
* The normalization and its derivative: `_normalize`; `_epilogue` is what follows it inside the layer.
* The state: `_state`, and `_momentum`, schedules of the running average.
* Around these: `_ghost` batches, `_renorm`alization, `_complex` input.
* What JAX lacks: `_linear` functions with a transpose by hand, a choice by `_platform`, `_any_member` of a `vmap`.
  `_layout` of arrays, `_save_inputs` for rematerialization, `_check` of arguments.
* More: `_adapt`, `_pool_updates`, `_recalibrate` (other data), `_domains`, `_whiten`, `_recurrent`
  (variants), `_fold`, `_health` (evaluation), `_linen*`, `_nnx*` (Flax: storage and names), `_convert*` (others).

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
