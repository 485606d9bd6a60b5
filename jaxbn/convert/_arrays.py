"""The five arrays of a layer under the names of another library. One error lists all problems."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxbn._core import check
from jaxbn._core.fetch import fetch_array
from jaxbn._core.state import BatchNormParams, BatchNormState

OURS = {name: name for name in ("scale", "bias", "mean", "var", "count")}


def load_array(name: str, value: Any) -> Any:
    """Return `value` as a JAX array if it is one, else as a NumPy array that shares no memory with it."""
    if isinstance(value, jax.Array):
        return value
    if isinstance(value, jax.ShapeDtypeStruct):
        raise TypeError(f"{name!r} must hold numbers; got a shape and a dtype alone. Initialize or restore it first.")
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            if str(value.dtype) == "torch.bfloat16":  # which torch does not hand to NumPy; float32 holds its values
                return value.float().numpy().astype(jnp.bfloat16)
        # In two steps: Keras variables do not know NumPy's `copy` argument.
        return np.asarray(value).copy()
    except Exception as error:  # any error of a library about tensors without values, sparse or quantized ones
        said = str(error).splitlines() or [type(error).__name__]
        raise TypeError(
            f"{name!r} must be a dense array of plain numbers; got a {type(value).__name__} that is not one: "
            f"{said[0]} Load tensors that have no values yet, and use `to_dense()` or `dequantize()` on sparse or "
            "quantized ones."
        ) from None


def check_mapping(name: str, value: Any, what: str) -> Mapping[str, Any]:
    """Return `value` if it is a mapping with strings as keys."""
    if not isinstance(value, Mapping):
        raise TypeError(f"`{name}` must be {what}; got {type(value).__name__}.")
    if other := [key for key in value if not isinstance(key, str)]:
        raise TypeError(f"`{name}` must be {what}, with strings as keys; got {other[0]!r} among them.")
    return value


def raise_problems(headline: str, problems: Mapping[str, list[str]]) -> None:
    """Raise one ValueError with all problems, if there are any."""
    lines = [f"\n  {kind}: {', '.join(items)}" for kind, items in problems.items() if items]
    if lines:
        raise ValueError(headline + "".join(lines))


def read_layer(
    headline: str,
    source: Mapping[str, Any],
    names: Mapping[str, str],
    *,
    vector: bool = False,
    stacked: tuple[int, ...] = (),
) -> tuple[BatchNormParams, BatchNormState]:
    """Return params and state from the entries of one layer.

    Args:
        headline: of the error, if there is one.
        source: the layer's entries and nothing else.
        names: our name -> the entry's, for scale, bias, mean, var and, where the source counts updates, count. Only
            scale and bias may be absent from `source`. Under further names are arrays like mean, or like count where
            the name begins so, that must be there and are not returned.
        vector: whether the library has one real number a channel only.
        stacked: the shape of the count: of domains, or of layers, that are kept on leading axes.

    Returns:
        `(params, state)`: params in the dtypes of the source, the state in float32 or wider, the count in int32.

    Raises:
        TypeError: an entry is no array.
        ValueError: entries are missing, unexpected, of a wrong shape or type, or no statistics; all of them are named.
    """
    found = {ours: load_array(theirs, source[theirs]) for ours, theirs in names.items() if theirs in source}
    arrays = {ours: value for ours, value in found.items() if not ours.startswith("count")}
    model = next((ours for ours in ("mean", "var", "scale", "bias") if ours in arrays), "")
    shapes, types, values = [], [], []
    for ours, value in arrays.items():
        if value.shape != arrays[model].shape:
            shapes.append(f"{names[ours]} {value.shape}, where {names[model]} has {arrays[model].shape}")
        elif vector and value.ndim != 1:
            shapes.append(f"{names[ours]} {value.shape}, where one number a channel, (channels,), is needed")
        if not jnp.issubdtype(value.dtype, jnp.floating if vector or ours == "var" else jnp.inexact):
            types.append(f"{names[ours]} {value.dtype}, which is not {'real ' if vector else ''}floating point")
        elif wrong := find_bad_statistics(ours, value):
            values.append(f"{names[ours]}, {wrong}")
    for ours, value in found.items():
        if ours in arrays:
            continue
        if value.shape != stacked:
            shapes.append(f"{names[ours]} {value.shape}, where {stacked or 'a scalar'} is needed")
        elif not jnp.issubdtype(value.dtype, jnp.integer):
            types.append(f"{names[ours]} {value.dtype}, which is not an integer")
        elif not isinstance(value, Tracer) and not np.all((np.asarray(value) >= 0) & (np.asarray(value) < 2**31)):
            types.append(f"{names[ours]} = {value}, which is not a number of updates that int32 holds")
    raise_problems(
        headline,
        {
            "missing": [theirs for ours, theirs in names.items() if ours not in (*found, "scale", "bias")],
            "unexpected": [name for name in source if name not in names.values()],
            "of a wrong shape": shapes,
            "of a wrong type": types,
            "not statistics": values,
        },
    )

    def param(ours) -> Any:
        return jnp.asarray(found[ours]) if ours in found else None

    def statistic(ours) -> Any:
        value = jnp.asarray(found[ours])
        return value.astype(check.accumulation_dtype(value.dtype))

    count = jnp.asarray(found.get("count", np.zeros(stacked, np.int32))).astype(jnp.int32)
    return BatchNormParams(param("scale"), param("bias")), BatchNormState(statistic("mean"), statistic("var"), count)


def find_bad_statistics(ours: str, value: Any) -> str | None:
    """Return why evaluation cannot use a mean or variance; None if it can."""
    if ours not in ("mean", "var") or isinstance(value, Tracer):
        return None
    value = fetch_array(value)
    if np.any(np.isnan(value)):
        return "which has NaN: training had diverged"
    if ours == "var" and np.any(value < 0):
        return "which is negative somewhere"
    kept = jax.dtypes.canonicalize_dtype(value.dtype)
    with np.errstate(over="ignore"):
        lost = np.any(np.isinf(value.astype(kept)) & np.isfinite(value))
    return f"which {kept} does not hold" if lost else None


def select_prefix(
    source: Mapping[str, Any], prefix: str, separator: str, names: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Return `names` with `prefix`, and the entries of `source` under it."""
    if not isinstance(prefix, str):
        raise TypeError(f"`prefix` must be a string, the layer's name in the model; got {prefix!r}.")
    start = prefix.removesuffix(separator) + separator if prefix else ""
    entries = {name: value for name, value in source.items() if name.startswith(start)}
    return {ours: start + theirs for ours, theirs in names.items()}, entries


