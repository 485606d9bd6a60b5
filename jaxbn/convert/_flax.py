"""Conversion of one layer from and to Flax: linen's variables and nnx's modules, flax's own layers and ours."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxbn._core.state import BatchNormParams, BatchNormState
from jaxbn.convert._arrays import OURS, check_fit, check_layer, check_mapping, read_layer

_NAMES = {
    "scale": "params/scale",
    "bias": "params/bias",
    "mean": "batch_stats/mean",
    "var": "batch_stats/var",
    "count": "batch_stats/count",
}


def from_linen(variables: Mapping[str, Mapping[str, Any]]) -> tuple[BatchNormParams, BatchNormState]:
    """Convert the variables of a linen batch normalization to params and state.

    To continue as linen would: `bn_apply` with the layer's momentum and epsilon, which mean the same.

    Args:
        variables: of the one layer: `{"params": {scale, bias}, "batch_stats": {mean, var}}`, arrays `[*features]`.

    Returns:
        `(params, state)`: None for a missing scale or bias; `count` is 0 where it keeps none, as flax's never does, and
        `state._replace(count=...)` sets it. The very arrays, but statistics in half precision become float32.

    Raises:
        TypeError: `variables` are not nested mappings, or an entry is no array.
        ValueError: entries are missing, unexpected, or of a wrong shape or type; all of them are named.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxbn.convert import from_linen
        >>> params, state = from_linen({"batch_stats": {"mean": jnp.zeros(2), "var": jnp.ones(2)}})
        >>> print(params.scale, state.var)
        None [1. 1.]

    Source: `flax/linen/normalization.py` of Flax 0.12.
    """
    what = "a layer's variables, `{'params': {...}, 'batch_stats': {...}}`"
    kinds = {
        kind: check_mapping("variables", leaves, what)
        for kind, leaves in check_mapping("variables", variables, what).items()
    }
    entries = {f"{kind}/{name}": value for kind, leaves in kinds.items() for name, value in leaves.items()}
    # A sharded initializer leaves its values in boxes.
    entries = {name: value.unbox() if hasattr(value, "unbox") else value for name, value in entries.items()}
    names = {ours: theirs for ours, theirs in _NAMES.items() if ours != "count" or theirs in entries}
    return read_layer("`variables` are not those of one linen batch normalization:", entries, names)


def to_linen(params: BatchNormParams, state: BatchNormState, *, count: bool = False) -> dict[str, dict[str, Any]]:
    """Convert params and state to the variables of a linen batch normalization, the inverse of `from_linen`.

    Args:
        params: scale and bias `[*features]`, or None.
        state: mean and var `[*features]`, count `[]`.
        count: whether the layer keeps it: `jaxbn.linen.BatchNorm` does where its momentum is a schedule, flax's never.

    Returns:
        `{"params": ..., "batch_stats": ...}` with the very arrays; no `params` where there are none.

    Raises:
        ValueError: not the params and state of one layer.

    Example:
        >>> import jaxbn
        >>> from jaxbn.convert import to_linen
        >>> variables = to_linen(*jaxbn.bn_init(2, bias=None))
        >>> {kind: sorted(leaves) for kind, leaves in variables.items()}
        {'params': ['scale'], 'batch_stats': ['mean', 'var']}

    Source: as `from_linen`.
    """
    variables: dict[str, dict[str, Any]] = {}
    for name, value in check_layer(params, state).items():
        if name != "count" or count:
            kind, leaf = _NAMES[name].split("/")
            variables.setdefault(kind, {})[leaf] = value
    return variables


def from_nnx(module: Any) -> tuple[BatchNormParams, BatchNormState]:
    """Convert an nnx batch normalization to params and state.

    To continue as nnx would: `bn_apply` with the module's momentum and epsilon, which mean the same.

    Args:
        module: `flax.nnx.BatchNorm` or `jaxbn.nnx.BatchNorm`, arrays `[*features]`.

    Returns:
        `(params, state)`: None for a missing scale or bias; `count` is 0 where it keeps none, as flax's never does, and
        `state._replace(count=...)` sets it. The very arrays, but statistics in half precision become float32. With
        `num_domains` all have a leading axis of domains, as `jaxbn.domains.domain_apply` takes them.

    Raises:
        TypeError: an abstract module, of `nnx.eval_shape`.
        ValueError: not one batch normalization: arrays are missing, or of a wrong shape or type; all of them are named.

    Example:
        >>> from flax import nnx
        >>> from jaxbn.convert import from_nnx
        >>> params, state = from_nnx(nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
        >>> print(params.scale, state.mean)
        [1. 1.] [0. 0.]

    Source: `flax/nnx/nn/normalization.py` of Flax 0.12.
    """
    values = {name: variable.get_value() for name, variable in _find_variables(module).items() if variable is not None}
    names = {name: name for name in OURS if name != "count" or name in values}
    headline = f"This {type(module).__name__} is not an nnx batch normalization:"
    return read_layer(headline, values, names, stacked=_find_stacked(module, values.get("mean")))


def to_nnx(module: Any, params: BatchNormParams, state: BatchNormState) -> None:
    """Write params and state into an nnx batch normalization, the inverse of `from_nnx`.

    Args:
        module: `flax.nnx.BatchNorm` or `jaxbn.nnx.BatchNorm`, an abstract one of `nnx.eval_shape` too; it is changed,
            after everything has been checked.
        params: scale and bias `[*features]`, None where the module has none. They keep their dtypes.
        state: mean and var `[*features]`, and count `[]`, which is dropped where the module keeps none.

    Raises:
        ValueError: not the params and state of one layer, or not of this one; all differences are named.

    Example:
        >>> from flax import nnx
        >>> import jaxbn
        >>> from jaxbn.convert import to_nnx
        >>> module = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
        >>> to_nnx(module, *jaxbn.bn_init(2, mean=3.0))
        >>> print(module.mean[...])
        [3. 3.]

    Source: as `from_nnx`.
    """
    variables = _find_variables(module)
    has = {name: None if variable is None else variable.get_value() for name, variable in variables.items()}
    values = check_layer(params, state, stacked=_find_stacked(module, getattr(state, "mean", None)))
    check_fit(type(module).__name__, {name: has[name] for name in has if name != "count"}, values)
    for name, variable in variables.items():
        if variable is not None:
            variable.set_value(values[name])


def _find_variables(module: Any) -> dict[str, Any]:
    found = {name: getattr(module, name, None) for name in OURS}
    return {name: value if hasattr(value, "set_value") else None for name, value in found.items()}


def _find_stacked(module: Any, mean: Any) -> tuple[int, ...]:
    """Return the axes of `mean`, of layers and of domains, that come before the features."""
    shape = np.shape(mean)
    features = getattr(module, "num_features", 0)
    return shape[: max(len(shape) - (len(features) if isinstance(features, Sequence) else 1), 0)]
