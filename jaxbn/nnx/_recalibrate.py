"""The running statistics of a whole nnx model, from a pass over data."""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from jaxbn._core import check
from jaxbn._core.fetch import fetch_array
from jaxbn._core.moments import Moments
from jaxbn._core.state import BatchNormState
from jaxbn.nnx._batch_norm import BatchNorm
from jaxbn.nnx._iter_norm import IterNorm
from jaxbn.nnx._lstm import BatchNormLSTMCell
from jaxbn.statistics._pool_batches import collect_moments, recalibrate_states


def recalibrate(
    model: Any,
    batches: Iterable[Any],
    call: Callable[[Any, Any], Any] = lambda model, batch: model(batch),
    *,
    source_weight: ArrayLike = 0.0,
    layer_by_layer: bool = False,
    progress: bool = False,
) -> None:
    """Make a model's running statistics those of given data: precise batch normalization, and AdaBN.

    Each layer gets `mean = E[mean_B]`, `var = E[var_B + mean_B^2] - mean^2` of the inputs it has over all batches B,
    weighted by counts (`jaxbn.statistics.pool_batches`). Use it at the end of training, for averaged weights (EMA,
    SWA), whose statistics nobody has seen, and on data of another domain. The model is changed in place, at the very
    end; after an error it is as it was.

    A layer that no other comes before gets the same however the data are split into batches. One behind others gets
    inputs that these have normalized by the batch, which depend on the split; with `layer_by_layer` they do not.

    Args:
        model: an nnx module, with batch normalizations of flax's or ours.
        batches: what `call` takes, trees of arrays, of any sizes, at least one.
        call: `call(model, batch)` uses the model, of which it is given a copy. The layers normalize by the batch
            whether the model is set to `train()` or `eval()`; all else is as the model has it, so that `eval()`,
            without dropout, is the mode to take. Compiled here, once for each shape of a batch.
        source_weight: how many examples the statistics there are count for; see `jaxbn.statistics.adapt`. The examples
            of a batch are counted along the first axis of its arrays.
        layer_by_layer: each layer is normalized by the recalibrated statistics of those before it, as in evaluation,
            and not by the batch, as in training. Exact for deep networks, and independent of how the data are split,
            at the cost of as many passes over `batches` as there are layers, or fewer: they stop when nothing changes
            any more.
        progress: show batches done and the time left on stderr.

    Raises:
        TypeError: `layer_by_layer` is given an iterator.
        ValueError: no batch, no batch normalization, or a batch whose moments are not finite; or the call uses an
            `IterNorm`, a `BatchNormLSTMCell`, or a layer of several domains, whose statistics cannot be made so.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbn.nnx
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), jaxbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
        >>> batches = [jax.random.normal(jax.random.key(i), (8, 3)) for i in range(5)]
        >>> weights = nnx.state(model.layers[0], nnx.Param)
        >>> nnx.update(model.layers[0], jax.tree.map(lambda w: 0.5 * w, weights))  # or an average of weights
        >>> jaxbn.nnx.recalibrate(model, batches)
        >>> model.eval()
        >>> bool(jnp.allclose(model(jnp.concatenate(batches)).std(0), 1, atol=1e-3))
        True

    `count`, where a layer has one, becomes at least the number of batches, so that training with a momentum schedule
    goes on from these statistics. Layers with `frozen=True`, and those that the call does not use, are left as they
    are; so is what modules of your own keep as `nnx.BatchStat`. (A call that changes them changes those of the copy.)
    Under sharded `jit` there is nothing to pass. For layers with `axis_name`, `call` runs the model under
    `nnx.shard_map`, with `nnx.BatchStat` replicated. A layer used twice gets the moments of both uses.

    Wu and Johnson 2021, "Rethinking 'batch' in BatchNorm", section 3; Li et al. 2016, "Revisiting batch normalization
    for practical domain adaptation"; Schneider et al. 2020, "Improving robustness against common corruptions by
    covariate shift adaptation".
    """
    copy = nnx.clone(model, graph=True)
    originals, layers, rows = _layers(model), _layers(copy), {}
    for path, module in nnx.iter_modules(copy, graph=True):
        if what := _what(module):
            if not layers:
                raise _refused(path, what)
            module.__class__ = _refusing(type(module), path, what)
    for name, layer in layers.items():
        layer.__class__ = _class_of(type(layer))
        rows[name] = jnp.zeros((*layer.var.shape, 4), check.accumulation_dtype(layer.var.dtype))
        layer.jaxbn_moments = nnx.BatchStat(rows[name])

    @nnx.jit
    def run(copy, batch):
        call(copy, batch)

    def moments_of(states, evaluate, batch):
        for name, layer in layers.items():
            layer.jaxbn_evaluate = evaluate
            layer.jaxbn_moments.set_value(rows[name])
            _set(layer, states[name])  # training updates those of the copy
        run(copy, batch)
        found = {name: fetch_array(layer.jaxbn_moments[...]) for name, layer in layers.items()}
        return {name: Moments(*np.moveaxis(row, -1, 0)) for name, row in found.items()}

    states = {name: _state(layer) for name, layer in layers.items()}
    states = recalibrate_states(moments_of, states, batches, source_weight, layer_by_layer, progress)
    for name, layer in originals.items():
        _set(layer, states[name])