def check_layer(params: BatchNormParams, state: BatchNormState, **how: Any) -> dict[str, jax.Array]:
    """Return the arrays of params and state by name, after the same checks as in the other direction."""
    for name, value, kind in (("params", params, BatchNormParams), ("state", state, BatchNormState)):
        if not isinstance(value, kind):
            raise TypeError(f"`{name}` must be the {name} of `bn_init`; got {type(value).__name__}.")
    source = {**params._asdict(), **state._asdict()}
    source = {name: value for name, value in source.items() if value is not None}
    params, state = read_layer("`params` and `state` are not those of one layer:", source, OURS, **how)
    return {name: value for name, value in (params._asdict() | state._asdict()).items() if value is not None}


def check_fit(owner: str, wanted: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Check that a layer with the arrays `wanted`, None where it has none, can hold `values`.

    Args:
        owner: the layer, for the message.
        wanted: scale, bias, mean, var.
        values: from `check_layer`.

    Raises:
        ValueError: the layer has another array, lacks one, or has one of another shape; all of them are named.
    """
    has = {name for name, value in wanted.items() if value is not None}
    raise_problems(
        f"The {owner} cannot hold `params` and `state`; nothing was changed:",
        {
            "it has, and they lack": sorted(has - set(values)),
            "it lacks, and they have": sorted(set(values) - has - {"count"}),
            "of a wrong shape": [
                f"{name} {values[name].shape}, where the {owner} has {np.shape(wanted[name])}"
                for name in sorted(has & set(values))
                if values[name].shape != np.shape(wanted[name])
            ],
        },
    )
