"""Claim 4: the estimates and the figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims._lib import plots
from experiments.claims._lib.intervals import at_edge, mean
from experiments.claims._lib.verdict import Estimates

KINDS = {
    "sigmoid": "3 x 100 sigmoid",
    "relu": "3 x 100 ReLU, He",
    "deep": "20 x 64 sigmoid",
    "few": "8 x 64 ReLU, He,\n300 images",
}
ARMS = {"batch": "batch norm", "none": "no norm"}


def estimates(found: dict[str, Any]) -> Estimates:
    """Return the estimates by the keys of the criteria."""
    made: Estimates = {}
    for kind in KINDS:
        part = found[kind]
        rates = zip(part["none_rate"], part["batch_rate"], strict=True)
        edges = [at_edge(part["grid"], no_norm=none, batch_norm=batch) for none, batch in rates]
        gain = mean(_gain(found, kind), "pp")
        made[kind] = gain.with_caveat(max(edges, key=len))
        made |= {f"{kind}_{arm}": mean(100 * np.array(part[arm]), "%") for arm in ARMS}
        made[f"{kind}_late"] = mean(100 * np.array(part["none_late"]), "pp")
    return made


def draw(found: dict[str, Any], figure: Figure) -> tuple[str, str]:
    """Draw test accuracies of both arms, and the differences seed by seed where they are small."""
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    for at, kind in enumerate(KINDS):
        for arm, label in ARMS.items():
            y = -at + (0.17 if arm == "batch" else -0.17)
            v, look = 100 * np.array(found[kind][arm]).ravel(), plots.style(arm) | {"ls": "", "ms": 3, "alpha": 0.5}
            left.plot(v, y + np.linspace(-0.1, 0.1, v.size), label=None if at else label, **look)
            left.plot([np.median(v)] * 2, [y - 0.16, y + 0.16], color=look["color"], lw=2)
    left.set_yticks(-np.arange(len(KINDS)), list(KINDS.values()))
    plots.finish(left, "test accuracy, %", "", "each arm at its best rate", "center", xlim=(None, 100))
    small = [kind for kind in KINDS if kind != "deep"]
    plots.strip(right, {KINDS[kind]: ("batch", _gain(found, kind)) for kind in small})
    right.axvline(0, color="black", lw=1)
    plots.finish(right, "gain by batch norm, percentage points", "", "seed by seed, without the deep network")
    splits, seeds = np.shape(found["sigmoid"]["none"])
    means = ", ".join(f"{np.mean(_gain(found, kind)):+.1f} points in {KINDS[kind]}" for kind in KINDS).replace(
        "\n", " "
    )
    alt = f"Dots of test accuracy for four networks with batch norm and without, and of their differences: {means}."
    return alt, f"A dot is a seed on a split, a bar the median; n = {splits} splits x {seeds} seeds."


def _gain(found: dict[str, Any], kind: str) -> np.ndarray:
    """Return the percentage points that batch norm adds, `[splits, seeds]`."""
    return 100 * (np.array(found[kind]["batch"]) - np.array(found[kind]["none"]))
