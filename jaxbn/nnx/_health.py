"""What may be wrong with the batch normalizations of an nnx model."""

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxbn._core import check
from jaxbn._core.state import BatchNormParams, BatchNormState
from jaxbn._flax.module import output_dtype, own_or_given, widened
from jaxbn.diagnostics._health import compared, is_traced, judged, of_whitening, plain, reached, warn_if_unseen
from jaxbn.diagnostics._report import Batch, Health
from jaxbn.lstm._state import LSTMState
from jaxbn.nnx._batch_norm import BatchNorm
from jaxbn.nnx._iter_norm import IterNorm
from jaxbn.nnx._lstm import BatchNormLSTMCell
from jaxbn.nnx._model import replaced


class Watched(nnx.Module):
    """A batch normalization that hands on what a batch shows, and normalizes by the batch without an update."""

    def __init__(self, norm: Any, see: Callable[[Batch | None], None]):
        self.norm, self.see = norm, see

    def __call__(
        self,
        x: Any,
        use_running_average: Any = None,
        *,
        mask: Any = None,
        residual: Any = None,
        scale: Any = None,
        bias: Any = None,
        update: Any = True,
        **rest: Any,
    ):
        """Take the arguments of a normalization, of which the mode means nothing here.

        Args:
            x: the input.
            use_running_average: without effect where the input is watched.
            mask: True where a value counts.
            residual: added before the activation.
            scale, bias: for a layer without its own.
            update: without effect: nothing is updated.
            **rest: what a variant of the layer takes.

        Returns:
            An array of x's shape.
        """
        norm, x = self.norm, jnp.asarray(x)
        params, state = _arrays(norm)
        fits = state.mean.shape == tuple(x.shape[a] for a in check.axes(norm.axis, x.ndim))
        traced = is_traced(x, mask, residual, scale, bias, *params, *state)
        if traced:
            self.see(None)
        if rest or jnp.iscomplexobj(x) or traced or not fits or getattr(norm, "frozen", False):
            options = {"mask": mask, "residual": residual, "scale": scale, "bias": bias, **rest}
            options = {name: value for name, value in options.items() if value is not None}
            return norm(x, use_running_average, **options)
        params = BatchNormParams(
            own_or_given("scale", params.scale, scale, None), own_or_given("bias", params.bias, bias, None)
        )
        dtype = output_dtype(x, *params, state.mean, state.var, dtype=norm.dtype)
        y, batch = compared(
            params,
            state,
            widened(x, dtype),
            axis=norm.axis,
            epsilon=norm.epsilon,
            mask=mask,
            activation=getattr(norm, "activation", None),
            residual=residual,
        )
        self.see(batch)
        return y.astype(dtype)


def health(model: Any, x: Any = None, call: Callable[[Any, Any], Any] = lambda model, x: model(x)) -> Health:
    """What may be wrong with a model's batch normalizations: to be looked at when evaluation is bad.

    `jaxbn.diagnostics.health` of each layer. Given a batch, each layer's input is compared with its running statistics
    while the layers normalize by the batch, as in training: so a layer is not blamed for what is wrong with those
    before it. The model is left as it is.

    Args:
        model: an nnx module, with flax's layers, ours, and stacks of them that `nnx.vmap` makes; and with `IterNorm`,
            which counts by the variances of its features, and `BatchNormLSTMCell`, each of whose normalizations counts
            as a layer, by the time steps that training has reached.
        x: a batch from where evaluation is bad, some hundred examples if there are as many. A global one of several
            processes is brought together in each of them.
        call: `call(model, x)` uses the model, of which it is given a copy in evaluation mode: a plain function, for
            what it calls compiled is not seen into. Where so nothing can be compared, there is a warning.

    Returns:
        A tuple of `LayerHealth`, one for each layer; `print` shows a table with advice. Layers inside a loop or a
        compiled part of the model, of several domains, frozen, or with complex input, `IterNorm` and LSTM cells are not
        compared with the batch, and normalize by their running statistics.

    Raises:
        TypeError: the arrays are traced, for this is for people.
        ValueError: there is no normalization.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> import jaxbn.nnx
        >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
        >>> found = jaxbn.nnx.health(model, 3 + jax.random.normal(jax.random.key(1), (64, 2)))
        >>> found[0].path, found[0].untouched, found[0].batch.mean > 1
        ('layers/1', True, True)

    Source: as `jaxbn.diagnostics.health`.
    """
    kinds, modules = (BatchNorm, nnx.BatchNorm), dict(nnx.iter_modules(model, graph=True))
    if not any(isinstance(module, (*kinds, IterNorm, BatchNormLSTMCell)) for module in modules.values()):
        raise ValueError("`model` must have batch normalizations, `jaxbn.nnx.BatchNorm` or flax's; it has none.")
    seen: dict[Any, list[Batch | None]] = {path: [] for path, module in modules.items() if isinstance(module, kinds)}
    if x is not None:
        watched = replaced(model, lambda path, node: Watched(node, seen[path].append) if path in seen else None)
        copy: Any = nnx.clone(watched, graph=True)
        for _, module in list(nnx.iter_modules(copy, graph=True)):
            module.eval()
        plain(call)(copy, x)
        warn_if_unseen(seen.values())
    found = []
    module: Any
    for path, module in modules.items():
        for part, params, state, count in _arrays_of(module):
            where = "/".join(map(str, (*path, *part))) or "the layer"
            found.append(judged(where, params, state, count, module.epsilon, seen.get(path, [])))
    return Health(found)


def _arrays_of(module: Any) -> Iterator[tuple[tuple[str, ...], BatchNormParams, BatchNormState, Any]]:
    """Of each normalization that a module is: where it is in it, parameters, statistics and count."""
    if isinstance(module, (BatchNorm, nnx.BatchNorm)):
        count = getattr(module, "count", None)
        yield (), *_arrays(module), None if count is None else count[...]
    elif isinstance(module, IterNorm):
        state = of_whitening(module.mean[...], module.cov[...], module.count[...])
        yield (), _params(module.scale, module.bias), state, state.count
    elif isinstance(module, BatchNormLSTMCell):
        for name in LSTMState._fields:
            norm = getattr(module, name)
            state = reached(name, BatchNormState(*(norm[part][...] for part in BatchNormState._fields)))
            yield (name,), _params(norm["scale"], norm.get("bias")), state, state.count


def _arrays(module: Any) -> tuple[BatchNormParams, BatchNormState]:
    state = BatchNormState(module.mean[...], module.var[...], jnp.zeros((), jnp.int32))
    return _params(module.scale, module.bias), state


def _params(scale: Any, bias: Any) -> BatchNormParams:
    return BatchNormParams(*(None if v is None else v[...] for v in (scale, bias)))
