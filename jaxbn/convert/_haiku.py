"""Conversion of one layer from and to Haiku."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxbn._core import check
from jaxbn._core.state import BatchNormParams, BatchNormState
from jaxbn.convert._arrays import check_layer, check_mapping, load_array, read_layer


def from_haiku(
    params: Mapping[str, Any], state: Mapping[str, Any], name: str, *, axis: int | Sequence[int] = -1
) -> tuple[BatchNormParams, BatchNormState]:
    """Convert a Haiku batch normalization to params and state.

    Haiku normalizes by `average = hidden / (1 - decay^counter)`. That is the mean and var here, and
    `bn_apply(..., momentum=jaxbn.zero_debiased(decay_rate))` continues with it.

    Args:
        params: of a transformed function; `params[name]` holds scale and offset with singleton axes, `[1, 1, 1, C]`.
        state: likewise; `state[name + "/~/mean_ema"]` and `".../~/var_ema"` hold hidden, average and counter.
        name: the module's, `"resnet/~/initial_batchnorm"`.
        axis: the feature axis or axes of the layer's input, as for `bn_apply`.

    Returns:
        `(params, state)`, arrays `[*features]`; scale and bias are None without `create_scale` and `create_offset`.

    Raises:
        TypeError: `params` or `state` are not nested mappings, an entry is no array, or `name` is no string.
        ValueError: `axis` is out of range or repeated; or entries are missing, unexpected, or of a wrong shape or type,
            and all of them are named.

    Example:
        >>> import numpy as np
        >>> from jaxbn.convert import from_haiku
        >>> ema = {"hidden": np.full((1, 3), 0.1), "average": np.ones((1, 3)), "counter": np.int32(1)}
        >>> params, state = from_haiku({}, {"bn/~/mean_ema": ema, "bn/~/var_ema": ema}, "bn")
        >>> print(params.scale, state.mean, state.count)
        None [1. 1. 1.] 1

    Source: `haiku/_src/batch_norm.py` and `moving_averages.py` of dm-haiku 0.0.17.
    """
    what = "Haiku's, a mapping of modules' names to mappings of arrays"
    params, state = check_mapping("params", params, what), check_mapping("state", state, what)
    averages = _name_averages(name)
    modules = {name: params.get(name, {})} | {m: state.get(m, {}) for m in averages.values()}
    modules = {module: check_mapping(f"{module}", leaves, "a mapping of arrays") for module, leaves in modules.items()}
    entries = {f"{module}/{leaf}": value for module, leaves in modules.items() for leaf, value in leaves.items()}
    names = {"scale": f"{name}/scale", "bias": f"{name}/offset"}
    for ours, module in averages.items():
        # The hidden average adds no information, but a module without it is another one.
        names |= {
            ours: f"{module}/average",
            f"hidden {ours}": f"{module}/hidden",
            f"count of {ours}": f"{module}/counter",
        }
    names["count"] = names.pop("count of mean")
    headline = f"This is not a Haiku batch normalization {name!r} with its features along axis {axis}:"
    loaded = {entry: load_array(entry, value) for entry, value in entries.items()}
    ndim = max((value.ndim for value in loaded.values()), default=0)
    axes = check.axes(axis, ndim) if ndim else ()
    entries = {entry: _drop_singletons(v, axes) if v.ndim == ndim else v for entry, v in loaded.items()}
    found = read_layer(headline, entries, names)
    if found[1].mean.ndim != np.size(axis):
        raise ValueError(f"{headline}\n  of a wrong shape: all of them, {found[1].mean.shape}")
    return found


def to_haiku(
    params: BatchNormParams,
    state: BatchNormState,
    name: str,
    *,
    ndim: int,
    decay_rate: float,
    axis: int | Sequence[int] = -1,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Convert params and state to those of a Haiku batch normalization, the inverse of `from_haiku`.

    Args:
        params: scale and bias `[*features]`, or None.
        state: mean and var `[*features]`, count `[]`.
        name: the module's.
        ndim: the number of dimensions of the layer's input: Haiku stores that many.
        decay_rate: the module's. `hidden = average (1 - decay_rate^counter)` is computed from it; all else is copied.
        axis: the feature axis or axes of the input.

    Returns:
        `(params, state)` with the entries of this module, to be merged into a model's. For `count` 0 Haiku forgets
        mean and var with its first update.

    Raises:
        TypeError: `name` is no string.
        ValueError: not the params and state of one layer, or features that `axis` does not place in `ndim` dimensions.

    Example:
        >>> import jaxbn
        >>> from jaxbn.convert import to_haiku
        >>> params, state = to_haiku(*jaxbn.bn_init(3), "bn", ndim=4, decay_rate=0.9)
        >>> params["bn"]["offset"].shape, list(state)
        ((1, 1, 1, 3), ['bn/~/mean_ema', 'bn/~/var_ema'])

    Source: as `from_haiku`.
    """
    values = check_layer(params, state)
    axes = check.axes(axis, check.positive("ndim", ndim))
    if len(axes) != state.mean.ndim:
        raise ValueError(f"`axis` must place features {state.mean.shape} among {ndim} dimensions; got {axis!r}.")
    if check.number("decay_rate", decay_rate, 0) >= 1:
        raise ValueError(f"`decay_rate` must be in [0, 1); got {decay_rate!r}.")

    def add_singletons(value):
        shape = [1] * ndim
        for a, size in zip(axes, value.shape, strict=True):
            shape[a] = size
        return value.transpose(np.argsort(axes)).reshape(shape)

    # In Haiku's own float32: it divides by the same number again.
    factor = 1 - jnp.power(jnp.float32(decay_rate), values["count"].astype(jnp.float32))
    averages = {
        module: {
            "hidden": add_singletons(values[ours] * factor.astype(values[ours].real.dtype)),
            "average": add_singletons(values[ours]),
            "counter": values["count"],
        }
        for ours, module in _name_averages(name).items()
    }
    learned = {
        theirs: add_singletons(values[ours])
        for ours, theirs in (("scale", "scale"), ("bias", "offset"))
        if ours in values
    }
    return ({name: learned} if learned else {}), averages


def _name_averages(name: str) -> dict[str, str]:
    if not isinstance(name, str):
        raise TypeError(f"`name` must be a string, the module's name in the model; got {name!r}.")
    return {"mean": f"{name}/~/mean_ema", "var": f"{name}/~/var_ema"}


def _drop_singletons(value: Any, axes: tuple[int, ...]) -> Any:
    """Drop the singleton axes of `value`, features in the order of `axes`; return it unchanged where it has others."""
    sizes = tuple(value.shape[a] for a in axes)
    rest = tuple(a for a in range(value.ndim) if a not in axes)
    if any(value.shape[a] != 1 for a in rest):
        return value
    return value.transpose((*axes, *rest)).reshape(sizes)
