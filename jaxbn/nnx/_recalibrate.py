"""Recalibrate the running statistics of an nnx model by a pass over data."""

from collections.abc import Callable, Iterable
from typing import Any

from jax.typing import ArrayLike

from jaxbn._flax.recalibrate import recalibrate_states
from jaxbn.nnx._view import NnxView


def recalibrate(
    model: Any,
    batches: Iterable[Any],
    call: Callable[[Any, Any], Any] = lambda model, batch: model(batch),
    *,
    source_weight: ArrayLike = 0.0,
    layer_by_layer: bool = False,
    progress: bool = False,
) -> None:
    """Recalibrate the running statistics on given data: precise batch normalization (PreciseBN), and AdaBN.

    Each layer gets `mean = E[mean_B]`, `var = E[var_B + mean_B^2] - mean^2` of the inputs it has over all batches B,
    weighted by counts (`jaxbn.statistics.pool_batches`). Use it at the end of training, for averaged weights (EMA,
    SWA), which have no statistics yet, and on data of another domain. The model is changed in place, at the very
    end; after an error it is as it was.

    A layer that no other comes before gets the same however the data are split into batches. One after others gets
    inputs that these have normalized by the batch, which depend on the split; with `layer_by_layer` they do not.

    Args:
        model: an nnx module, with batch normalizations of flax's or ours.
        batches: inputs of `call`, trees of arrays, of any sizes, at least one.
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
        TypeError: `batches` is an array, or `layer_by_layer` is given an iterator.
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
    are; so are other variables of `nnx.BatchStat`, of modules of your own. (A call that changes them changes a copy.)
    Under sharded `jit` there is nothing to pass. For layers with `axis_name`, `call` runs the model under
    `nnx.shard_map`, with `nnx.BatchStat` replicated. A layer used twice gets the moments of both uses.

    Wu and Johnson 2021, "Rethinking 'batch' in BatchNorm", section 3; Li et al. 2016, "Revisiting batch normalization
    for practical domain adaptation"; Schneider et al. 2020, "Improving robustness against common corruptions by
    covariate shift adaptation".
    """
    view = NnxView(model, call)
    view.write(recalibrate_states(view, batches, source_weight, layer_by_layer, progress))
