"""The running statistics of a whole linen model, from a pass over data."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import ArrayLike

from jaxbn._core import check
from jaxbn._core.fetch import fetch_array
from jaxbn._core.moments import Moments
from jaxbn._core.state import BatchNormState
from jaxbn.linen._batch_norm import BatchNorm
from jaxbn.linen._iter_norm import IterNorm
from jaxbn.linen._lstm import BatchNormLSTMCell, is_of_cell
from jaxbn.linen._model import flattened, unflattened
from jaxbn.statistics._pool_batches import collect_moments, recalibrate_states

# A variable that asks a layer for the moments of what it gets, and by its name how to normalize meanwhile: by each
# batch, or by the running statistics. It travels through `jit`, `shard_map`, `nn.scan` and `nn.remat` as the
# statistics do, and since no other program has it, no compiled program is taken for another.
_NAMES = ("jaxbn_moments_training", "jaxbn_moments_evaluation")


def recalibrate(
    apply: Callable[[Any, Any], tuple[Any, Mapping[str, Any]]],
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    source_weight: ArrayLike = 0.0,
    layer_by_layer: bool = False,
    progress: bool = False,
) -> Any:
    """Variables whose running statistics are those of given data: precise batch normalization, and AdaBN.

    Each layer gets `mean = E[mean_B]`, `var = E[var_B + mean_B^2] - mean^2` of the inputs it has over all batches B,
    weighted by counts (`jaxbn.statistics.pool_batches`). Use it at the end of training, for averaged weights (EMA,
    SWA), whose statistics nobody has seen, and on data of another domain.

    A layer that no other comes before gets the same however the data are split into batches. One behind others gets
    inputs that these have normalized by the batch, which depend on the split; with `layer_by_layer` they do not.

    Args:
        apply: `apply(variables, batch)` calls the model and returns what `model.apply(..., mutable=["batch_stats"])`
            does. The layers normalize by the batch whatever the call says; all else is as the call has it, so that the
            mode of evaluation, without dropout, is the one to take. Compiled here, once for each shape of a batch.
        variables: the model's, with `batch_stats`, flax's or ours.
        batches: what `apply` takes, trees of arrays, of any sizes, at least one.
        source_weight: how many examples the statistics there are count for; see `jaxbn.statistics.adapt`. The examples
            of a batch are counted along the first axis of its arrays.
        layer_by_layer: each layer is normalized by the recalibrated statistics of those before it, as in evaluation,
            and not by the batch, as in training. Exact for deep networks, and independent of how the data are split,
            at the cost of as many passes over `batches` as there are layers, or fewer: they stop when nothing changes
            any more.
        progress: show batches done and the time left on stderr.

    Returns:
        New nested dicts, frozen where `variables` are. `count`, where a layer has one, is at least the number of
        batches, so that training with a momentum schedule goes on from these statistics. Layers with `frozen=True`, and
        those that the call does not use, are left as they are; so is what modules of your own keep in `batch_stats`.

    Raises:
        TypeError: `apply` returns something else, or `layer_by_layer` is given an iterator.
        ValueError: no batch, no batch normalization, or a batch whose moments are not finite; or the call uses an
            `IterNorm`, a `BatchNormLSTMCell`, or a layer of several domains, whose statistics cannot be made so.

    Example:
        >>> import jax, jax.numpy as jnp, flax.linen as nn, jaxbn.linen
        >>> model = nn.Sequential([nn.Dense(4), jaxbn.linen.BatchNorm(use_running_average=True)])
        >>> batches = [jax.random.normal(jax.random.key(i), (8, 3)) for i in range(5)]
        >>> variables, later = (model.init(jax.random.key(seed), batches[0]) for seed in (8, 9))
        >>> averaged = jax.tree.map(lambda v, w: 0.5 * (v + w), variables["params"], later["params"])
        >>> variables = jaxbn.linen.recalibrate(
        ...     lambda variables, x: model.apply(variables, x, mutable=["batch_stats"]),
        ...     {**variables, "params": averaged},
        ...     batches,
        ... )
        >>> y = model.apply(variables, jnp.concatenate(batches))
        >>> bool(jnp.allclose(y.std(0), 1, atol=1e-3))
        True

    Under sharded `jit` there is nothing to pass. For layers with `axis_name`, `apply` is a function under
    `jax.shard_map` whose specs for the variables and `batch_stats` are a prefix, `P()`; return `batch_stats` as they
    are, not averaged over devices. A layer used twice gets the moments of both uses.

    Wu and Johnson 2021, "Rethinking 'batch' in BatchNorm", section 3; Li et al. 2016, "Revisiting batch normalization
    for practical domain adaptation"; Schneider et al. 2020, "Improving robustness against common corruptions by
    covariate shift adaptation".
    """
    flat = flattened(variables, keep_empty_nodes=True)
    kept = [path[:-1] for path in flat if path[0] == "batch_stats" and path[-1] == "mean"]
    layers = {}
    for path in kept:
        if (*path, "var") in flat and not is_of_cell(flat, path):
            mean, var, count = (
                nn.meta.unbox(flat.get((*path, name), np.int32(0))) for name in ("mean", "var", "count")
            )
            layers["/".join(path[1:]) or "the layer"] = path, BatchNormState(mean, var, count)
    if kept and not layers:
        raise _refused(kept[0][1:], "which is no BatchNorm")
    paths = {name: path for name, (path, _) in layers.items()}

    @jax.jit
    def run(variables, batch):
        with nn.intercept_methods(_collecting):
            out = apply(variables, batch)
        if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], Mapping) and "batch_stats" in out[1]):
            raise TypeError(
                "`apply` must return `(outputs, updates)` with `batch_stats` in the updates, as "
                f'`model.apply(variables, x, mutable=["batch_stats"])` does; got {type(out).__name__}.'
            )
        updates = traverse_util.flatten_dict({"batch_stats": out[1]["batch_stats"]})
        return {name: _row(updates, path) for name, path in paths.items()}

    def moments_of(states, evaluate, batch):
        asked = {
            (*paths[name], _NAMES[evaluate]): jnp.zeros((*s.mean.shape, 4), check.accumulation_dtype(s.var.dtype))
            for name, s in states.items()
        }
        rows = run(unflattened({**_with(flat, paths, states), **asked}, variables), batch)
        return {name: Moments(*np.moveaxis(fetch_array(row), -1, 0)) for name, row in rows.items()}

    states = {name: state for name, (_, state) in layers.items()}
    states = recalibrate_states(moments_of, states, batches, source_weight, layer_by_layer, progress)
    return unflattened(_with(flat, paths, states), variables)


def _collecting(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """What is done in the place of a method call: a batch normalization that is asked to notes its moments."""
    layer = context.module
    if context.method_name != "__call__":
        return call(*args, **kwargs)
    frozen = getattr(layer, "frozen", False)
    if isinstance(layer, (IterNorm, BatchNormLSTMCell)):
        raise _refused(layer.path, f"of class {type(layer).__name__}")
    if isinstance(layer, BatchNorm) and layer.num_domains is not None and not frozen:
        raise _refused(layer.path, f"a BatchNorm of num_domains={layer.num_domains}")
    if not isinstance(layer, (BatchNorm, nn.BatchNorm)):
        return call(*args, **kwargs)
    name = next((name for name in _NAMES if layer.has_variable("batch_stats", name)), None)
    if name is None or frozen:
        return call(*args, **kwargs)
    if not layer.is_mutable_collection("batch_stats"):
        raise ValueError('`apply` must let `batch_stats` change: call `model.apply(..., mutable=["batch_stats"])`.')
    row = layer.get_variable("batch_stats", name)
    # A subclass may change the input on its way to the one that normalizes.
    if inspect.unwrap(context.orig_method.func) not in map(inspect.unwrap, (BatchNorm.__call__, nn.BatchNorm.__call__)):
        y = call(*args, **kwargs)
        if layer.get_variable("batch_stats", name) is row:
            raise TypeError(
                f"{type(layer).__name__} has a `__call__` of its own that does not use BatchNorm's, so what its "
                "statistics are of is not known. Call `super().__call__` in it, or write `batch_stats` yourself."
            )
        return y

    def normalized(x, use_running_average=None, *, mask=None, **rest):
        axis = tuple(sorted(check.axes(layer.axis, np.ndim(x))))
        update = rest.get("update", True)
        layer.put_variable("batch_stats", name, collect_moments(row, x, axis, mask, layer.axis_name, update))
        if isinstance(layer, BatchNorm):
            rest["update"] = False  # for which statistics need no count
        given = layer.use_running_average
        # The attribute and the argument may not both be set, and a linen module is frozen.
        object.__setattr__(layer, "use_running_average", name == _NAMES[1])
        try:
            return call(x, None, mask=mask, **rest)
        finally:
            object.__setattr__(layer, "use_running_average", given)

    return normalized(*args, **kwargs)


def _refused(path: Sequence[str], what: str) -> ValueError:
    """The error for a layer whose statistics cannot be made from moments."""
    return ValueError(
        "`recalibrate` must meet BatchNorm layers of one domain alone, or the others would keep statistics that do not "
        f"fit; got {'/'.join(path) or 'the layer'!r}, {what}. Run the model over the data in training mode instead, "
        "without changing weights, with `momentum=jaxbn.cumulative_average` and each `count` at 0."
    )


def _row(updates: Mapping[tuple[str, ...], Any], path: tuple[str, ...]) -> Any:
    found = [updates[(*path, name)] for name in _NAMES if (*path, name) in updates]
    if not found:
        raise TypeError("`apply` must return `batch_stats` whole, as the model updates them; a layer's are missing.")
    return found[0]


def _with(flat: Mapping[tuple[str, ...], Any], paths: Mapping[str, Any], states: Mapping[str, Any]) -> dict[Any, Any]:
    """`flat` with the statistics of `states`."""
    new = dict(flat)
    for name, path in paths.items():
        for part, value in states[name]._asdict().items():
            if (*path, part) in flat:
                new[(*path, part)] = nn.meta.replace_boxed(flat[(*path, part)], value)
    return new
