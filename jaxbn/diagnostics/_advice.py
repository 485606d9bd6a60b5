"""Judge the numbers of a layer, and say what to do: one finding for each kind of problem."""

import math
from typing import Any

from jaxbn.diagnostics._compare import Batch

# A gap is a problem where it exceeds these by more than chance would in a batch of so many examples.
_MEAN, _LOG_VAR, _CHANCE = 0.5, math.log(2), 4.0
_FEW = 16

ADVICE = {
    "not finite": (
        "Training has diverged, or a batch with NaN or infinity entered the statistics, which the layers of jaxbn keep "
        "out: go back to an earlier checkpoint or, if only the statistics are hit, use `recalibrate`."
    ),
    "never updated": (
        "Keep the update: in linen pass `mutable=['batch_stats']` to `apply`, in nnx compile the step by `nnx.jit`, "
        "with `bn_apply` carry the state; for trained weights use `recalibrate`, for loaded statistics set the count."
    ),
    "constant channels": (
        "The layer multiplies rounding, or a rare value, by up to 1 / sqrt(epsilon): look for dead units, zero weights "
        "or empty input channels before it; a larger epsilon bounds the factor."
    ),
    "channels without scale": (
        "Nothing of x comes through, as is meant where a residual branch begins at 0: otherwise leave scale out of "
        "weight decay (`affine_mask`), or prune the channels."
    ),
    "batch not finite": "Look at the data, and at the layer before.",
    "few examples": (
        "They are too few to judge the statistics by: give more, and if training has as few on a device, share "
        "statistics by `axis_name` (cross-replica, SyncBatchNorm) or use `renorm`, or its outputs depend on the batch."
    ),
    "initial values": (
        "The momentum is too close to 1 for so few updates: lower it, or use `momentum=zero_debiased(...)`, which "
        "forgets the initial values at once; for trained weights use `recalibrate`."
    ),
    "other statistics": (
        "Either the weights have moved on since (a momentum close to 1, averaged weights, a last epoch with few "
        "updates): use `recalibrate` on training data; or the data are others than in training (preprocessing, another "
        "domain): make them alike, or use `recalibrate` or `adapt` on data such as these."
    ),
}


def find_problems(layer: Any) -> dict[str, str]:
    """Return the findings of a `LayerHealth` by kind, the likely cause first."""
    found: dict[str, str] = {}
    if layer.not_finite:
        found["not finite"] = f"{layer.not_finite} entries of mean, var, scale or bias are not finite."
    if layer.untouched:
        initial = "mean 0 and variance 1" if layer.updates is None else "their initial values"
        found["never updated"] = f"The running statistics were never updated; evaluation normalizes by {initial}."
    if layer.flat:
        found["constant channels"] = (
            f"{layer.flat} of {layer.channels} channels are constant: their running variance is at most epsilon."
        )
    if layer.unscaled:
        found["channels without scale"] = f"{layer.unscaled} of {layer.channels} channels have a scale of about 0."
    return found if layer.batch is None else found | _find_gaps(layer, layer.batch)


def _find_gaps(layer: Any, batch: Batch) -> dict[str, str]:
    if not all(map(math.isfinite, batch[1:4])):
        return (
            {}
            if layer.not_finite
            else {"batch not finite": "The batch has values that are not finite when it gets here."}
        )
    found = {"few examples": f"The batch has only {batch.examples} examples."} if batch.examples < _FEW else {}
    chance = _CHANCE / math.sqrt(max(batch.examples, 1))
    if layer.untouched or (batch.mean <= _MEAN + chance and batch.var <= _LOG_VAR + chance):
        return found
    gaps = (
        f"the batch's mean is up to {batch.mean:.2g} std off, its variance by a factor of up to "
        f"{math.exp(min(batch.var, 99)):.2g}, and outputs in training and evaluation differ by up to "
        f"{batch.output:.2g}."
    )
    if batch.unlearned is not None:
        share = f"{batch.unlearned:.0%}"
        return found | {"initial values": f"The running statistics hold {share} of their initial values: {gaps}"}
    return found | {"other statistics": f"The running statistics are not those of this batch: {gaps}"}
