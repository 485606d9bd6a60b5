"""The update of the running statistics."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxbn._core import check
from jaxbn._core.layout import shard_like
from jaxbn._core.moments import Moments, broadcast_fields
from jaxbn._core.momentum import Momentum, split_momentum
from jaxbn._core.state import BatchNormState, check_record


def update_state(
    state: BatchNormState, m: Moments, *, momentum: Momentum = 0.99, unbiased_running_var: bool = False
) -> BatchNormState:
    """Update the running statistics by given moments.

    `running <- momentum * running + (1 - momentum) * batch` for mean and variance, and `count <- count + 1`. The last
    of the three parts of batch normalization: `moments`, `normalize`, `update_state`.

    Args:
        state: from `bn_init` or an earlier update; `mean` and `var` `[*features]`, `count` `[]`.
        m: moments of the batch, `[*features]`, from `moments`, `pool` or `pool_named`.
        momentum: the fraction of the running value that is *kept*, in [0, 1], or a function of `state.count` that
            gives it, such as `zero_debiased(0.99)` and `cumulative_average`.
        unbiased_running_var: average `var * n / (n - 1)` with n = `m.count`, as PyTorch does.

    Returns:
        The new state, of the same shapes and dtypes, without gradient. A feature keeps its statistics if it has no
        values in `m`, with `unbiased_running_var` if it has a single one, or if its moments are not finite or not
        representable in the state's dtype; `count` grows if any feature's statistics changed.

    Raises:
        TypeError, ValueError: an argument of another type, shape or range than stated; the message says which.

    Example:
        Statistics for each of two domains, by composition:

        >>> import jax, jax.numpy as jnp, jaxbn
        >>> params, state = jaxbn.bn_init(1)
        >>> states = {"source": state, "target": state}
        >>> def layer(states, domain, x):
        ...     m = jaxbn.moments(x)
        ...     new = jaxbn.update_state(states[domain], m, momentum=jaxbn.zero_debiased(0.99))
        ...     return jaxbn.normalize(params, m, x), {**states, domain: new}
        >>> y, states = layer(states, "target", jnp.array([[1.0], [3.0]]))
        >>> print(y.ravel().round(3), states["source"].mean, states["target"].mean)
        [-1.  1.] [0.] [2.]

    Ioffe and Szegedy 2015, "Batch normalization", algorithm 2. Conventions differ: this `momentum` is `1 - momentum` of
    PyTorch; the running variance is biased here, in Flax, Haiku and Keras, unbiased in PyTorch and in the paper.
    """
    state, m = fit_moments(state, m)
    keep_take = split_momentum(momentum, state.count)
    return update_running(state, m, keep_take, check.boolean("unbiased_running_var", unbiased_running_var), True)


def fit_moments(state: Any, m: Any) -> tuple[BatchNormState, Moments]:
    """Return the state, and `m` with fields of one shape, that of the state, and with its sharding."""
    state = check_record("state", state, "the state of `bn_init`", BatchNormState)
    if state.var.shape != state.mean.shape or np.shape(state.count) != ():
        raise ValueError(
            f"`state` must have mean and var of one shape, and a scalar count; got {[np.shape(v) for v in state]}."
        )
    m = broadcast_fields(m)
    if jnp.iscomplexobj(state.mean):
        raise TypeError(
            f"`state.mean` must be real, as `Moments` are; got {state.mean.dtype}. Use `bn_apply` to train."
        )
    if m.mean.shape != state.mean.shape:
        raise ValueError(
            f"`m` must have the shape of the state, {state.mean.shape}; got {m.mean.shape}. "
            "Take the moments of the inputs of this layer, along its `axis`."
        )
    return state, jax.tree.map(partial(shard_like, state.mean), m)


# Under `jit` as an eager call is then one program, not one for each operation.
@partial(jax.jit, static_argnums=3, inline=True)
def update_running(
    state: BatchNormState, m: Moments, momentum: tuple[Any, Any], unbiased: bool, allowed: bool | jax.Array
) -> BatchNormState:
    """Return the state after one more batch of moments `m`.

    A feature takes part if it has values, their second moment is finite, and so are the new running values.
    """
    m = jax.tree.map(partial(shard_like, state.mean), m)
    # n / (n - 1) of a single value is infinite: it has no unbiased variance, and does not take part.
    alone = m.count == 1
    var = m.var * (m.count / jnp.where(alone, 1, m.count - 1)) if unbiased else m.var
    takes_part = allowed & (m.count > 0) & jnp.isfinite(var + jnp.square(jnp.abs(m.mean)))
    takes_part = takes_part & ~alone if unbiased else takes_part
    mean, var = average(momentum, state.mean, m.mean), average(momentum, state.var, var)
    takes_part = takes_part & jnp.isfinite(mean) & jnp.isfinite(var)
    new = BatchNormState(
        jnp.where(takes_part, mean, state.mean),
        jnp.where(takes_part, var, state.var),
        state.count + jnp.any(takes_part).astype(state.count.dtype),
    )
    return lax.stop_gradient(new)


def average(momentum: tuple[Any, Any], running: jax.Array, value: jax.Array) -> jax.Array:
    """Return the running average after one more value, in the dtype of the running one."""
    # Computed in the dtype of the statistics: in bfloat16 0.999 would be 1.
    kept, taken = (jnp.asarray(v).astype(value.dtype) for v in momentum)
    mixed = kept * running.astype(value.dtype) + taken * value
    # With a kept fraction of 0 the running value may be anything, infinity too.
    return jnp.where(kept == 0, value, mixed).astype(running.dtype)
