"""Check the arguments of a caller. Each error states the rule, what came, and the likely fix.

These checks serve several features; a check of one feature is in that feature's file: axis names and groups in
`reduction.py`, momentum in `momentum.py`, parameters and state in `state.py`.
"""

import operator
import reprlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer


def floating(name: str, value: Any, or_complex: bool = False) -> jax.Array:
    """Return `value` as an array of floating point numbers."""
    try:
        dtype = jnp.dtype(value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype)
    except (TypeError, ValueError):  # another library's tensor, a ragged list
        dtype = np.dtype(object)
    if dtype.kind == "O":
        raise TypeError(
            f"`{name}` must be a JAX or NumPy array of floating point numbers; got {type(value).__name__}. "
            "Convert it first, for example by `numpy.asarray`."
        )
    if not jnp.issubdtype(dtype, jnp.inexact if or_complex else jnp.floating):
        raise TypeError(
            f"`{name}` must be floating point; got dtype {dtype}. "
            f"Convert it first, for example by `{name}.astype(jnp.float32)`."
        )
    try:
        return value if isinstance(value, jax.Array) else jnp.asarray(value)
    except (TypeError, ValueError):  # a type without values, as of `jax.eval_shape`
        raise TypeError(f"`{name}` must be an array; got {type(value).__name__}.") from None


def array(name: str, value: Any) -> jax.Array:
    """Return `value` as an array."""
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError):
        raise TypeError(f"`{name}` must be a number or an array of numbers; got {reprlib.repr(value)}.") from None


def real_number(name: str, value: Any) -> jax.Array:
    """Return `value` as an array of real numbers."""
    value = array(name, value)
    if not jnp.issubdtype(value.dtype, jnp.number) or jnp.iscomplexobj(value):
        raise TypeError(f"`{name}` must be real; got dtype {value.dtype}.")
    return value


def accumulation_dtype(dtype: Any) -> Any:
    """Return the dtype in which values of `dtype` are summed: at least float32."""
    return jnp.dtype(dtype if dtype in (jnp.float64, jnp.complex64, jnp.complex128) else jnp.float32)


def real(dtype: Any) -> Any:
    """Return the dtype of the absolute values of `dtype`."""
    return jnp.finfo(dtype).dtype


def sizes(value: Any, name: str = "num_features") -> tuple[int, ...]:
    """Return the sizes of axes, by default of the feature axes, as a tuple."""
    try:
        given = value if isinstance(value, Sequence) else (value,)
        shape = tuple(operator.index(n) for n in given)
    except TypeError:
        raise TypeError(f"`{name}` must be an int or a tuple of ints; got {value!r}.") from None
    if min(shape, default=0) < 0:
        raise ValueError(f"`{name}` must not be negative; got {value!r}.")
    return shape


def axes(axis: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """Return `axis` as a tuple of distinct axes in [0, ndim), in the caller's order."""
    try:
        given = (operator.index(axis),) if not isinstance(axis, (tuple, list)) else tuple(map(operator.index, axis))  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"`axis` must be an int or a tuple of ints; got {axis!r}.") from None
    for a in given:
        if not -ndim <= a < ndim:
            raise ValueError(
                f"`axis` must lie in [{-ndim}, {ndim}) for an array of {ndim} dimensions; got {a}. "
                "Name the feature axis of `x`: -1 for channels last, 1 for channels first."
            )
    positive = tuple(a % ndim for a in given)
    if len(set(positive)) != len(positive):
        raise ValueError(f"`axis` must not name an axis twice; got {axis!r} for an array of {ndim} dimensions.")
    return positive


