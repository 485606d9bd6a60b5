"""Claim 8: the estimates and the figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims import plots
from experiments.claims.intervals import Estimate, mean, median

DROPS = ("0.2", "0.5")
ROWS = {
    "no norm": ("plain", "0"),
    "dropout 0.2": ("plain", "0.2"),
    "dropout 0.5": ("plain", "0.5"),
    "batch norm": ("batch", "0"),
    "and dropout 0.2 after": ("batch", "0.2"),
    "and dropout 0.5 after": ("batch", "0.5"),
    "and dropout 0.2 before": ("before", "0.2"),
    "and dropout 0.5 before": ("before", "0.5"),
    "statistics of all images": ("whole", "0"),
    "ghost batches of 16": ("ghost_16", "0"),
    "ghost batches of 8": ("ghost_8", "0"),
}


def estimates(found: dict[str, Any]) -> dict[str, Estimate]:
    """By the keys of the criteria."""

    def percent(family: str, drop: str = "0", what: str = "test") -> np.ndarray:
        return 100 * np.array(found[family][drop][what])

    plain, batch, whole = (percent(family) for family in ("plain", "batch", "whole"))
    dropped = {family: percent(family, _best(found, family)) for family in ("plain", "batch", "before")}
    gaps = {family: percent(family, what="train") - percent(family) for family in ("plain", "batch")}
    learned = [percent(family, drop, "train") for family, drop in ROWS.values()]
    same = 100 * np.array(found["batch"]["0"]["test_by_rate"][f"{found['whole']['0']['rate']:g}"])
    shift = found["before"]["0.5"]["shift"]
    measured, over_law = np.array(shift["measured"]), np.array(shift["over_law"])
    return {
        "noise": mean(batch - whole, "pp", against=0.0),
        "dropout_extra": mean(dropped["batch"] - batch, "pp", against=0.0),
        "overfitting": mean(gaps["plain"] - gaps["batch"], "pp", against=0.0),
        "noise_same_rate": mean(same - whole, "pp", against=0.0),
        "noise_population": mean(
            percent("batch", what="population") - percent("whole", what="population"), "pp", against=0.0
        ),
        "dropout_before": mean(dropped["before"] - batch, "pp", against=0.0),
        "dropout_plain": mean(dropped["plain"] - plain, "pp", against=0.0),
        "norm_or_dropout": mean(batch - dropped["plain"], "pp", against=0.0),
        "ghost_8": mean(percent("ghost_8") - batch, "pp", against=0.0),
        "ghost_16": mean(percent("ghost_16") - batch, "pp", against=0.0),
        "plain": mean(plain, "%"),
        "batch": mean(batch, "%"),
        "fitted": mean(min(learned, key=np.mean), "%"),
        "shift": median(measured[:, 0]),
        "shift_second": median(measured[:, 1]),
        "shift_law": median(over_law[:, 0]),
        "shift_law_second": median(over_law[:, 1]),
    }


def draw(found: dict[str, Any], figure: Figure) -> str:
    """Test accuracy of all arms, and the shift of variances unit by unit; the caption."""
    left, right = figure.subplots(1, 2, width_ratios=[1.6, 1])
    rows = {name: 100 * np.array(found[family][drop]["test"]) for name, (family, drop) in ROWS.items()}
    plots.strip(left, rows)
    left.axvline(np.median(rows["batch norm"]), color="black", lw=0.8, ls=":")
    plots.finish(left, "test accuracy, %", "", "200 training images, all learned by heart")
    for at, (layer, units) in enumerate(
        zip(("first", "second"), found["before"]["0.5"]["shift"]["units"], strict=True)
    ):
        measured, law = units
        style = {"color": plots.STYLES[at][0], "marker": plots.MARKERS[at], "ls": "", "ms": 4, "alpha": 0.7}
        right.plot(law, measured, label=f"{layer} layer", **style)
    ends = right.get_xlim()
    right.plot(ends, ends, color="black", lw=0.8, ls=":")
    right.legend(frameon=False, fontsize=8)
    plots.finish(
        right, "closed form: variance in test / in training", "measured", "shift of variance, dropout 0.5 before"
    )
    n = len(found["batch"]["0"]["test"])
    return (
        f"Left: a dot is a seed, a bar the median, n = {n} seeds, each arm at its best rate; dotted: the median of "
        "batch norm. Right: a dot is a unit of the first seed; dotted: equality."
    )


def _best(found: dict[str, Any], family: str) -> str:
    """The rate of dropout that validation chooses, as it does learning rates."""
    return max(DROPS, key=lambda drop: np.mean(found[family][drop]["validation"]))
