"""Floor 1: what a layer learns, and what it averages over batches."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxbn import _check
from jaxbn._moments import Moments


class BatchNormParams(NamedTuple):
    """What is learned: `scale` (gamma) and `bias` (beta), `[*features]`; None where the layer has none."""

    scale: jax.Array | None
    bias: jax.Array | None


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
    shape = _check.sizes(num_features)
    try:
        dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
    except TypeError:
        raise TypeError(f"`dtype` must be a floating point dtype; got {dtype!r}.") from None
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"`dtype` must be floating point; got {dtype}.")
    kept = _check.working(dtype)
    params = BatchNormParams(
        None if scale is None else _check.initial("scale", scale, dtype, shape),
        None if bias is None else _check.initial("bias", bias, dtype, shape),
    )
    state = BatchNormState(
        _check.initial("mean", mean, kept, shape),
        _check.initial("var", var, _check.real(kept), shape),
        jnp.zeros((), jnp.int32),
    )
    return params, state


def updated(
    state: BatchNormState, batch: Moments, momentum: tuple[Any, Any], unbiased: bool, allowed: bool | jax.Array
) -> BatchNormState:
    """The state after one more batch. A feature takes part if it has values and their second moment is finite."""
    batch = jax.tree.map(partial(sharded_as, state.mean), batch)
    # n / (n - 1) of a single value is infinite: it has no unbiased variance, and does not take part.
    var = batch.var * (batch.count / (batch.count - 1)) if unbiased else batch.var
    takes_part = allowed & (batch.count > 0) & jnp.isfinite(var + jnp.square(jnp.abs(batch.mean)))

    average = partial(averaged, momentum, takes_part)
    count = state.count + jnp.any(takes_part).astype(state.count.dtype)
    return lax.stop_gradient(BatchNormState(average(state.mean, batch.mean), average(state.var, var), count))


def averaged(momentum: tuple[Any, Any], takes_part: jax.Array, running: jax.Array, value: jax.Array) -> jax.Array:
    """The running value after one more, where that takes part."""
    # In the dtype of the statistics: in bfloat16 0.999 would be 1.
    kept, taken = (jnp.asarray(v).astype(value.dtype) for v in momentum)
    mixed = kept * running.astype(value.dtype) + taken * value
    # What is not kept at all may be anything, infinity too.
    mixed = jnp.where(kept == 0, value, mixed)
    return jnp.where(takes_part, mixed.astype(running.dtype), running)


def sharded_as(like: jax.Array, v: jax.Array) -> jax.Array:
    """`v` with the sharding of `like`, where the mesh's is explicit: the features of x may be spread otherwise."""
    own, to = jax.typeof(v).sharding, jax.typeof(like).sharding
    if own.spec == to.spec:
        return v
    return jax.sharding.reshard(v, own.update(spec=to.spec) if to.mesh.empty else to)
