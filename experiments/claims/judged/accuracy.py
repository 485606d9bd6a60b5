"""Claim 4: the estimates and the figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims import plots
from experiments.claims.intervals import Estimate, mean

KINDS = {
    "sigmoid": "3 x 100 sigmoid",
    "relu": "3 x 100 ReLU, He",
    "deep": "20 x 64 sigmoid",
    "few": "8 x 64 ReLU, He,\n300 images",
}


def estimates(found: dict[str, Any]) -> dict[str, Estimate]:
    """By the keys of the criteria."""
    made = {kind: mean(_gain(found, kind), "pp", against=0.0) for kind in KINDS}
    for kind in KINDS:
        made |= {f"{kind}_{arm}": mean(100 * np.array(found[kind][arm]), "%") for arm in ("none", "batch")}
        made[f"{kind}_late"] = mean(100 * np.array(found[kind]["none_late"]), "pp")
    return made


def draw(found: dict[str, Any], figure: Figure) -> str:
    """Test accuracies of both arms, and the differences seed by seed where they are small; the caption."""
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    ticks = {}
    for at, (kind, name) in enumerate(KINDS.items()):
        for arm, label in (("batch", "batch norm"), ("none", "no norm")):
            style, y = 0 if arm == "batch" else 1, -at + (0.17 if arm == "batch" else -0.17)
            v = 100 * np.array(found[kind][arm]).ravel()
            spread = np.linspace(-0.1, 0.1, v.size)
            color, marker = plots.STYLES[style][0], plots.MARKERS[style]
            shown = label if at == 0 else None
            left.plot(v, y + spread, ls="", marker=marker, ms=3, alpha=0.5, color=color, label=shown)
            left.plot([np.median(v)] * 2, [y - 0.16, y + 0.16], color=color, lw=2)
        ticks[-at] = name
    left.set_yticks(list(ticks), list(ticks.values()))
    left.legend(frameon=False, loc="center", fontsize=9)
    plots.finish(left, "test accuracy, %", "", "each arm at its best rate")
    small = [kind for kind in KINDS if kind != "deep"]
    plots.strip(right, {KINDS[kind]: _gain(found, kind) for kind in small})
    right.axvline(0, color="black", lw=1)
    plots.finish(right, "gain by batch norm, percentage points", "", "seed by seed, without the deep network")
    splits, seeds = np.shape(found["sigmoid"]["none"])
    # The seeds of a split share its test images: only within it are they as good as independent.
    return (
        f"A dot is a seed on a split, a bar the median; n = {splits} splits x {seeds} seeds. Sign tests in the table "
        "are over all, as if the seeds of a split were independent."
    )


def _gain(found: dict[str, Any], kind: str) -> np.ndarray:
    """Percentage points that batch norm adds, `[splits, seeds]`."""
    return 100 * (np.array(found[kind]["batch"]) - np.array(found[kind]["none"]))
