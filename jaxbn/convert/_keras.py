"""Conversion of one layer from and to Keras 3."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxbn._core.fetch import fetch_array
from jaxbn._core.state import BatchNormParams, BatchNormState
from jaxbn.convert._arrays import check_layer, check_mapping, read_layer, select_prefix

NAMES = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"}


def from_keras(source: Any, prefix: str = "") -> tuple[BatchNormParams, BatchNormState]:
    """Convert a Keras 3 batch normalization to params and state.

    To continue as Keras would: `bn_apply(..., momentum=layer.momentum, epsilon=layer.epsilon)`; its epsilon is 1e-3 by
    default. Keras counts no updates: `count` is 0, and `state._replace(count=...)` sets it for a schedule.

    Args:
        source: a built layer, or a mapping of its variables' names to arrays `[features]`.
        prefix: for a mapping: where the layer's variables are, `"resnet/bn1"` for `resnet/bn1/gamma`.

    Returns:
        `(params, state)`. Scale and bias are None for `scale=False` and `center=False`. Copies.

    Raises:
        TypeError: neither a layer nor a mapping, or an entry is no dense array.
        ValueError: variables are missing (a layer that was not built has none), unexpected (those of `renorm=True`),
            or of a wrong shape or type; all of them are named.

    Example:
        >>> import numpy as np
        >>> from jaxbn.convert import from_keras
        >>> params, state = from_keras({"beta": np.ones(2), "moving_mean": np.zeros(2), "moving_variance": np.ones(2)})
        >>> print(params.scale, params.bias)
        None [1. 1.]

    Source: `keras/src/layers/normalization/batch_normalization.py` of Keras 3.15.
    """
    if not isinstance(source, Mapping):
        if not hasattr(source, "variables"):
            raise TypeError(f"`source` must be a built Keras layer, or a mapping; got {type(source).__name__}.")
        source, prefix = {variable.name: variable for variable in source.variables}, ""
    source = check_mapping("source", source, "a built Keras layer, or a mapping of variables' names to arrays")
    names, entries = select_prefix(source, prefix, "/", NAMES)
    return read_layer(
        "`source` does not hold the variables of one Keras batch normalization:", entries, names, vector=True
    )


def to_keras(params: BatchNormParams, state: BatchNormState, prefix: str = "") -> dict[str, np.ndarray]:
    """Convert params and state to the variables of a Keras 3 layer, the inverse of `from_keras`.

    Keras has no place for `count`. Load them by `for v in layer.variables: v.assign(values[v.name])`.

    Args:
        params: scale and bias `[features]`, None for `scale=False` and `center=False`.
        state: mean and var `[features]`.
        prefix: the path before the names, to which a slash is added.

    Returns:
        New NumPy arrays in the dtypes of `params` and `state`.

    Raises:
        TypeError: traced arrays.
        ValueError: not the params and state of one layer, or not real vectors.

    Example:
        >>> import jaxbn
        >>> from jaxbn.convert import to_keras
        >>> sorted(to_keras(*jaxbn.bn_init(3)))
        ['beta', 'gamma', 'moving_mean', 'moving_variance']

    Source: as `from_keras`.
    """
    names, _ = select_prefix({}, prefix, "/", NAMES)
    values = check_layer(params, state, vector=True)
    return {names[name]: np.array(fetch_array(value)) for name, value in values.items() if name in names}
