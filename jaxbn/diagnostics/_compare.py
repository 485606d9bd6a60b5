"""Compare a batch with the running statistics of a layer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._core import check
from jaxbn._core.batch_norm import bn_apply
from jaxbn._core.fetch import fetch_array
from jaxbn._core.state import BatchNormParams, BatchNormState


class Batch(NamedTuple):
    """The gaps between a batch and the running statistics, over all channels.

    Attributes:
        examples: how many there were: entries along the first reduced axis with any value that counts.
        mean: the largest `|mean_B - mean| / sqrt(var + epsilon)`.
        var: the largest `|log((var_B + epsilon) / (var + epsilon))|`; 0.7 is a factor of 2.
        output: the largest difference of the layer's outputs in training and in evaluation.
        unlearned: the share of the initial values, mean 0 and variance 1, that the running ones have to the batch's, if
            they lie between the two; else None.
    """

    examples: int
    mean: float
    var: float
    output: float
    unlearned: float | None


class Modes(NamedTuple):
    """The outputs and statistics of a layer in both modes."""

    training: jax.Array
    evaluation: jax.Array
    mean: jax.Array
    var: jax.Array
    batch_mean: jax.Array
    batch_var: jax.Array


def run_modes(
    params: BatchNormParams, state: BatchNormState, x: jax.Array, *, axis: Any, epsilon: float, mask: Any, **rest: Any
) -> Modes:
    """Normalize `x` by the batch and by the running statistics."""
    kept = check.accumulation_dtype(x.dtype)
    mean, var = (jnp.asarray(v).astype(kept) for v in (state.mean, state.var))
    state = BatchNormState(mean, var, jnp.zeros((), jnp.int32))
    # One program of both modes. With momentum 0 the new statistics are the batch's.
    (training, own), (evaluation, _) = (
        bn_apply(params, state, x, jnp.array(train), axis=axis, epsilon=epsilon, mask=mask, momentum=0.0, **rest)
        for train in (True, False)
    )
    return Modes(training, evaluation, mean, var, own.mean, own.var)


def compare_batch(modes: Any, axis: Any, epsilon: float, mask: Any) -> Batch:
    """Measure how far the batch and the running statistics are from each other, in NumPy."""
    training, evaluation, mean, var, own_mean, own_var = (fetch_array(v, np.float64) for v in modes)
    shape, ndim = training.shape, training.ndim
    counted = np.broadcast_to(True if mask is None else fetch_array(mask, bool), shape)
    first = next((a for a in range(ndim) if a not in check.axes(axis, ndim)), None)
    others = tuple(a for a in range(ndim) if a != first)
    examples = 1 if first is None else int(np.sum(np.any(counted, axis=others)))
    difference = np.where(counted, np.abs(training - evaluation), 0)
    with np.errstate(all="ignore"):  # NaN and infinity are a finding of their own
        gaps = np.abs(own_mean - mean) / np.sqrt(var + epsilon), np.abs(np.log((own_var + epsilon) / (var + epsilon)))
        mean_gap, var_gap, output_gap = (float(np.max(v, initial=0)) for v in (*gaps, difference))
        unlearned = _find_unlearned_share(mean, var, own_mean, own_var, epsilon)
    return Batch(examples, mean_gap, var_gap, output_gap, unlearned)


def _find_unlearned_share(mean, var, own_mean, own_var, epsilon) -> float | None:
    """Fit w of `running = w initial + (1 - w) batch` by least squares; None where it does not fit."""
    std = np.sqrt(own_var + epsilon)
    # From the batch's to the initial statistics, and from the batch's to the running ones.
    direction = np.concatenate([(-own_mean / std).ravel(), ((1 - own_var) / std**2).ravel()])
    displacement = np.concatenate([((mean - own_mean) / std).ravel(), ((var - own_var) / std**2).ravel()])
    share = float(np.dot(direction, displacement) / max(np.dot(direction, direction), 1e-12))
    off = np.linalg.norm(displacement - share * direction)
    # One channel fits by chance, many do not; but the batch is a sample, and the fit is not exact.
    fits = mean.size > 1 and 0.1 < share < 1.1 and off < 0.25 * np.linalg.norm(displacement)
    return min(share, 1.0) if fits else None
