"""Convert the variables of a linen model, and mask its scales and biases.

Linen builds its layers while the model runs, so there is no object to convert: the class and settings of the layers
belong in a factory that the model is given (`norm=partial(jaxbn.linen.BatchNorm, axis_name="data")`), and the variables
are converted.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.core import FrozenDict, freeze, meta
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxbn.linen._lstm import is_of_cell

V = TypeVar("V", bound=Mapping[str, Any])


def convert(variables: V, *, count: ArrayLike | Callable[[str], ArrayLike | None] | None = None) -> V:
    """Convert the variables of a model for the same model with other batch normalizations.

    Names and shapes are flax's, so between `flax.linen.BatchNorm` and `jaxbn.linen.BatchNorm` nothing changes but
    the number of updates, which a layer has where its momentum is a schedule. `IterNorm` and `BatchNormLSTMCell` always
    have one, and keep it.

    Args:
        variables: from `init` or a checkpoint, with `batch_stats`; nested mappings.
        count: the number of updates that the statistics have seen, for layers whose momentum is a schedule; None for
            layers without one, flax's among them. `[layers]` where `nn.scan` or `nn.vmap` has stacked them, `[domains]`
            of a layer with `num_domains`, `[layers, domains]` of a stack of those. For layers of several kinds a
            function of a layer's path, such as `"blocks/norm"`, that gives its count or None.

    Returns:
        New nested dicts that hold the same arrays, frozen where `variables` are.

    Raises:
        TypeError, ValueError: there are no `batch_stats`, or `count` is no number of updates.

    Example:
        >>> import jax, jax.numpy as jnp, flax.linen, jaxbn
        >>> x = jnp.ones((2, 3))
        >>> variables = flax.linen.BatchNorm().init(jax.random.key(0), x, use_running_average=False)
        >>> layer = jaxbn.linen.BatchNorm(momentum=jaxbn.cumulative_average)
        >>> variables = jaxbn.linen.convert(variables, count=10)
        >>> layer.apply(variables, x, use_running_average=True).shape
        (2, 3)
    """
    flat = flatten_variables(variables)
    layers = [layer for layer in _layers(flat) if not is_of_cell(flat, layer)]
    flat = {path: value for path, value in flat.items() if not (path[:-1] in layers and path[-1] == "count")}
    if count is not None:
        counts = {layer: count("/".join(layer[1:])) if callable(count) else count for layer in layers}
        flat |= {(*layer, "count"): _check_count(n) for layer, n in counts.items() if n is not None}
    return unflatten_variables(flat, variables)


def affine_mask(variables: Mapping[str, Any]) -> Any:
    """Mask the scales and biases of batch normalizations among a model's parameters.

    For optax: `optax.masked(optax.set_to_zero(), affine_mask(variables))` freezes them, and
    `optax.adamw(lr, mask=jax.tree.map(operator.not_, affine_mask(variables)))` leaves them out of weight decay.

    Args:
        variables: with `params` and `batch_stats`. A layer is a batch normalization if it has statistics, an
            `IterNorm` too.

    Returns:
        A tree like `variables["params"]`, True at each scale and bias of a batch normalization, False elsewhere.

    Raises:
        ValueError: there are no `batch_stats`.

    Example:
        >>> import jax, jax.numpy as jnp, flax.linen as nn, jaxbn.linen
        >>> model = nn.Sequential([nn.Dense(3), jaxbn.linen.BatchNorm(use_running_average=False)])
        >>> mask = jaxbn.linen.affine_mask(model.init(jax.random.key(0), jnp.ones((2, 3))))
        >>> mask["layers_1"]["scale"], mask["layers_0"]["kernel"]
        (True, False)
    """
    layers = {layer[1:] for layer in _layers(flatten_variables(variables), ("var", "cov"))}
    return jax.tree.map_with_path(
        lambda path, _: tuple(getattr(key, "key", None) for key in path[:-1]) in layers,
        variables.get("params", {}),
        is_leaf=lambda v: isinstance(v, meta.AxisMetadata),
    )


def flatten_variables(variables: Any, **how: Any) -> dict[tuple[str, ...], Any]:
    """Return the variables by their paths."""
    if not isinstance(variables, Mapping) or not all(isinstance(v, Mapping) for v in variables.values()):
        raise TypeError(
            "`variables` must be those that `init` gives, dicts of `params` and of `batch_stats`; got "
            f"{variables!r:.200}."
        )
    return traverse_util.flatten_dict(dict(variables), **how)


def unflatten_variables(flat: Mapping[tuple[str, ...], Any], like: Mapping[str, Any]) -> Any:
    """Return nested dicts, frozen where those of `like` are: to optax and `jit` a `FrozenDict` is another tree."""
    nested = traverse_util.unflatten_dict(flat)
    if isinstance(like, FrozenDict):
        return freeze(nested)
    return {kind: freeze(v) if isinstance(like.get(kind), FrozenDict) else v for kind, v in nested.items()}


def _check_count(count: ArrayLike) -> jax.Array:
    """Return a number of updates, or several, in int32."""
    try:
        value = count if isinstance(count, jax.Array) else np.asarray(count)
    except (TypeError, ValueError):
        raise TypeError(f"`count` must be a number of updates, or one for each layer; got {count!r}.") from None
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(f"`count` must be an integer, or integers; got {count!r}.")
    if not isinstance(value, Tracer) and not np.all((np.asarray(value) >= 0) & (np.asarray(value) < 2**31)):
        raise ValueError(f"`count` must be at least 0 and fit int32; got {count!r}.")
    return jnp.asarray(value, jnp.int32)


def _layers(flat: Mapping[tuple[str, ...], Any], spreads: Sequence[str] = ("var",)) -> list[tuple[str, ...]]:
    """Return the paths of the layers that have running statistics."""
    layers = [path[:-1] for path in flat if path[0] == "batch_stats" and path[-1] == "mean"]
    layers = [layer for layer in layers if any((*layer, spread) in flat for spread in spreads)]
    if not layers:
        raise ValueError(
            f"`variables` must hold `batch_stats` with mean and {' or '.join(spreads)}; it has none. Pass all "
            "collections."
        )
    return layers
