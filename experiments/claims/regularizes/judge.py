"""Claim 8: the estimates and the figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims._lib import plots
from experiments.claims._lib.intervals import Estimate, at_edge, mean, median
from experiments.claims._lib.verdict import Estimates

DROPS = ("0.2", "0.5")
ROWS = {
    "no norm": ("plain", "0", "none"),
    "dropout 0.2": ("plain", "0.2", "none"),
    "dropout 0.5": ("plain", "0.5", "none"),
    "batch norm": ("batch", "0", "batch"),
    "and dropout 0.2 after": ("batch", "0.2", "batch"),
    "and dropout 0.5 after": ("batch", "0.5", "batch"),
    "and dropout 0.2 before": ("before", "0.2", "batch"),
    "and dropout 0.5 before": ("before", "0.5", "batch"),
    "statistics of all images": ("whole", "0", "pooled"),
    "ghost batches of 16": ("ghost_16", "0", "noise"),
    "ghost batches of 8": ("ghost_8", "0", "noise"),
}


def estimates(found: dict[str, Any]) -> Estimates:
    """Return the estimates by the keys of the criteria."""

    def percent(family: str, drop: str = "0", what: str = "test") -> np.ndarray:
        return 100 * np.array(found[family][drop][what])

    def gain(one: np.ndarray, other: np.ndarray, **rates: float) -> Estimate:
        return mean(one - other, "pp").with_caveat(at_edge(found["grid"], **rates))

    plain, batch, whole = (percent(family) for family in ("plain", "batch", "whole"))
    best = {family: _best(found, family) for family in ("plain", "batch", "before")}
    dropped = {family: percent(family, drop) for family, drop in best.items()}
    rate = {f: found[f]["0"]["rate"] for f in ("plain", "batch", "whole")}
    gaps = {family: percent(family, what="train") - percent(family) for family in ("plain", "batch")}
    learned = [percent(family, drop, "train") for family, drop, _ in ROWS.values()]
    same = 100 * np.array(found["batch"]["0"]["test_by_rate"][f"{rate['whole']:g}"])
    shift = found["before"]["0.5"]["shift"]
    measured, over_law = np.array(shift["measured"]), np.array(shift["over_law"])
    with_dropout = found["batch"][best["batch"]]["rate"]
    return {
        "noise": gain(batch, whole, batch_statistics=rate["batch"], all_images=rate["whole"]),
        "dropout_extra": gain(dropped["batch"], batch, batch_norm=rate["batch"], with_dropout=with_dropout),
        "overfitting": gain(gaps["plain"], gaps["batch"]),
        "noise_same_rate": gain(same, whole),
        "noise_population": gain(percent("batch", what="population"), percent("whole", what="population")),
        "dropout_before": gain(dropped["before"], batch),
        "dropout_plain": gain(dropped["plain"], plain),
        "norm_or_dropout": gain(batch, dropped["plain"]),
        "ghost_8": gain(percent("ghost_8"), batch),
        "ghost_16": gain(percent("ghost_16"), batch),
        "plain": mean(plain, "%"),
        "batch": mean(batch, "%"),
        "fitted": mean(min(learned, key=np.mean), "%"),
        "shift": median(measured[:, 0]),
        "shift_second": median(measured[:, 1]),
        "shift_law": median(over_law[:, 0]),
        "shift_law_second": median(over_law[:, 1]),
    }


def draw(found: dict[str, Any], figure: Figure) -> tuple[str, str]:
    """Draw test accuracy of all arms, and the shift of variances unit by unit."""
    left, right = figure.subplots(1, 2, width_ratios=[1.6, 1])
    rows = {name: (arm, 100 * np.array(found[family][drop]["test"])) for name, (family, drop, arm) in ROWS.items()}
    plots.strip(left, rows)
    left.axvline(np.median(rows["batch norm"][1]), color="black", lw=0.8, ls=":")
    plots.finish(left, "test accuracy, %", "", "200 training images, all learned by heart")
    layers = (("first", "batch"), ("second", "second"))
    for (layer, arm), (measured, law) in zip(layers, found["before"]["0.5"]["shift"]["units"], strict=True):
        right.plot(law, measured, label=f"{layer} layer", **plots.style(arm) | {"ls": "", "ms": 4, "alpha": 0.7})
    ends = right.get_xlim()
    right.plot(ends, ends, color="black", lw=0.8, ls=":")
    names = ("closed form: variance in test / in training", "measured", "shift of variance, dropout 0.5 before")
    plots.finish(right, *names, "best")
    means = ", ".join(f"{name} {np.mean(rows[name][1]):.1f}%" for name in ("no norm", "dropout 0.5", "batch norm"))
    alt = f"Dots of test accuracy of {len(rows)} networks that learned 200 images: {means}; and the shift of variances."
    n = len(found["batch"]["0"]["test"])
    return alt, (
        f"Left: a dot is a seed, a bar the median, n = {n} seeds, each arm at its best rate; dotted: the median of "
        "batch norm. Right: a dot is a unit of the first seed; dotted: equality."
    )


def _best(found: dict[str, Any], family: str) -> str:
    """Return the rate of dropout that validation chooses, as it does learning rates."""
    return max(DROPS, key=lambda drop: np.mean(found[family][drop]["validation"]))
