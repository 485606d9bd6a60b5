"""Conversion of one layer from and to Equinox, whose `State` holds the statistics of its layers."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._core.state import BatchNormParams, BatchNormState
from jaxbn.convert._arrays import check_fit, check_layer, read_layer


def from_equinox(layer: Any, state: Any) -> tuple[BatchNormParams, BatchNormState]:
    """Convert an Equinox batch normalization to params and state: the mean and var with which it would evaluate.

    With `mode="batch"` these are `hidden / (1 - momentum^counter)`, and
    `bn_apply(..., momentum=jaxbn.zero_debiased(layer.momentum))` continues with them. Equinox starts the hidden
    variance at one and yet divides it so, which adds `m^t / (1 - m^t)` to the variance after t updates (99 after one,
    for m = 0.99). It evaluates with this variance, so it is kept, and fades as it would there. With `mode="ema"`, used
    where no `mode` is given, Equinox copies the first batch and keeps `momentum` from then on. So does
    `bn_apply(..., momentum=layer.momentum)` after the first; but Equinox normalizes by these averages in training too,
    so that there the outputs differ.

    Args:
        layer: an `equinox.nn.BatchNorm`, or one inside a model: `model.norm`. Arrays `[features]`.
        state: the `equinox.nn.State` that belongs to it.

    Returns:
        `(params, state)`: scale and bias are None for `channelwise_affine=False`. `count` is Equinox's counter; with
        `mode="ema"`, which does not count, 0 before the first update and 1 after it.

    Raises:
        TypeError: not a layer of Equinox and its state.
        ValueError: `state` does not hold this layer, or an array has a wrong shape or type.

    Example:
        >>> import equinox as eqx
        >>> from jaxbn.convert import from_equinox
        >>> layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(2, axis_name="batch", mode="batch")
        >>> print(from_equinox(layer, state)[1].var)
        [1. 1.]

    Source: `equinox/nn/_batch_norm.py` of Equinox 0.13.8.
    """
    _check_equinox(layer, state)
    if layer.mode == "batch":
        mean, var = _get_entry(state, layer.batch_state_index)
        count = _get_entry(state, layer.batch_counter)
        factor = _debias_divisor(layer, count, mean.dtype)
        mean, var = mean / factor, var / factor
    else:
        mean, var = _get_entry(state, layer.ema_state_index)
        count = jnp.where(_get_entry(state, layer.ema_first_time_index), jnp.int32(0), jnp.int32(1))
    values = {"scale": layer.weight, "bias": layer.bias, "mean": mean, "var": var, "count": count}
    values = {name: value for name, value in values.items() if value is not None}
    names = {"scale": "weight", "bias": "bias", "mean": "mean", "var": "var", "count": "count"}
    values = {names[name]: value for name, value in values.items()}
    return read_layer("This is not an Equinox batch normalization and its state:", values, names, vector=True)


def to_equinox(layer: Any, state: Any, params: BatchNormParams, bn_state: BatchNormState) -> tuple[Any, Any]:
    """Convert params and state to an Equinox layer and state, the inverse of `from_equinox`.

    Args:
        layer: an `equinox.nn.BatchNorm`, for everything except its arrays.
        state: the `equinox.nn.State` that belongs to it, or to a model around it. It stays valid.
        params: scale and bias `[features]`, None for both with `channelwise_affine=False`. They keep their dtypes.
        bn_state: mean and var `[features]`, count `[]`. The statistics take the layer's dtype.

    Returns:
        A new layer (`equinox.tree_at` puts it into a model) and a new state. With `mode="batch"` the hidden averages
        are computed: `mean (1 - momentum^count)`, and likewise the variance; all else is copied. For `count` 0 Equinox
        would evaluate as it should, but not train on.

    Raises:
        TypeError: not a layer of Equinox and its state.
        ValueError: not the params and state of one layer, or not of this one; all differences are named.

    Example:
        >>> import equinox as eqx, jaxbn
        >>> from jaxbn.convert import from_equinox, to_equinox
        >>> layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(2, axis_name="batch", mode="ema")
        >>> layer, state = to_equinox(layer, state, *jaxbn.bn_init(2, mean=3.0))
        >>> print(from_equinox(layer, state)[1].mean)
        [3. 3.]

    Source: as `from_equinox`.
    """
    _check_equinox(layer, state)
    values = check_layer(params, bn_state, vector=True)
    index = layer.batch_state_index if layer.mode == "batch" else layer.ema_state_index
    mean, var = _get_entry(state, index)
    check_fit("BatchNorm of Equinox", {"scale": layer.weight, "bias": layer.bias, "mean": mean, "var": var}, values)
    # `State.set` invalidates the state that it is called on; this is a copy with the same arrays.
    state = jax.tree.map(lambda leaf: leaf, state)
    if layer.mode == "batch":
        factor = _debias_divisor(layer, values["count"], values["mean"].dtype)
        values |= {"mean": values["mean"] * factor, "var": values["var"] * factor}
        old, count = state.get(layer.batch_counter), values["count"]
        # Equinox starts from a Python number, and its `set` tells the weak type that this has from others.
        count = jnp.asarray(int(count)) if getattr(old, "weak_type", False) else count.astype(old.dtype)
        state = state.set(layer.batch_counter, count)
    else:
        state = state.set(layer.ema_first_time_index, values["count"] == 0)
    state = state.set(index, (values["mean"].astype(mean.dtype), values["var"].astype(var.dtype)))
    affine = {".weight": values.get("scale"), ".bias": values.get("bias")}
    layer = jax.tree_util.tree_map_with_path(
        lambda path, leaf: affine.get(jax.tree_util.keystr(path), leaf),
        layer,
    )
    return layer, state


def _check_equinox(layer: Any, state: Any) -> None:
    if not hasattr(layer, "mode") or not hasattr(state, "get"):
        raise TypeError(
            "`layer` and `state` must be an `equinox.nn.BatchNorm` and the `equinox.nn.State` that belongs to it; got "
            f"{type(layer).__name__} and {type(state).__name__}."
        )


def _get_entry(state: Any, index: Any) -> Any:
    try:
        return state.get(index)
    except KeyError:
        raise ValueError(
            "`state` must hold the statistics of `layer`; it does not. Take layer and state from the same "
            "`equinox.nn.make_with_state`."
        ) from None


def _debias_divisor(layer: Any, count: jax.Array, dtype: Any) -> jax.Array:
    """Return the divisor of Equinox's hidden averages, computed by its own operations with their rounding."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.where(count == 0, 1, 1 - layer.momentum**count).astype(dtype)
