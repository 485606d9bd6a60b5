"""One layer to and from a PyTorch `state_dict`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxbn._core.state import BatchNormParams, BatchNormState
from jaxbn.convert._arrays import given, mapping, read, within

NAMES = {
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "count": "num_batches_tracked",
}


def from_torch(state_dict: Any, prefix: str = "") -> tuple[BatchNormParams, BatchNormState]:
    """A PyTorch batch normalization's `state_dict` as params and state.

    To go on as PyTorch would: `bn_apply(..., axis=1, momentum=1 - m, unbiased_running_var=True)` for its momentum m, or
    `momentum=jaxbn.cumulative_average` for its None.

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
    state_dict = mapping("state_dict", state_dict, "a PyTorch `state_dict`, or a layer")
    names, entries = within(state_dict, prefix, ".", NAMES)
    return read(
        "`state_dict` is not that of one PyTorch batch normalization (name a network's layer by `prefix`):",
        entries,
        names,
        vector=True,
    )


def to_torch(params: BatchNormParams, state: BatchNormState, prefix: str = "") -> dict[str, np.ndarray]:
    """Params and state as a PyTorch `state_dict`, the inverse of `from_torch`.

    Load it by `layer.load_state_dict({name: torch.from_numpy(v) for name, v in ...items()})`. PyTorch knows no
    bfloat16 of NumPy: take `v.astype("float32")` there, which the layer turns back into what it is.

    Args:
        params: scale and bias `[features]`, or None for both (`affine=False`) or for the bias (`bias=False`).
        state: mean and var `[features]`, count `[]`.
        prefix: the layer's name in a model.

    Returns:
        New NumPy arrays in the dtypes of `params` and `state`; `num_batches_tracked` is int64.

    Raises:
        ValueError: not the params and state of one layer, not real vectors, or a bias without a scale.

    Example:
        >>> import jaxbn
        >>> from jaxbn.convert import to_torch
        >>> sorted(to_torch(*jaxbn.bn_init(3, scale=None, bias=None), prefix="bn"))
        ['bn.num_batches_tracked', 'bn.running_mean', 'bn.running_var']

    Source: as `from_torch`.
    """
    names, _ = within({}, prefix, ".", NAMES)
    values = {names[name]: np.array(value) for name, value in given(params, state, vector=True).items()}
    if params.scale is None and params.bias is not None:
        raise ValueError("PyTorch has no layer with a bias and without a scale. Give `params` a scale of ones.")
    return values | {names["count"]: values[names["count"]].astype(np.int64)}
