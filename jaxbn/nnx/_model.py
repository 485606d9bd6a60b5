"""Convert all batch normalizations of an nnx model, and mask its scales and biases."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from jaxbn._core import check
from jaxbn.lstm._state import LSTMState
from jaxbn.nnx._batch_norm import BatchNorm
from jaxbn.nnx._iter_norm import IterNorm
from jaxbn.nnx._lstm import BatchNormLSTMCell

M = TypeVar("M")
N = TypeVar("N", BatchNorm, nnx.BatchNorm)

# Arguments of the constructor that an existing layer cannot change.
_CONSTRUCTOR_ONLY = {"self", "num_features", "num_domains", "rngs", "param_dtype", "use_bias", "use_scale"}

_OURS = {
    "unbiased_running_var": False,
    "activation": None,
    "frozen": False,
    "count": None,
    "ghost_batches": 1,
    "renorm": None,
    "num_domains": None,
    "example_weight": None,
}


@overload
def convert(model: nnx.BatchNorm, **changes: Any) -> BatchNorm: ...
@overload
def convert(model: nnx.BatchNorm, to: type[N], **changes: Any) -> N: ...
@overload
def convert(model: M, to: type = BatchNorm, **changes: Any) -> M: ...
def convert(model: Any, to: Any = BatchNorm, **changes: Any) -> Any:
    """Convert every batch normalization of a model, flax's or ours, to class `to`.

    Weights, statistics and sharing are kept: the new model holds the very variables of the old one, so that training
    either moves both; a layer used in two places is one layer still. The old model itself is left as it is, and so are
    other subclasses of flax's class, which may compute something else: a warning names them, or says that there was
    nothing to convert.

    Args:
        model: an nnx module, or any graph of them; a batch normalization itself too.
        to: `jaxbn.nnx.BatchNorm`, or `flax.nnx.BatchNorm` to go back.
        **changes: attributes to set in all of them: `axis_name="data"`, `momentum=0.9`, `frozen=True`, `epsilon=1e-3`.
            A schedule starts at count 0, and may so forget the statistics there are, which is warned of; set
            `layer.count` then.

    Returns:
        A model of the same structure.

    Raises:
        TypeError: no nnx module in `model`, another class than the two, or an attribute that it does not have.
        ValueError: going back would lose something that flax has no name for.

    Example:
        >>> from flax import nnx
        >>> import jaxbn.nnx
        >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
        >>> model = jaxbn.nnx.convert(model, momentum=0.9)
        >>> type(model.layers[1]).__module__.split(".")[0], model.layers[1].momentum
        ('jaxbn', 0.9)
    """
    kinds = (BatchNorm, nnx.BatchNorm)
    if not any(to is kind for kind in kinds):  # a subclass may know neither our options nor how to be made
        raise TypeError(f"`to` must be `jaxbn.nnx.BatchNorm` or `flax.nnx.BatchNorm`; got {to!r}.")
    _check_model(model)
    known = set(inspect.signature(to.__init__).parameters) - _CONSTRUCTOR_ONLY
    known = {name for name in known if not name.endswith(("_init", "_metadata"))}
    unknown = set(changes) - known
    if unknown:
        raise TypeError(f"`{to.__name__}` has no attribute {sorted(unknown)}; it has {sorted(known)}.")

    layers = iter_layers(model, nnx.BatchNorm)
    others = sorted({type(layer).__name__ for layer in layers.values() if type(layer) not in kinds})
    if others or not layers:
        found = f"subclasses too, which stay: {', '.join(others)}" if others else "none"
        warnings.warn(f"`convert` is of the BatchNorm of flax.nnx and jaxbn.nnx; `model` has {found}.", stacklevel=2)
    return replace_modules(model, lambda _, node: _convert_layer(to, node, changes) if type(node) in kinds else None)


def iter_layers(model: Any, kinds: Any = nnx.Module) -> dict[str, Any]:
    """Return the modules of a model by path, each once, also in containers that are no modules."""
    modules = list(nnx.iter_modules(model, graph=True))
    return {"/".join(map(str, path)): module for path, module in modules if isinstance(module, kinds)}


def _check_model(model: Any) -> None:
    """Check that there is a module in `model`: anything else would come back unchanged."""
    if not iter_layers(model):
        raise TypeError(
            f"`model` must be an nnx module or a graph of them; got {type(model).__name__}. Join what was split by "
            "`nnx.merge`; variables of linen are for `jaxbn.linen`."
        )


def replace_modules(model: M, choose: Callable[[str, Any], nnx.Module | None]) -> M:
    """Return a model that holds the same variables, with other modules where `choose(path, module)` gives one.

    `nnx.recursive_map` cannot change a tuple; so the copy of a module becomes the other one, wherever it is held.
    """
    copy = nnx.clone(model, variables=False, graph=True)
    for (path, original), shell in zip(iter_layers(model).items(), iter_layers(copy).values(), strict=True):
        if (new := choose(path, original)) is not None:
            shell.__class__ = type(new)
            vars(shell).clear()
            vars(shell).update(vars(new))
    return copy


def _convert_layer(to: Any, layer: Any, changes: dict[str, Any]) -> nnx.Module:
    """Make a layer of class `to` that holds the variables of `layer`."""
    settings = {
        name: getattr(layer, name) for name in inspect.signature(to.__init__).parameters if hasattr(layer, name)
    }
    settings |= changes
    if to is nnx.BatchNorm:
        has = {name: getattr(layer, name, default) for name, default in _OURS.items()}
        has = {name: bool(v) if isinstance(v, np.bool_) else v for name, v in has.items()}
        lost = [name for name, default in _OURS.items() if has[name] is not default]
        if not hasattr(layer.num_features, "__index__"):
            lost.append("num_features of several axes")
        if callable(settings["momentum"]):
            lost.append("momentum (a schedule)")
        if lost:
            raise ValueError(f"`flax.nnx.BatchNorm` has no {', '.join(lost)}: convert those away first.")
    new = to(**settings, rngs=nnx.Rngs(0))
    for name in ("scale", "bias", "mean", "var", "count"):
        if getattr(layer, name, None) is not None and getattr(new, name, None) is not None:
            setattr(new, name, getattr(layer, name))
    stats = [(new.mean.get_value(), 0), (new.var.get_value(), 1)]
    uncounted = getattr(new, "count", None) is not None and getattr(layer, "count", None) is None
    if uncounted:  # for each layer of a stack, and each domain
        stacked = new.mean.shape[: new.mean.ndim - len(check.sizes(new.num_features))]
        vars(new)["count"].set_value(jnp.zeros(stacked, jnp.int32))
    concrete = not any(isinstance(v, (Tracer, jax.ShapeDtypeStruct)) or not v.is_fully_addressable for v, _ in stats)
    if uncounted and concrete and any(np.any(np.asarray(v) != start) for v, start in stats):
        warnings.warn(
            "The statistics of a layer now follow a schedule and have no count of their updates: its first step may "
            "replace them. Set `layer.count[...]` to the number of updates that they have seen.",
            stacklevel=5,
        )
    return new


def affine_mask(model: Any) -> nnx.State:
    """Mask the scales and biases of batch normalizations among a model's parameters.

    For optax: `optax.masked(optax.set_to_zero(), affine_mask(model))` freezes them, and
    `optax.adamw(lr, mask=jax.tree.map(operator.not_, affine_mask(model)))` leaves them out of weight decay.

    Args:
        model: an nnx module.

    Returns:
        `nnx.state(model, nnx.Param)`, True for each scale and bias of a batch normalization, those of an
        `IterNorm` and a `BatchNormLSTMCell` among them, else False.

    Raises:
        TypeError: no nnx module in `model`.

    Example:
        >>> from flax import nnx
        >>> import jaxbn.nnx
        >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
        >>> mask = jaxbn.nnx.affine_mask(model)
        >>> mask["layers"][0]["kernel"], mask["layers"][1]["scale"]
        (False, True)
    """
    _check_model(model)
    ours = set()
    for _, module in nnx.iter_modules(model):
        norms = [module] if isinstance(module, (nnx.BatchNorm, IterNorm)) else []
        if isinstance(module, BatchNormLSTMCell):
            norms = [getattr(module, name) for name in LSTMState._fields]
        ours |= {id(getattr(norm, name, None)) for norm in norms for name in ("scale", "bias")}
    at = {path: id(node) in ours for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Variable)}
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    # Bare bools: `nnx.Optimizer` gives optax arrays, and a bool is a prefix of a variable as well.
    return nnx.from_flat_state([(path, at[path]) for path, _ in flat])
