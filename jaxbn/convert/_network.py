"""Conversion of the weights of a whole network, found by the names of its layers."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey, keystr

from jaxbn.convert import _keras, _torch
from jaxbn.convert._arrays import check_mapping, find_bad_statistics, load_array, raise_problems

Names = Mapping[str, str | None] | Callable[[str], str | None]


class Dialect(NamedTuple):
    """Layout of a layer's arrays in another library.

    Attributes:
        separator: between the names of layers, and of a layer and its arrays.
        leaves: a Flax leaf's name -> the names that the library's array may have.
        kernel_axes: the axes of the library's kernel in Flax's order, given their number.
    """

    separator: str
    leaves: Mapping[str, tuple[str, ...]]
    kernel_axes: Callable[[int], tuple[int, ...]]


# [out, in / groups, *spatial] and [out, in], both to Flax's [*spatial, in / groups, out].
_TORCH = Dialect(
    ".",
    {leaf: (name,) for leaf, name in _torch.NAMES.items()} | {"kernel": ("weight",), "embedding": ("weight",)},
    lambda ndim: (*range(2, ndim), 1, 0),
)
_KERAS = Dialect(
    "/",
    {leaf: (name,) for leaf, name in _keras.NAMES.items()}
    | {"kernel": ("kernel",), "embedding": ("embeddings",), "bias": ("bias", _keras.NAMES["bias"])},
    lambda ndim: tuple(range(ndim)),
)


def from_torch_network(target: Any, state_dict: Mapping[str, Any], names: Names) -> Any:
    """Convert the `state_dict` of a PyTorch model to the variables of the same model in Flax.

    Covered are convolutions of any number of dimensions, grouped and depthwise too, dense layers, embeddings, and
    batch, layer and group normalization: kernel `[*spatial, in / groups, out]` <- weight `[out, in / groups, *spatial]`
    or `[out, in]`; scale and embedding <- weight; bias <- bias; mean and var <- running_mean and running_var;
    count <- num_batches_tracked, which may also go unused. Not covered are transposed convolutions, whose kernels look
    the same and mean something else, and a dense layer after a flattened image, whose inputs come in another order.

    Args:
        target: linen's variables `{"params": ..., "batch_stats": ...}` or an `nnx.State` of parameters and statistics
            (`nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))`), for its structure, shapes and dtypes; the arrays
            may be abstract, from `jax.eval_shape` or `nnx.eval_shape`.
        state_dict: name -> tensor or array. Leave out entries that are not wanted.
        names: target layer -> source layer, `{"stem/bn": "layer1.0.bn1"}`, or a function that maps so. None, where a
            layer is to stay as it is in the target: a new head.

    Returns:
        A tree like `target`, with copies in its dtypes.

    Raises:
        TypeError: an argument is no mapping, or an entry no dense array.
        ValueError: target leaves that no name matches, names of no target layer, missing and unused source entries,
            other shapes (with both), other types. It names all of them.

    Example:
        >>> import numpy as np
        >>> from jaxbn.convert import from_torch_network
        >>> target = {"params": {"head": {"kernel": np.zeros((3, 2), np.float32), "bias": np.zeros(2, np.float32)}}}
        >>> saved = {"fc.weight": np.array([[1.0, 2, 3], [4, 5, 6]]), "fc.bias": np.ones(2)}
        >>> print(from_torch_network(target, saved, {"head": "fc"})["params"]["head"]["kernel"])
        [[1. 4.]
         [2. 5.]
         [3. 6.]]

    Source: the layouts in `torch/nn/modules/{conv,linear}.py` of PyTorch 2.13 and in `flax/linen/linear.py` of 0.12.
    """
    return _convert_network(_TORCH, target, state_dict, names)


def from_keras_network(target: Any, variables: Mapping[str, Any], names: Names) -> Any:
    """Convert the variables of a Keras 3 model to those of the same model in Flax, as `from_torch_network` does.

    Kernels have one layout in both, a depthwise convolution's excepted, which is refused for its shape.

    Args:
        target: as for `from_torch_network`.
        variables: path -> variable or array: `{v.path: v for v in model.weights}`.
        names: target layer -> Keras path, `{"stem/bn": "resnet/bn1"}`, or a function that maps so, or None.

    Returns:
        A tree like `target`, with copies in its dtypes.

    Raises:
        TypeError, ValueError: as `from_torch_network`.

    Example:
        >>> import numpy as np
        >>> from jaxbn.convert import from_keras_network
        >>> target = {"batch_stats": {"bn": {"mean": np.zeros(2, np.float32), "var": np.zeros(2, np.float32)}}}
        >>> saved = {"net/bn/moving_mean": np.ones(2), "net/bn/moving_variance": np.full(2, 4.0)}
        >>> print(from_keras_network(target, saved, {"bn": "net/bn"})["batch_stats"]["bn"]["var"])
        [4. 4.]

    Source: `keras/src/layers` of Keras 3.15.
    """
    return _convert_network(_KERAS, target, variables, names)


def _convert_network(dialect: Dialect, target: Any, source: Mapping[str, Any], names: Names) -> Any:
    source = check_mapping("state_dict" if dialect is _TORCH else "variables", source, "a mapping of names to arrays")
    if not callable(names):
        names = check_mapping("names", names, "a mapping of layers' names, or a function")
    flat, structure = jax.tree_util.tree_flatten_with_path(target)
    if other := [_name_leaf(path) for path, leaf in flat if not hasattr(leaf, "shape")]:
        raise TypeError(f"`target` must hold arrays, or their shapes and dtypes; got something else at {other[0]!r}.")
    unmatched, missing, shapes, types, values = [], [], [], [], []
    layers, used = set(), set()
    new = []
    for path, leaf in flat:
        layer, _, name = _name_leaf(path).rpartition("/")
        layers.add(layer)
        prefix = names(layer) if callable(names) else names.get(layer)
        new.append(leaf)
        if prefix is None and (callable(names) or layer in names):
            continue
        if prefix is None or name not in dialect.leaves:
            unmatched.append(_name_leaf(path) + ("" if prefix is None else f" (no rule for {name!r})"))
            continue
        if not isinstance(prefix, str):
            raise TypeError(f"`names` must give layers' names, or None; got {prefix!r} for {layer!r}.")
        start = prefix.removesuffix(dialect.separator) + dialect.separator if prefix else ""
        # PyTorch's number of updates is known, and has no place in most targets.
        used |= {start + theirs for theirs in dialect.leaves.get("count", ())}
        candidates = [start + theirs for theirs in dialect.leaves[name]]
        entry = next((candidate for candidate in candidates if candidate in source), None)
        if entry is None:
            missing.append(f"{' or '.join(candidates)} (for {_name_leaf(path)})")
            continue
        used.add(entry)
        value = load_array(entry, source[entry])
        shape = value.shape
        if name == "kernel" and value.ndim > 1:
            value = value.transpose(dialect.kernel_axes(value.ndim))
        if value.shape != leaf.shape:
            turned = "" if value.shape == shape else f" as {value.shape}"
            shapes.append(f"{_name_leaf(path)} {leaf.shape} from {entry} {shape}{turned}")
        elif _dtype_kind(value.dtype) != _dtype_kind(leaf.dtype):
            types.append(f"{_name_leaf(path)} {leaf.dtype} from {entry} {value.dtype}")
        elif wrong := find_bad_statistics(name, value):
            values.append(f"{_name_leaf(path)} from {entry}, {wrong}")
        else:
            with np.errstate(over="ignore"):
                new[-1] = jnp.asarray(value.astype(leaf.dtype))
            if name in ("mean", "var") and np.any(np.isinf(new[-1]) & np.isfinite(value)):
                values.append(f"{_name_leaf(path)} from {entry}, which {leaf.dtype} does not hold")
    raise_problems(
        "The source does not fit the target; nothing was converted.",
        {
            "target leaves that no name matches": unmatched,
            "names of no target layer": [] if callable(names) else [name for name in names if name not in layers],
            "missing in the source": missing,
            "of another shape": shapes,
            "of another type": types,
            "not statistics": values,
            "not used of the source": [entry for entry in source if entry not in used],
        },
    )
    return jax.tree.unflatten(structure, new)


def _name_leaf(path: tuple[Any, ...]) -> str:
    """Return the leaf's path in the model, without linen's collection before it and the box after it."""
    if path and isinstance(path[-1], GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    name = keystr(path, simple=True, separator="/")
    first, _, rest = name.partition("/")
    return rest if first in ("params", "batch_stats") else name


def _dtype_kind(dtype: Any) -> str:
    kinds = (jnp.integer, jnp.floating, jnp.complexfloating)
    return next((kind.__name__ for kind in kinds if jnp.issubdtype(dtype, kind)), str(dtype))
