"""What may be wrong with the batch normalizations of a linen model."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxbn._core import check
from jaxbn._core.state import BatchNormParams, BatchNormState
from jaxbn._flax.module import output_dtype, own_or_given, widened
from jaxbn.diagnostics._health import compared, is_traced, judged, of_whitening, plain, reached, warn_if_unseen
from jaxbn.diagnostics._report import Batch, Health
from jaxbn.linen._batch_norm import BatchNorm
from jaxbn.linen._iter_norm import IterNorm
from jaxbn.linen._lstm import BatchNormLSTMCell, is_of_cell
from jaxbn.linen._model import flattened
from jaxbn.lstm._state import LSTMState


def health(
    variables: Mapping[str, Any],
    apply: Callable[[Any, Any], Any] | None = None,
    x: Any = None,
    *,
    epsilon: float = 1e-5,
) -> Health:
    """What may be wrong with a model's batch normalizations: to be looked at when evaluation is bad.

    `jaxbn.diagnostics.health` of each layer. Given a batch, each layer's input is compared with its running statistics
    while the layers normalize by the batch, as in training: so a layer is not blamed for what is wrong with those
    before it.

    Args:
        variables: the model's, with `batch_stats`; flax's layers, ours, and stacks of them that `nn.scan` keeps. What
            has `mean` and `var` there counts as a layer, and so do `IterNorm`, by the variances of its features, and
            each normalization of a `BatchNormLSTMCell`, by the time steps that training has reached.
        apply: `apply(variables, x)` calls the model, `lambda v, x: model.apply(v, x, train=False)`: a plain function,
            with the mode in which there is no dropout. Nothing is updated. What it calls compiled is not seen into;
            where so nothing can be compared, there is a warning.
        x: a batch from where evaluation is bad, some hundred examples if there are as many. A global one of several
            processes is brought together in each of them.
        epsilon: of layers that `apply` does not show: of all without it.

    Returns:
        A tuple of `LayerHealth`, one for each layer; `print` shows a table with advice. Layers inside a loop or a
        compiled part of the model, of several domains, frozen, or with complex input, `IterNorm` and LSTM cells are not
        compared with the batch, and normalize as the call has it.

    Raises:
        TypeError: the variables are traced, for this is for people.
        ValueError: there is no normalization, or `apply` without `x`.

    Example:
        >>> import jax, jax.numpy as jnp, flax.linen as nn, jaxbn.linen
        >>> model = nn.Sequential([nn.Dense(3), jaxbn.linen.BatchNorm(use_running_average=True)])
        >>> x = 3 + jax.random.normal(jax.random.key(1), (64, 2))
        >>> variables = model.init(jax.random.key(0), x)
        >>> found = jaxbn.linen.health(variables, model.apply, x)
        >>> found[0].path, found[0].untouched, found[0].batch.mean > 1
        ('layers_1', True, True)

    Source: as `jaxbn.diagnostics.health`.
    """
    if (apply is None) != (x is None):
        raise ValueError("`apply` and `x` go together: the batch is what the function is called with.")
    flat = {path: nn.meta.unbox(v) for path, v in flattened(variables).items()}
    layers = [path[1:-1] for path in flat if path[0] == "batch_stats" and path[-1] == "mean"]
    layers = [layer for layer in layers if ("batch_stats", *layer, "var") in flat or _whitens(flat, layer)]
    if not layers:
        raise ValueError("`variables` must hold `batch_stats` with mean and var; it has none. Pass all collections.")
    seen: dict[tuple[str, ...], list[Batch | None]] = {layer: [] for layer in layers}
    epsilons: dict[tuple[str, ...], float] = {}

    def watch(call, args, kwargs, context):
        module = context.module
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        if isinstance(module, BatchNormLSTMCell):
            epsilons.update({(*module.path, norm): module.epsilon for norm in LSTMState._fields})
        if isinstance(module, (BatchNorm, nn.BatchNorm, IterNorm)):
            epsilons[module.path] = module.epsilon
        if not isinstance(module, (BatchNorm, nn.BatchNorm)):
            return call(*args, **kwargs)
        params, stats = (module.variables.get(kind, {}) for kind in ("params", "batch_stats"))
        x, mask = jnp.asarray(args[0] if args else kwargs["x"]), kwargs.get("mask")
        axis = tuple(sorted(check.axes(module.axis, x.ndim)))
        scale, bias, mean, var = nn.meta.unbox([
            params.get("scale"), params.get("bias"), stats["mean"], stats["var"]
        ])  # fmt: skip
        given = [kwargs.get(name) for name in ("scale", "bias")]
        fits = np.shape(mean) == tuple(x.shape[a] for a in axis)
        traced = is_traced(x, mask, kwargs.get("residual"), *given, scale, bias, mean, var)
        if traced:
            seen.setdefault(module.path, []).append(None)
        if traced or jnp.iscomplexobj(x) or not fits or getattr(module, "frozen", False):
            return call(*args, **kwargs)
        scale, bias = own_or_given("scale", scale, given[0], None), own_or_given("bias", bias, given[1], None)
        dtype = output_dtype(x, scale, bias, dtype=module.dtype)
        y, batch = compared(
            BatchNormParams(scale, bias),
            BatchNormState(mean, var, jnp.zeros((), jnp.int32)),
            widened(x, dtype),
            axis=axis,
            epsilon=module.epsilon,
            mask=mask,
            activation=getattr(module, "activation", None),
            residual=kwargs.get("residual"),
        )
        seen.setdefault(module.path, []).append(batch)
        return y.astype(dtype)

    if apply is not None:
        with nn.intercept_methods(watch):
            plain(apply)(variables, x)
        warn_if_unseen(seen.values())
    found = []
    for layer in layers:
        scale, bias = (flat.get(("params", *layer, name)) for name in ("scale", "bias"))
        mean, var, cov, count = (flat.get(("batch_stats", *layer, name)) for name in ("mean", "var", "cov", "count"))
        state: Any = BatchNormState(mean, var, count)  # pyright: ignore[reportArgumentType]
        if var is None:
            state = of_whitening(mean, cov, count)
        elif is_of_cell(flat, ("batch_stats", *layer)):
            state = reached(layer[-1], state)
        where = "/".join(layer) or "the layer"
        found.append(
            judged(where, BatchNormParams(scale, bias), state, state.count, epsilons.get(layer, epsilon), seen[layer])
        )
    return Health(found)


def _whitens(flat: Mapping[tuple[str, ...], Any], layer: tuple[str, ...]) -> bool:
    """Whether the statistics are those of an `IterNorm`: a covariance for each group of features, and a count."""
    mean, cov, count = (flat.get(("batch_stats", *layer, name)) for name in ("mean", "cov", "count"))
    return cov is not None and mean is not None and count is not None and np.ndim(cov) == np.ndim(mean) + 2
