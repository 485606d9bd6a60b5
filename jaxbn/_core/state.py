"""What a layer learns, and what it averages over batches."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import register_namedtuple_serialization
from jax.typing import ArrayLike, DTypeLike

from jaxbn._core import check
from jaxbn._core.layout import sharded_as
from jaxbn._core.moments import Moments


@partial(register_namedtuple_serialization, serialized_name="jaxbn.BatchNormParams")
class BatchNormParams(NamedTuple):
    """What is learned: `scale` (gamma) and `bias` (beta), `[*features]`; None where the layer has none."""

    scale: jax.Array | None
    bias: jax.Array | None


@partial(register_namedtuple_serialization, serialized_name="jaxbn.BatchNormState")
class BatchNormState(NamedTuple):
    """What is averaged over batches: `mean` and `var`, `[*features]`, and `count`, the int32 number of updates."""

    mean: jax.Array
    var: jax.Array
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]


def bn_init(
    num_features: int | Sequence[int],
    *,
    dtype: DTypeLike = jnp.float32,
    scale: ArrayLike | None = 1.0,
    bias: ArrayLike | None = 0.0,
    mean: ArrayLike = 0.0,
    var: ArrayLike = 1.0,
) -> tuple[BatchNormParams, BatchNormState]:
    """Parameters and state of a batch normalization layer.

    Args:
        num_features: the size of the feature axis, or a tuple of sizes in the order of `bn_apply`'s `axis`.
        dtype: of scale and bias, floating point. The state is float32, or float64 if `dtype` is. For complex input
            complex; the variance is real.
        scale: initial value, broadcast to `[*num_features]`; None for a layer without it.
        bias: likewise.
        mean: initial running mean, broadcast to `[*num_features]`.
        var: initial running variance, likewise.

    Returns:
        `(params, state)`.

    Raises:
        TypeError: `num_features` is not made of ints, or `dtype` is not floating point.
        ValueError: a negative size, or an initial value of another shape.

    Example:
        >>> import jaxbn
        >>> params, state = jaxbn.bn_init(3, bias=None)
        >>> print(params.scale, params.bias, state.mean, state.var, state.count)
        [1. 1. 1.] None [0. 0. 0.] [1. 1. 1.] 0
    """
    shape = check.sizes(num_features)
    try:
        dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
    except TypeError:
        raise TypeError(f"`dtype` must be a floating point dtype; got {dtype!r}.") from None
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"`dtype` must be floating point; got {dtype}.")
    kept = check.accumulation_dtype(dtype)
    params = BatchNormParams(
        None if scale is None else check.initial("scale", scale, dtype, shape),
        None if bias is None else check.initial("bias", bias, dtype, shape),
    )
    state = BatchNormState(
        check.initial("mean", mean, kept, shape),
        check.initial("var", var, check.real(kept), shape),
        jnp.zeros((), jnp.int32),
    )
    return params, state


def update_state(
    state: BatchNormState, m: Moments, momentum: tuple[Any, Any], unbiased: bool, allowed: bool | jax.Array
) -> BatchNormState:
    """Return the state after one more batch of moments `m`.

    A feature takes part if it has values, their second moment is finite, and so is what would be stored.
    """
    m = jax.tree.map(partial(sharded_as, state.mean), m)
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
    # What is not kept at all may be anything, infinity too.
    return jnp.where(kept == 0, value, mixed).astype(running.dtype)
