"""Conversion of one layer from and to a PyTorch `state_dict`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxbn._core.fetch import fetch_array
from jaxbn._core.state import BatchNormParams, BatchNormState
from jaxbn.convert._arrays import check_layer, check_mapping, read_layer, select_prefix

NAMES = {
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "count": "num_batches_tracked",
}


def from_torch(state_dict: Any, prefix: str = "") -> tuple[BatchNormParams, BatchNormState]:
    """Convert the `state_dict` of a PyTorch batch normalization to params and state.

    To continue as PyTorch would: `bn_apply(..., axis=1, momentum=1 - m, unbiased_running_var=True)` for its momentum
    m, or `momentum=jaxbn.cumulative_average` for its None.

    Args:
        state_dict: of the layer or of a model around it; tensors on any device, or arrays, `[features]`. Or the layer.
        prefix: the layer's name in the model, `"layer1.0.bn1"`; the other entries are ignored then.

    Returns:
        `(params, state)`. Scale and bias are None for `affine=False`; `count` is `num_batches_tracked`. Copies.

    Raises:
        TypeError: not a `state_dict`, or an entry is no dense array.
        ValueError: entries are missing, unexpected, or of a wrong shape or type; all of them are named. For a network's
            there is `from_torch_network`. Files from before PyTorch 0.4.1 lack `num_batches_tracked`: add 0.
            `track_running_stats=False` has no state.

    Example:
        >>> import numpy as np
        >>> from jaxbn.convert import from_torch
        >>> names = ["weight", "bias", "running_mean", "running_var"]
        >>> saved = {f"bn.{name}": np.full(2, i, np.float32) for i, name in enumerate(names)}
        >>> params, state = from_torch(saved | {"bn.num_batches_tracked": np.int64(7)}, prefix="bn")
        >>> print(params.bias, state.var, state.count)
        [1. 1.] [3. 3.] 7

    Source: `torch/nn/modules/batchnorm.py` of PyTorch 2.13.
    """
    if not isinstance(state_dict, Mapping) and hasattr(state_dict, "state_dict"):
        state_dict = state_dict.state_dict()
    state_dict = check_mapping("state_dict", state_dict, "a PyTorch `state_dict`, or a layer")
    names, entries = select_prefix(state_dict, prefix, ".", NAMES)
    return read_layer(
        "`state_dict` is not that of one PyTorch batch normalization (name a network's layer by `prefix`):",
        entries,
        names,
        vector=True,
    )


def to_torch(params: BatchNormParams, state: BatchNormState, prefix: str = "") -> dict[str, np.ndarray]:
    """Convert params and state to a PyTorch `state_dict`, the inverse of `from_torch`.

    Load it by `layer.load_state_dict({name: torch.from_numpy(v) for name, v in ...items()})`. PyTorch does
    not take NumPy's bfloat16: pass `v.astype("float32")`, which the layer casts to its own dtype.

    Args:
        params: scale and bias `[features]`, or None for both (`affine=False`) or for the bias (`bias=False`).
        state: mean and var `[features]`, count `[]`.
        prefix: the layer's name in a model.

    Returns:
        New NumPy arrays in the dtypes of `params` and `state`; `num_batches_tracked` is int64.

    Raises:
        TypeError: traced arrays.
        ValueError: not the params and state of one layer, not real vectors, or a bias without a scale.

    Example:
        >>> import jaxbn
        >>> from jaxbn.convert import to_torch
        >>> sorted(to_torch(*jaxbn.bn_init(3, scale=None, bias=None), prefix="bn"))
        ['bn.num_batches_tracked', 'bn.running_mean', 'bn.running_var']

    Source: as `from_torch`.
    """
    names, _ = select_prefix({}, prefix, ".", NAMES)
    values = {
        names[name]: np.array(fetch_array(value)) for name, value in check_layer(params, state, vector=True).items()
    }
    if params.scale is None and params.bias is not None:
        raise ValueError("PyTorch has no layer with a bias and without a scale. Give `params` a scale of ones.")
    return values | {names["count"]: values[names["count"]].astype(np.int64)}
