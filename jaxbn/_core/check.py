"""What a caller may pass. Each error states the rule, what came, and the likely fix."""

import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer


def floating(name: str, value: Any, or_complex: bool = False) -> jax.Array:
    """`value` as an array of floating point numbers."""
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


def accumulation_dtype(dtype: Any) -> Any:
    """The dtype in which values of `dtype` are summed: never less than float32."""
    return jnp.dtype(dtype if dtype in (jnp.float64, jnp.complex64, jnp.complex128) else jnp.float32)


def real(dtype: Any) -> Any:
    """The dtype of absolute values."""
    return jnp.finfo(dtype).dtype


def sizes(num_features: Any) -> tuple[int, ...]:
    """The sizes of the feature axes."""
    try:
        given = num_features if isinstance(num_features, Sequence) else (num_features,)
        shape = tuple(operator.index(n) for n in given)
    except TypeError:
        raise TypeError(f"`num_features` must be an int or a tuple of ints; got {num_features!r}.") from None
    if min(shape, default=0) < 0:
        raise ValueError(f"`num_features` must not be negative; got {num_features!r}.")
    return shape


def initial(name: str, value: Any, dtype: Any, shape: tuple[int, ...]) -> jax.Array:
    """An initial value of `shape` and `dtype`."""
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


def axes(axis: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """`axis` as a tuple of distinct axes in [0, ndim), in the caller's order."""
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
    """`value` as a bool array with the number of dimensions of `shape`, broadcastable to it."""
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError):
        raise TypeError(f"`mask` must be an array of bools; got {type(value).__name__}.") from None
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


def axis_names(value: Any) -> tuple[str, ...]:
    """`value` as a tuple of names that are bound here."""
    names = value if isinstance(value, (tuple, list)) else () if value is None else (value,)
    for name in names:
        try:
            if isinstance(name, int):  # which JAX would take for an axis of the array
                raise NameError
            lax.axis_size(name)
        except (NameError, KeyError, TypeError):
            raise ValueError(
                f"`axis_name` must be bound where the layer runs in training; got {name!r}, which is not. Run inside "
                f"`jax.shard_map` over a mesh with that axis, or `jax.vmap(..., axis_name={name!r})`; under plain "
                "`jax.jit` with sharded arrays leave `axis_name` out: the statistics are global without it."
            ) from None
    if len(set(names)) != len(names):
        raise ValueError(f"`axis_name` must not name an axis twice; got {value!r}.")
    return tuple(names)


def summable(names: tuple[str, ...], varying: frozenset[str]) -> None:
    """Check that JAX can sum over `names`, given the mapped axes that the type of the values knows."""
    if varying and not set(names) <= set(jax.sharding.get_abstract_mesh().manual_axes):
        raise ValueError(
            "`axis_name` must not name an axis of `jax.vmap` inside `jax.shard_map(check_vma=True)`, where JAX sums "
            f"over axes of the mesh alone; got {names}. Pass `check_vma=False` to the `shard_map`."
        )


def still_bound(names: tuple[str, ...]) -> None:
    """That `names`, which were bound where the layer ran, are so where it is differentiated."""
    try:
        lax.axis_size(names)
    except NameError:
        raise ValueError(
            f"`axis_name` must be bound where the layer is differentiated; {names} was when it ran, and is not now. "
            "JAX does not keep the names of `jax.vmap(..., axis_name=...)` inside an inner `jax.jit`, nor for second "
            "derivatives from outside: take the derivative inside the mapped function, or put `jax.jit` outermost."
        ) from None


def groups(value: Sequence[Sequence[int]] | None, names: tuple[str, ...]) -> tuple[tuple[int, ...], ...] | None:
    """`value` as tuples that partition the members of the named axes."""
    if value is None:
        return None
    if not names:
        raise ValueError("`axis_index_groups` needs `axis_name`: the groups are groups of its members.")
    try:
        parts = tuple(tuple(operator.index(i) for i in part) for part in value)
    except TypeError:
        raise TypeError(f"`axis_index_groups` must be a list of lists of ints; got {value!r}.") from None
    size = lax.axis_size(names)
    if sorted(i for part in parts for i in part) != list(range(size)):
        raise ValueError(
            f"`axis_index_groups` must hold each index 0 to {size - 1} of axis {names} exactly once; got {value!r}."
        )
    return parts


