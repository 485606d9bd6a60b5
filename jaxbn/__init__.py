"""Batch normalization for JAX: exact, lean, and the same on one device and on a thousand.

    params, state = jaxbn.bn_init(num_features)
    y, state = jaxbn.bn_apply(params, state, x, train=True)

or composed of its parts, `moments`, `normalize` and `update_state`.

Each package imports from those above it only:

    jaxbn._core                           the algorithm; `batch_norm.py` first
    jaxbn.domains, .whitening, .lstm      variants with arrays of their own
    jaxbn.statistics                      running statistics from other data
    jaxbn.inference, .diagnostics         folding; diagnosis of evaluation
    jaxbn._flax                           shared by linen and nnx: call, tools
    jaxbn.linen, jaxbn.nnx                modules; fold, health, recalibrate
    jaxbn.convert                         checkpoints of other libraries

`jaxbn.linen`, `jaxbn.nnx` and `jaxbn.convert` are imported by name; `import jaxbn` needs jax alone.
"""

from importlib.metadata import version

from jaxbn import diagnostics, domains, inference, lstm, statistics, whitening
from jaxbn._core.batch_moments import moments
from jaxbn._core.batch_norm import bn_apply
from jaxbn._core.moments import Moments, pool, pool_named
from jaxbn._core.momentum import cumulative_average, zero_debiased
from jaxbn._core.normalize import normalize
from jaxbn._core.pool_updates import pool_updates
from jaxbn._core.renorm import Renorm, renorm_warmup
from jaxbn._core.save_inputs import save_inputs
from jaxbn._core.state import BatchNormParams, BatchNormState, bn_init
from jaxbn._core.update_state import update_state

__version__ = version("jaxbn")

__all__ = [
    "BatchNormParams",
    "BatchNormState",
    "Moments",
    "Renorm",
    "bn_apply",
    "bn_init",
    "cumulative_average",
    "diagnostics",
    "domains",
    "inference",
    "lstm",
    "moments",
    "normalize",
    "pool",
    "pool_named",
    "pool_updates",
    "renorm_warmup",
    "save_inputs",
    "statistics",
    "update_state",
    "whitening",
    "zero_debiased",
]
