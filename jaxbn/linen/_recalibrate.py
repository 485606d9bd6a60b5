"""Recalibrate the running statistics of a linen model by a pass over data."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jax.typing import ArrayLike

from jaxbn._flax.recalibrate import recalibrate_states
from jaxbn.linen._model import V
from jaxbn.linen._view import LinenView, check_apply


def recalibrate(
    apply: Callable[[Any, Any], tuple[Any, Mapping[str, Any]]],
    variables: V,
    batches: Iterable[Any],
    *,
    source_weight: ArrayLike = 0.0,
    layer_by_layer: bool = False,
    progress: bool = False,
) -> V:
    """Recalibrate the running statistics on given data: precise batch normalization (PreciseBN), and AdaBN.

    Each layer gets `mean = E[mean_B]`, `var = E[var_B + mean_B^2] - mean^2` of the inputs it has over all batches B,
    weighted by counts (`jaxbn.statistics.pool_batches`). Use it at the end of training, for averaged weights (EMA,
    SWA), which have no statistics yet, and on data of another domain.

    A layer that no other comes before gets the same however the data are split into batches. One after others gets
    inputs that these have normalized by the batch, which depend on the split; with `layer_by_layer` they do not.

    Args:
        apply: `apply(variables, batch)` calls the model and returns as `model.apply(..., mutable=["batch_stats"])`
            does. The layers normalize by the batch in either mode; all else is as the call has it, so that the mode of
            evaluation, without dropout, is the one to take. Compiled here, once for each shape of a batch.
        variables: the model's, with `batch_stats`, flax's or ours.
        batches: inputs of `apply`, trees of arrays, of any sizes, at least one.
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
        those that the call does not use, are left as they are; so are other `batch_stats`, of modules of your own.

    Raises:
        TypeError: `batches` is an array, `apply` returns something else, or `layer_by_layer` is given an iterator.
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
    view = LinenView(check_apply(apply), variables)
    if not view.kinds:
        raise ValueError("`variables` must hold `batch_stats` with mean and var; it has none. Pass all collections.")
    return view.replace(recalibrate_states(view, batches, source_weight, layer_by_layer, progress)).variables  # type: ignore[return-value]