def _layers(model: Any) -> dict[str, Any]:
    """The batch normalizations that may change, each once, by their paths."""
    modules = nnx.iter_modules(model, graph=True)
    found = {"/".join(map(str, path)) or "the layer": module for path, module in modules if not _what(module)}
    kinds = (BatchNorm, nnx.BatchNorm)
    return {name: m for name, m in found.items() if isinstance(m, kinds) and not getattr(m, "frozen", False)}


def _what(module: Any) -> str | None:
    """What a layer is whose statistics cannot be made from moments."""
    if isinstance(module, (IterNorm, BatchNormLSTMCell)):
        return f"of class {type(module).__name__}"
    if isinstance(module, BatchNorm) and module.num_domains is not None and not module.frozen:
        return f"a BatchNorm of num_domains={module.num_domains}"
    return None


def _refused(path: Any, what: str) -> ValueError:
    """The error for such a layer."""
    return ValueError(
        "`recalibrate` must meet BatchNorm layers of one domain alone, or the others would keep statistics that do not "
        f"fit; got {'/'.join(map(str, path)) or 'the layer'!r}, {what}. Run the model over the data in training mode "
        "instead, without changing weights, with `momentum=jaxbn.cumulative_average` and each `count` at 0; or "
        "recalibrate the parts of the model without it."
    )


@cache
def _refusing(kind: Any, path: Any, what: str) -> Any:
    """The class of layers like those of `kind` that a call must not use."""

    def refuse(self, *args, **kwargs):
        raise _refused(path, what)

    return type(kind.__name__, (kind,), {"__call__": refuse})


def _state(layer: Any) -> BatchNormState:
    count = getattr(layer, "count", None)
    return BatchNormState(layer.mean[...], layer.var[...], jnp.zeros((), jnp.int32) if count is None else count[...])


def _set(layer: Any, state: BatchNormState) -> None:
    layer.mean.set_value(state.mean)
    layer.var.set_value(state.var)
    if getattr(layer, "count", None) is not None:
        layer.count.set_value(state.count)


@cache
def _class_of(kind: Any) -> Any:
    """The class of layers like those of `kind` that note the moments of what they normalize."""
    base: Any = BatchNorm if issubclass(kind, BatchNorm) else nnx.BatchNorm
    if kind is not base:
        # Behind a user's subclass, which may change the input on its way.
        return type(kind.__name__, (kind, _class_of(base)), {})

    class Collecting(base):
        def __call__(self, x, use_running_average=None, *, mask=None, **rest):
            update = rest.get("update", True)
            row = collect_moments(self.jaxbn_moments[...], x, self.axis, mask, self.axis_name, update)
            self.jaxbn_moments.set_value(row)
            return super().__call__(x, self.jaxbn_evaluate, mask=mask, **rest)

    return Collecting
