"""What was found in a layer, as a record and in words."""

import math
from typing import NamedTuple

# A gap is judged where it is more than these, and more than chance makes it in a batch of so many examples.
_MEAN, _LOG_VAR, _CHANCE = 0.5, math.log(2), 4.0
_FEW = 16


class Batch(NamedTuple):
    """A batch against the running statistics, over all channels.

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


class LayerHealth(NamedTuple):
    """What was found in one layer.

    Attributes:
        path: where it is, `"block/BatchNorm_0"`.
        channels: how many it has, over all of a stack of layers, or of the steps of an LSTM that training has reached.
        updates: how many updates its statistics have seen, the fewest that any of several have; None where it does not
            count them.
        untouched: whether its statistics were never updated: a count of 0, or without one mean 0 and variance 1.
        flat: channels whose running variance is at most epsilon.
        unscaled: channels whose |scale| is at most a thousandth of the layer's median.
        not_finite: entries of mean, var, scale and bias that are NaN or infinite.
        batch: what a batch showed, if there was one.
        problems: what is wrong and what to do, a sentence or two each.
    """

    path: str
    channels: int
    updates: int | None
    untouched: bool
    flat: int
    unscaled: int
    not_finite: int
    batch: Batch | None
    problems: tuple[str, ...]


class Health(tuple[LayerHealth, ...]):
    """Records of layers; `str` makes of them a table, with the problems below it."""

    __slots__ = ()

    @property
    def problems(self) -> tuple[str, ...]:
        """Those of all layers, with their paths."""
        return tuple(f"{layer.path}: {problem}" for layer in self for problem in layer.problems)

    def __str__(self) -> str:
        head = ["layer", "channels", "updates", "var ~ 0", "scale ~ 0", "not finite", "mean gap", "var gap", "y gap"]
        rows = [head]
        for layer in self:
            counts = [layer.channels, layer.updates, layer.flat, layer.unscaled, layer.not_finite]
            gaps = [None] * 3 if layer.batch is None else layer.batch[1:4]
            rows.append(
                [layer.path, *("-" if n is None else f"{n}" for n in counts)]
                + ["-" if g is None else f"{g:.2g}" for g in gaps]
            )
        wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(wide[0]), *(cell.rjust(n) for cell, n in zip(row[1:], wide[1:], strict=True))])
            for row in rows
        ]
        if all(layer.batch is None for layer in self):
            lines += ["", "A batch was not given, or not seen: give one to compare the running statistics with."]
        # The same words about many layers are said once.
        grouped: dict[str, list[str]] = {}
        for layer in self:
            for problem in layer.problems:
                grouped.setdefault(problem, []).append(layer.path)
        for problem, paths in grouped.items():
            more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
            lines += ["", f"{', '.join(paths[:3])}{more}: {problem}"]
        return "\n".join(lines if grouped else [*lines, "", "No problems found."])


def advice(layer: LayerHealth) -> tuple[str, ...]:
    """The problems of a `LayerHealth`, the likely cause first."""
    said = []
    if layer.not_finite:
        said.append(
            f"{layer.not_finite} entries of mean, var, scale or bias are not finite: training has diverged, or a batch "
            "with NaN or infinity entered the statistics. Go back to a checkpoint from before; if only the statistics "
            "are hit, make them anew by `recalibrate`. The layers of jaxbn keep such batches out."
        )
    if layer.untouched:
        said.append(
            "The running statistics were never updated; evaluation normalizes by "
            + ("mean 0 and variance 1. " if layer.updates is None else "what they began with. ")
            + "In linen pass `mutable=['batch_stats']` to `apply` and keep what it returns; in nnx let the compiled "
            "step update the model (`nnx.jit`); with `bn_apply` carry the new state on. `frozen=True` and "
            "`update=False` stop them too. For weights that are trained already use `recalibrate`."
            + ("" if layer.updates is None else " If they came from elsewhere, set the count.")
        )
    if layer.flat:
        said.append(
            f"{layer.flat} of {layer.channels} channels have a running variance of at most epsilon: they are constant, "
            "so the layer multiplies rounding, or a rare value, by up to 1 / sqrt(epsilon). Look for dead units, zero "
            "weights or empty input channels before it; a larger epsilon bounds the factor."
        )
    if layer.unscaled:
        said.append(
            f"{layer.unscaled} of {layer.channels} channels have a scale of about 0, so nothing of x comes through. "
            "That is meant where a residual branch begins at 0; otherwise leave scale out of weight decay "
            "(`affine_mask`), or prune the channels."
        )
    if layer.batch is not None:
        said += _of_batch(layer, layer.batch)
    return tuple(said)


def _of_batch(layer: LayerHealth, batch: Batch) -> list[str]:
    if not all(map(math.isfinite, batch[1:4])):
        if layer.not_finite:
            return []
        return [
            "The batch has values that are not finite when it gets here: look at the data, and at the layer before."
        ]
    said = []
    if batch.examples < _FEW:
        said.append(
            f"The batch has only {batch.examples} examples: too few to judge the statistics by, so give more. If "
            "training has as few on a device, its outputs depend on the batch and evaluation's do not: share "
            "statistics by `axis_name`, or use `renorm`."
        )
    chance = _CHANCE / math.sqrt(max(batch.examples, 1))
    if layer.untouched or (batch.mean <= _MEAN + chance and batch.var <= _LOG_VAR + chance):
        return said
    apart = (
        f"the batch's mean is up to {batch.mean:.2g} deviations off, its variance by a factor of up to "
        f"{math.exp(min(batch.var, 99)):.2g}, and outputs in training and evaluation differ by up to "
        f"{batch.output:.2g}."
    )
    if batch.unlearned is not None:
        said.append(
            f"The running statistics still hold {batch.unlearned:.0%} of their initial values: {apart} The momentum is "
            "too close to 1 for so few updates. Lower it, or use `momentum=zero_debiased(...)`, which forgets the "
            "initial values at once; for weights that are trained already use `recalibrate`."
        )
    else:
        said.append(
            f"The running statistics are not those of this batch: {apart} Either the weights have moved on since (a "
            "momentum close to 1, averaged weights, a last epoch with few updates): use `recalibrate` on training "
            "data. Or the data are others than in training (another preprocessing, another domain): make them alike, "
            "or use `recalibrate` or `adapt` on data such as these."
        )
    return said