def flag(name: str, value: Any) -> bool | jax.Array:
    """`value` as a Python bool, or a scalar bool array for a choice that is made inside the program."""
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
    """`value` as a float that is positive in the dtype in which values of `dtype` are summed."""
    if isinstance(value, (bool, str)) or np.ndim(value) or isinstance(value, Tracer):
        raise TypeError(f"`epsilon` must be a Python float; got {value!r}: it is compiled in.")
    number, least = float(value), float(jnp.finfo(accumulation_dtype(dtype)).tiny)
    if not least <= number < float("inf"):
        raise ValueError(f"`epsilon` must be positive, {least:.1e} at least, and finite; got {number}. Take 1e-5.")
    return number


def momentum(value: Any, count: jax.Array) -> tuple[Any, Any]:
    """The fractions to keep and to take: `value`, or what it gives for `count`, and its complement."""
    if callable(value):
        value = value(count)
    if isinstance(value, (str, bool)) or value is None or not hasattr(value, "__sub__"):
        raise TypeError(
            f"`momentum` must be a number or a function of `state.count`; got {value!r}. "
            "PyTorch's None is `jaxbn.cumulative_average` here."
        )
    if np.shape(value) != ():
        raise ValueError(f"`momentum` must be a scalar, and a schedule must return one; got shape {np.shape(value)}.")
    concrete = None if isinstance(value, Tracer) else float(value)
    if concrete is not None and not 0 <= concrete <= 1:
        raise ValueError(f"`momentum` is the fraction that is kept and must lie in [0, 1]; got {concrete}.")
    # From a Python float the complement is exact to more digits than float32 has.
    return value, 1 - value


def number(name: str, value: Any, least: float, most: float = float("inf")) -> Any:
    """`value` as a number from `least` to `most`: Python's, or a scalar array."""
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
    """`value` as a positive int."""
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


def parameters(x: jax.Array, params: Any, state: Any, axis: tuple[int, ...], batch: tuple[int, ...]) -> None:
    """That `params` and `state` belong to `x` with features along `axis` and, maybe, examples along `batch`."""
    features = tuple(x.shape[a] for a in axis)
    for owner, names, given in (("params", ("scale", "bias"), params), ("state", ("mean", "var", "count"), state)):
        if not all(hasattr(given, name) for name in names):
            kind = "BatchNormParams" if owner == "params" else "BatchNormState"
            restored = (
                f" If it was restored from a checkpoint, pass `{kind}(**{owner})`." if isinstance(given, dict) else ""
            )
            raise TypeError(f"`{owner}` must be the {owner} of `bn_init`; got {type(given).__name__}.{restored}")
        for name in names:
            if owner == "params" and getattr(given, name) is None:
                continue
            if not hasattr(getattr(given, name), "dtype"):
                raise TypeError(f"`{owner}.{name}` must be an array; got {getattr(given, name)!r}.")
            shape = np.shape(getattr(given, name))
            wanted = () if name == "count" else features
            by_example = tuple(x.shape[a] for a in (*batch, *axis)) if owner == "params" and batch else wanted
            if shape not in (wanted, by_example):
                along = f"axis {axis[0]}" if len(axis) == 1 else f"axes {axis}"
                raise ValueError(
                    f"`{owner}.{name}` must have shape {wanted}{'' if name == 'count' else f', as x along {along}'}; "
                    f"got {shape}. Make it by `bn_init({features[0] if len(features) == 1 else features})`, "
                    "or name by `axis` where x has its features."
                    + (f" One for each example has shape {by_example}." if by_example != wanted else "")
                )
            if jnp.iscomplexobj(getattr(given, name)) and not jnp.iscomplexobj(x):
                raise TypeError(f"`{owner}.{name}` must be real for real `x`; got {getattr(given, name).dtype}.")
    if jnp.iscomplexobj(x) and not jnp.iscomplexobj(state.mean):
        raise TypeError(
            f"`state.mean` must be complex for complex `x`; got {state.mean.dtype}. Make it by "
            "`bn_init(..., dtype=jnp.complex64)`."
        )
