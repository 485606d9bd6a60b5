"""Parameters and state of a layer: scale and bias, and the running statistics."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.export import register_namedtuple_serialization
from jax.typing import ArrayLike, DTypeLike

from jaxbn._core import check


@partial(register_namedtuple_serialization, serialized_name="jaxbn.BatchNormParams")
class BatchNormParams(NamedTuple):
    """Learned parameters: `scale` (gamma) and `bias` (beta), `[*features]`; None where the layer has none."""

    scale: jax.Array | None
    bias: jax.Array | None


@partial(register_namedtuple_serialization, serialized_name="jaxbn.BatchNormState")
class BatchNormState(NamedTuple):
    """Running statistics: `mean` and `var`, `[*features]`, and `count`, the int32 number of updates."""

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
    """Initialize the parameters and the state of a batch normalization layer.

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
        None if scale is None else _check_initial("scale", scale, dtype, shape),
        None if bias is None else _check_initial("bias", bias, dtype, shape),
    )
    state = BatchNormState(
        _check_initial("mean", mean, kept, shape),
        _check_initial("var", var, check.real(kept), shape),
        jnp.zeros((), jnp.int32),
    )
    return params, state


def check_params(x: jax.Array, params: Any, axis: tuple[int, ...], batch: tuple[int, ...] = ()) -> BatchNormParams:
    """Return `params`, checked to fit `x` with features along `axis` and, maybe, examples along `batch`."""
    params = check_record("params", params, "the params of `bn_init`", BatchNormParams)
    features, by_example = (tuple(x.shape[a] for a in axes) for axes in (axis, (*batch, *axis)))
    for name in BatchNormParams._fields:
        if getattr(params, name) is not None:
            _check_entry(f"params.{name}", getattr(params, name), x, axis, features, by_example)
    return params


def check_state(
    x: jax.Array, state: Any, axis: tuple[int, ...], name: str = "state", kind: str = "the state of `bn_init`"
) -> BatchNormState:
    """Return `state`, the argument `name`, checked to fit `x` with features along `axis`."""
    state = check_record(name, state, kind, BatchNormState)
    features = tuple(x.shape[a] for a in axis)
    for field in BatchNormState._fields:
        wanted = () if field == "count" else features
        _check_entry(f"{name}.{field}", getattr(state, field), x, axis, wanted, wanted)
    if jnp.iscomplexobj(x) and not jnp.iscomplexobj(state.mean):
        raise TypeError(
            f"`{name}.mean` must be complex for complex `x`; got {state.mean.dtype}. Make it by "
            "`bn_init(..., dtype=jnp.complex64)`."
        )
    return state


def check_record(name: str, value: Any, kind: str, record: Any, needed: Sequence[str] = ()) -> Any:
    """Return `value`, the argument `name`, as a `record`, which may be a user's own with the same fields.

    Each field must hold an array, or each of those `needed`: others may be missing, and are None.
    """
    needed = needed or record._fields
    if not all(hasattr(value, field) for field in needed):
        restored = f" If it was restored from a checkpoint, pass `{record.__name__}(**{name})`."
        raise TypeError(
            f"`{name}` must be {kind}; got {type(value).__name__}.{restored if isinstance(value, dict) else ''}"
        )
    fields: dict[str, Any] = {field: getattr(value, field) for field in needed}
    for field, array in fields.items():
        if record is BatchNormParams and array is None:
            continue
        if not (hasattr(array, "dtype") and hasattr(array, "astype")):
            raise TypeError(f"`{name}.{field}` must be an array; got {array!r}.")
        if not jnp.issubdtype(array.dtype, jnp.number if field == "count" else jnp.inexact):
            raise TypeError(
                f"`{name}.{field}` must be {'an integer' if field == 'count' else 'floating point'}; got dtype "
                f"{array.dtype}. Convert it first, by `.astype(jnp.{'int32' if field == 'count' else 'float32'})`."
            )
    return value if isinstance(value, record) else record(*(getattr(value, field, None) for field in record._fields))


def _check_entry(
    name: str, value: Any, x: jax.Array, axis: tuple[int, ...], wanted: tuple[int, ...], by_example: tuple[int, ...]
) -> None:
    if np.shape(value) not in (wanted, by_example):
        features = tuple(x.shape[a] for a in axis)
        along = f", as x along {f'axis {axis[0]}' if len(axis) == 1 else f'axes {axis}'}"
        raise ValueError(
            f"`{name}` must have shape {wanted}{'' if name.endswith('.count') else along}; got {np.shape(value)}. Make "
            f"it by `bn_init({features[0] if len(features) == 1 else features})`, or name by `axis` where x has its "
            "features." + (f" One for each example has shape {by_example}." if by_example != wanted else "")
        )
    if jnp.iscomplexobj(value) and not jnp.iscomplexobj(x):
        raise TypeError(f"`{name}` must be real for real `x`; got {value.dtype}.")


def _check_initial(name: str, value: Any, dtype: Any, shape: tuple[int, ...]) -> jax.Array:
    """Return an initial value as an array of `shape` and `dtype`."""
    try:
        array: Any = value if hasattr(value, "dtype") else np.asarray(value)
    except ValueError:
        raise ValueError(f"`{name}` must broadcast to {shape}; got a ragged list.") from None
    if not jnp.issubdtype(array.dtype, jnp.number):
        raise TypeError(f"`{name}` must be a number or an array of numbers; got {value!r}.")
    pairs = zip(array.shape[::-1], shape[::-1], strict=False)
    if array.ndim > len(shape) or any(m not in (1, n) for m, n in pairs):
        raise ValueError(f"`{name}` must broadcast to {shape}; got shape {array.shape}.")
    if jnp.iscomplexobj(array) and not jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"`{name}` must be real for dtype {jnp.dtype(dtype)}; got {array.dtype}. Use a complex `dtype`."
        )
    if name == "var" and not isinstance(array, Tracer) and not np.all(np.asarray(array) >= 0):
        raise ValueError(f"`var` must not be negative; got {value!r}.")
    return jnp.array(jnp.broadcast_to(jnp.asarray(array, dtype), shape))