def mask(value: Any, shape: tuple[int, ...]) -> jax.Array:
    """Return `value` as a bool array with the number of dimensions of `shape`, broadcastable to it."""
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError):
        raise TypeError(f"`mask` must be an array of bools; got {type(value).__name__}.") from None
    if jnp.issubdtype(array.dtype, jnp.inexact):  # as bools, an additive mask [0, -inf] is its opposite
        raise TypeError(
            f"`mask` must be an array of bools, True where a value counts; got dtype {array.dtype}. Compare it, "
            "`mask > 0.5`, or convert one of zeros and ones by `mask.astype(bool)`."
        )
    # By hand: a size may be symbolic.
    missing = len(shape) - array.ndim
    if missing < 0 or any(m != 1 and m != n for m, n in zip(array.shape, shape[missing:], strict=True)):
        raise ValueError(
            f"`mask` must broadcast to the shape of `x`; got mask {array.shape} for x {shape}. "
            "Give it x's number of dimensions, with size 1 where it does not vary: [batch, 1] for x [batch, features]."
        )
    leading = all(m == 1 or m == n for m, n in zip(array.shape, shape[: array.ndim], strict=True))
    if missing and leading and any(m != 1 for m in array.shape):
        raise ValueError(
            f"`mask` must say which axes of `x` its own are; got mask {array.shape} for x {shape}, which fits its "
            "first axes and its last. Give it x's number of dimensions: [batch, time, 1] for x [batch, time, features]."
        )
    return lax.expand_dims(array.astype(bool), range(missing))


def flag(name: str, value: Any) -> bool | jax.Array:
    """Return `value` as a Python bool, or as a scalar bool array for a choice that is made inside the program."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if not hasattr(value, "dtype") or value.dtype != bool or np.shape(value) != ():
        got = f"{value.dtype}{list(np.shape(value))}" if hasattr(value, "dtype") else repr(value)
        raise TypeError(
            f"`{name}` must be True, False, or a scalar bool array; got {got}. "
            f"Pass a Python bool, or for one program with both modes `jnp.asarray(..., bool)`."
        )
    return value


def epsilon(value: Any, dtype: Any) -> float:
    """Return `value` as a float that is positive in the dtype in which values of `dtype` are summed."""
    if not isinstance(value, (int, float, np.number, np.ndarray, jax.Array)) or isinstance(value, (bool, Tracer)):
        raise TypeError(f"`epsilon` must be a Python float; got {value!r}: it is compiled in.")
    if np.ndim(value) or np.iscomplexobj(value):
        raise TypeError(f"`epsilon` must be a Python float; got {value!r}: it is compiled in.")
    number, least = float(value), float(jnp.finfo(accumulation_dtype(dtype)).tiny)
    if not least <= number < float("inf"):
        raise ValueError(f"`epsilon` must be positive, {least:.1e} at least, and finite; got {number}. Take 1e-5.")
    return number


def number(name: str, value: Any, least: float, most: float = float("inf")) -> Any:
    """Return `value` as a number from `least` to `most`: a Python number or a scalar array."""
    real = isinstance(value, (int, float, np.generic, np.ndarray, jax.Array)) and not isinstance(value, bool)
    if not real or np.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.number):
        raise TypeError(f"`{name}` must be one number; got {value!r}.")
    if jnp.iscomplexobj(value):
        raise TypeError(f"`{name}` must be real; got {value!r}.")
    if not isinstance(value, Tracer) and not least <= float(value) <= most:
        range = f"at least {least}" if most == float("inf") else f"from {least} to {most}"
        raise ValueError(f"`{name}` must be {range}; got {value}.")
    return value


def positive(name: str, value: Any) -> int:
    """Return `value` as a positive int."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"`{name}` must be an int; got {value!r}.") from None
    if isinstance(value, bool) or number < 1:
        raise ValueError(f"`{name}` must be a positive int; got {value!r}.")
    return number


def boolean(name: str, value: Any) -> bool:
    """Return `value` as a Python bool."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"`{name}` must be True or False; got {value!r}.")
    return bool(value)


def like_x(name: str, value: Any, x: jax.Array) -> jax.Array:
    """Return `value` as an array of the shape of `x`."""
    value = floating(name, value, or_complex=jnp.iscomplexobj(x))
    if value.shape != x.shape:
        raise ValueError(f"`{name}` must have the shape of `x`, {x.shape}; got {value.shape}.")
    return value
