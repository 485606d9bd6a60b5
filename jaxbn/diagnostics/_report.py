"""Report what was found in layers: a record for programs, a table with a legend for people."""

from typing import NamedTuple

from jaxbn.diagnostics._advice import ADVICE
from jaxbn.diagnostics._compare import Batch

_COLUMNS = ("layer", "channels", "updates", "var ~ 0", "scale ~ 0", "not finite", "mean gap", "var gap", "y gap")
_LEGEND = """\
updates: of the running statistics, - where they are not counted
var ~ 0, scale ~ 0: channels whose running variance is at most epsilon, whose scale is about 0
not finite: entries of mean, var, scale and bias that are NaN or infinite
mean gap: largest |mean of batch - running mean| / std; var gap: largest |log(variance of batch / running variance)|
y gap: largest difference of the outputs in training and in evaluation; - where no batch was compared"""


class LayerHealth(NamedTuple):
    """Findings in one layer.

    Attributes:
        path: where it is, `"block/BatchNorm_0"`.
        channels: how many it has, over all of a stack of layers, or of the steps of an LSTM that training has reached.
        updates: how many updates its statistics have seen, the fewest that any of several have; None where it does not
            count them.
        untouched: whether its statistics were never updated: a count of 0, or without one mean 0 and variance 1.
        flat: channels whose running variance is at most epsilon.
        unscaled: channels whose |scale| is at most a thousandth of the layer's median.
        not_finite: entries of mean, var, scale and bias that are NaN or infinite.
        batch: the comparison with a batch, if there was one.
        found: for each kind of problem the finding in this layer, the likely cause first.
    """

    path: str
    channels: int
    updates: int | None
    untouched: bool
    flat: int
    unscaled: int
    not_finite: int
    batch: Batch | None
    found: dict[str, str]

    @property
    def problems(self) -> tuple[str, ...]:
        """Return the findings, each with advice."""
        return tuple(f"{finding} {ADVICE[kind]}" for kind, finding in self.found.items())


class Health(tuple[LayerHealth, ...]):
    """Records of layers; `str` makes a table of them, with a legend and one sentence for each kind of problem."""

    __slots__ = ()

    @property
    def problems(self) -> tuple[str, ...]:
        """Return the problems of all layers, with their paths."""
        return tuple(f"{layer.path}: {problem}" for layer in self for problem in layer.problems)

    def __str__(self) -> str:
        rows: list[list[str]] = [list(_COLUMNS)]
        for layer in self:
            counts = [layer.channels, layer.updates, layer.flat, layer.unscaled, layer.not_finite]
            gaps = [None] * 3 if layer.batch is None else layer.batch[1:4]
            rows.append([
                layer.path, *("-" if n is None else f"{n}" for n in counts),
                *("-" if g is None else f"{g:.2g}" for g in gaps),
            ])  # fmt: skip
        wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(wide[0]), *(cell.rjust(n) for cell, n in zip(row[1:], wide[1:], strict=True))])
            for row in rows
        ]
        lines += ["", _LEGEND]
        if all(layer.batch is None for layer in self):
            lines += ["", "No batch was compared: none with examples was given, or the layers ran in compiled code."]
        kinds: dict[str, list[str]] = {}
        for layer in self:
            for kind in layer.found:
                kinds.setdefault(kind, []).append(layer.path)
        for kind, paths in kinds.items():
            more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
            lines += ["", f"{kind.capitalize()} ({', '.join(paths[:3])}{more}): {ADVICE[kind]}"]
        return "\n".join(lines if kinds else [*lines, "", "No problems found."])
