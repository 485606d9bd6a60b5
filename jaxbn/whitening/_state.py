"""Parameters and state of a whitening layer."""

import operator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.export import register_namedtuple_serialization
from jax.typing import ArrayLike, DTypeLike

from jaxbn._core import check
from jaxbn._core.state import BatchNormParams, bn_init, check_record


@partial(register_namedtuple_serialization, serialized_name="jaxbn.whitening.WhitenState")
class WhitenState(NamedTuple):
    """Running statistics: `mean` `[features]`, `cov` `[groups, size, size]`, and `count`, of updates."""

    mean: jax.Array
    cov: jax.Array
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]


def whiten_init(
    num_features: int,
    *,
    group_size: int | None = None,
    dtype: DTypeLike = jnp.float32,
    scale: ArrayLike | None = 1.0,
    bias: ArrayLike | None = 0.0,
    mean: ArrayLike = 0.0,
) -> tuple[BatchNormParams, WhitenState]:
    """Initialize the parameters and the state of a whitening layer.

    Args:
        num_features: the size of the feature axis.
        group_size: the number of neighbouring features that are whitened together; all by default. Must divide
            `num_features`.
        dtype, scale, bias, mean: as for `bn_init`; but `dtype` is real.

    Returns:
        `(params, state)`; the covariance starts as the identity.

    Raises:
        TypeError, ValueError: `group_size` does not divide `num_features`, `dtype` is complex, or as `bn_init`.

    Example:
        >>> import jaxbn
        >>> params, state = jaxbn.whitening.whiten_init(8, group_size=4)
        >>> params.scale.shape, state.cov.shape
        ((8,), (2, 4, 4))

    Huang et al. 2018, "Decorrelated batch normalization", whitens by groups; Huang et al. 2019, "Iterative
    normalization: beyond standardization towards efficient whitening", as `whiten_apply` does.
    """
    shape = check.sizes(num_features)
    if len(shape) != 1:
        raise ValueError(f"`num_features` must be one number: whitening has one feature axis; got {num_features!r}.")
    try:
        size = operator.index(shape[0] if group_size is None else group_size)
    except TypeError:
        raise TypeError(f"`group_size` must be an int; got {group_size!r}.") from None
    if size < 1 or shape[0] % size:
        raise ValueError(f"`group_size` must be positive and divide the {shape[0]} features; got {group_size!r}.")
    params, state = bn_init(shape, dtype=dtype, scale=scale, bias=bias, mean=mean)
    if jnp.iscomplexobj(state.mean):
        raise TypeError(f"`dtype` must be real; got {jnp.dtype(dtype)}.")
    cov = jnp.broadcast_to(jnp.eye(size, dtype=state.mean.dtype), (shape[0] // size, size, size))
    return params, WhitenState(state.mean, jnp.array(cov), state.count)


def check_axis(axis: Any, ndim: int) -> int:
    """Return the feature axis of an input of `ndim` dimensions."""
    axes = check.axes(axis, ndim)
    if len(axes) != 1:
        raise ValueError(f"`axis` must be one axis: whitening has one feature axis; got {axis!r}. Reshape `x` for it.")
    return axes[0]


def check_whitening(params: Any, state: Any, features: int) -> tuple[int, int]:
    """Return the number of groups and their size, after a check that params and state fit the features."""
    if not isinstance(state, WhitenState):
        raise TypeError(f"`state` must be the state of `whiten_init`; got {type(state).__name__}.")
    check_record("state", state, "the state of `whiten_init`", WhitenState)
    check_record("params", params, "the params of `whiten_init`", BatchNormParams)
    if any(jnp.iscomplexobj(v) for v in (*params, *state)):
        raise TypeError("`params` and `state` must be real; got complex ones.")
    groups, size, other = jnp.shape(state.cov) if jnp.ndim(state.cov) == 3 else (0, 0, 1)
    shapes = [jnp.shape(v) for v in (*params, state.mean) if v is not None]
    if groups * size != features or size != other or any(shape != (features,) for shape in shapes):
        raise ValueError(
            f"`params` and `state` must be made for the {features} features of `x`; got a covariance of shape "
            f"{jnp.shape(state.cov)} and {shapes}. Make them by `whiten_init({features})`, or name the feature axis."
        )
    return groups, size
