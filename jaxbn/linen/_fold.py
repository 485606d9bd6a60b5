"""The batch normalizations of a linen model folded into the layers before them."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.core import Tracer

from jaxbn._core.state import BatchNormParams, BatchNormState
from jaxbn._flax import fold_model
from jaxbn.linen._batch_norm import BatchNorm
from jaxbn.linen._model import flattened, unflattened


def fold(
    apply: Callable[[Any, Any], Any],
    variables: Mapping[str, Any],
    pairs: Mapping[str, str],
    x: Any,
    *,
    drop: bool = False,
    tolerance: float = 1e-4,
) -> Mapping[str, Any]:
    """Variables with which the same model gives the same outputs in evaluation, and its normalizations do nothing.

    Each layer of `pairs` takes on `y = a x + b` of the normalization behind it, as `jaxbn.inference.fold` says. That
    one becomes the identity: scale 1, bias and mean 0, and variance `1 - epsilon`, with which `sqrt(var + epsilon)` is
    1 to the last bit of float32. A layer without a bias leaves the shift in the normalization, as mean `-b`.

    The normalizations still run, though. `drop=True` gives variables without them, for the same model built with the
    identity in their place and a bias in each of the layers: `norm=lambda **_: lambda x: x`. What was inside the
    layer, `activation` and `residual`, or given to its call, `scale` and `bias`, that model must do itself.

    Args:
        apply: `apply(variables, x)` calls the model in evaluation, `lambda v, x: model.apply(v, x, train=False)`; with
            `mutable=["batch_stats"]`, as `recalibrate` wants it, too. A plain function: what is compiled already is not
            seen into.
        variables: the model's, with `params` and `batch_stats`.
        pairs: layer -> normalization directly behind it, by their paths: `{"block/Conv_0": "block/BatchNorm_0"}`.
            Any layer with a kernel whose last axis are the output features, and `nn.ConvTranspose`; stacks of layers
            that `nn.scan` keeps on a leading axis too. Flax's `BatchNorm` and ours.
        x: an example input. On it, by these statistics and by others, the model is compared with what it was. The
            outputs of a global one of several processes are brought together in each of them.
        drop: leave the normalizations out.
        tolerance: the difference of outputs allowed, relative to the largest.

    Returns:
        New nested dicts, frozen where `variables` are; what is not folded is the very arrays.

    Raises:
        TypeError, ValueError: an unknown path, feature counts that do not match, a normalization named twice, of
            several domains, with an `example_weight`, or not in evaluation; or the outputs differ, because something is
            between layer and normalization.

    Example:
        >>> import jax, jax.numpy as jnp, flax.linen as nn, jaxbn.linen
        >>> model = nn.Sequential([nn.Dense(3), jaxbn.linen.BatchNorm(use_running_average=True)])
        >>> variables = model.init(jax.random.key(0), x := jnp.ones((2, 4)))
        >>> new = jaxbn.linen.fold(model.apply, variables, {"layers_0": "layers_1"}, x, drop=True)
        >>> y = nn.Sequential([nn.Dense(3)]).apply(new, x)
        >>> bool(jnp.allclose(y, model.apply(variables, x), atol=1e-5))
        True

    Source: as `jaxbn.inference.fold`. The comparison is on one input: give one like those to come.
    """
    flat = flattened(variables)
    layers = {"/".join(path[1:-1]) for path in flat if path[0] == "params" and path[-1] == "kernel"}
    stats = {path[1:-1] for path in flat if path[0] == "batch_stats" and path[-1] == "mean"}
    norms = {"/".join(path) for path in stats if ("batch_stats", *path, "var") in flat}
    pairs = fold_model.checked(pairs, layers, norms)
    called: dict[str, Any] = {}

    def record(call, args, kwargs, context):
        name = "/".join(context.module.path)
        if context.method_name == "__call__" and name not in called:
            called[name] = context.module
        if name in pairs.values() and not isinstance(context.module, (BatchNorm, nn.BatchNorm)):
            raise ValueError(f"`pairs` must name BatchNorm layers; {name!r} is a {type(context.module).__name__}.")
        if name in pairs.values() and not _evaluates(context.module, args, kwargs):
            raise ValueError(
                f"`apply` must call the model in evaluation, but {name!r} normalizes by the batch. Pass on what the "
                "model calls it: `lambda variables, x: model.apply(variables, x, train=False)`."
            )
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        apply(variables, x)
    for name in (*pairs, *pairs.values()):
        if name not in called:
            raise ValueError(f"`pairs` names {name!r}, which `apply` does not call, or not as a plain function.")

    probed = dict(flat)
    for seed, norm in enumerate(pairs.values()):
        at = [("batch_stats", *norm.split("/"), leaf) for leaf in ("mean", "var")]
        moved = fold_model.probe(_value(flat[at[0]]), _value(flat[at[1]]), seed)
        probed |= {path: _like(flat[path], value) for path, value in zip(at, moved, strict=True)}

    def difference(chosen: Mapping[str, str]) -> float:
        def run(flat):
            out = apply(unflattened(flat, variables), x)
            updated = (
                isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], Mapping) and "batch_stats" in out[1]
            )
            return out[0] if updated else out

        gaps = (fold_model.gap(run(start), run(_folded(start, chosen, called, False))) for start in (flat, probed))
        return max(gaps, key=lambda gap: (gap != gap, gap))

    fold_model.verify(pairs, difference, tolerance)
    return unflattened(_folded(flat, pairs, called, drop), variables)


def _folded(
    flat: dict[tuple, Any], pairs: Mapping[str, str], called: Mapping[str, Any], drop: bool
) -> dict[tuple, Any]:
    """The flattened variables with `pairs` folded."""
    flat = dict(flat)
    for layer, norm in pairs.items():
        kernel, bias = (("params", *layer.split("/"), leaf) for leaf in ("kernel", "bias"))
        at = {leaf: ("params", *norm.split("/"), leaf) for leaf in ("scale", "bias")}
        at |= {leaf: ("batch_stats", *norm.split("/"), leaf) for leaf in ("mean", "var")}
        own = {leaf: _value(flat.get(path)) for leaf, path in at.items()}
        new_kernel, new_bias, shift = fold_model.folded(
            layer,
            norm,
            called[norm],
            BatchNormParams(own["scale"], own["bias"]),
            BatchNormState(own["mean"], own["var"], jnp.zeros((), jnp.int32)),
            _value(flat[kernel]),
            _value(flat.get(bias)),
            called[layer],
        )
        identity = {
            "scale": jnp.ones_like(own["var"]),
            "bias": jnp.zeros_like(own["mean"]),
            "mean": jnp.zeros_like(own["mean"]) if bias in flat else -shift,
            "var": jnp.full_like(own["var"], 1) - jnp.asarray(called[norm].epsilon, own["var"].dtype),
        }
        flat[kernel] = _like(flat[kernel], new_kernel)
        if bias in flat or drop:
            flat[bias] = _like(flat.get(bias), new_bias)
        for leaf, path in at.items():
            if drop:
                flat.pop(path, None)
                flat.pop((*path[:-1], "count"), None)
            elif path in flat:
                flat[path] = _like(flat[path], identity[leaf].astype(own[leaf].dtype))
    return flat


def _evaluates(module: Any, args: tuple, kwargs: Mapping[str, Any]) -> bool:
    given = args[1] if len(args) > 1 else kwargs.get("use_running_average")
    given = module.use_running_average if given is None else given
    # A choice that only the program makes shows in the outputs.
    return getattr(module, "frozen", False) or isinstance(given, Tracer) or bool(given)


def _value(leaf: Any) -> Any:
    """What a variable holds. (A sharded initializer leaves its values in boxes.)"""
    return leaf.unbox() if hasattr(leaf, "unbox") else leaf


def _like(leaf: Any, value: Any) -> Any:
    return leaf.replace_boxed(value) if hasattr(leaf, "replace_boxed") else value
