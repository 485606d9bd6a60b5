"""Claim 6: the estimates and the figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims import plots
from experiments.claims.intervals import Estimate, extremes, mean

LEARNS = 0.9


def spans(accuracy: Any, scales: Any) -> np.ndarray:
    """Powers of ten of the unbroken range of scales around 1 at which each seed learns; 0 if it does not at 1."""
    learned, log = np.array(accuracy)[:, : len(scales)] >= LEARNS, np.log10(scales)
    one = list(scales).index(1.0)
    found = []
    for run in learned:
        if not run[one]:
            found.append(0.0)
            continue
        low, high = one, one
        while low > 0 and run[low - 1]:
            low -= 1
        while high + 1 < len(run) and run[high + 1]:
            high += 1
        found.append(log[high] - log[low])
    return np.array(found)


def estimates(found: dict[str, Any]) -> dict[str, Estimate]:
    """By the keys of the criteria."""
    scales = found["scales"]
    by_arm = {(arm, part): spans(found[arm][part], scales) for arm in ("batch", "none") for part in ("hidden", "all")}
    batch = 100 * np.array(found["batch"]["hidden"])
    return {
        "span": mean(by_arm["batch", "hidden"] - by_arm["none", "hidden"], against=0.0),
        "span_batch": mean(by_arm["batch", "hidden"]),
        "span_plain": mean(by_arm["none", "hidden"]),
        "span_all": mean(by_arm["batch", "all"] - by_arm["none", "all"], against=0.0),
        "hundred": mean(batch[:, len(scales) - 1], "%"),
        "thousandth": mean(batch[:, 0], "%"),
        "thousandth_small_epsilon": mean(100 * np.array(found["small_epsilon"])[:, 0], "%"),
        "zero": mean(batch[:, -2], "%"),
        "constant": mean(batch[:, -1], "%"),
        "same_training": extremes(np.concatenate([np.array(v) for v in found["same_training"].values()])),
    }


def draw(found: dict[str, Any], figure: Figure) -> str:
    """Training accuracy against the weights' scale, hidden layers and all; the caption."""
    left, right = figure.subplots(1, 2, sharey=True)
    scales = found["scales"]
    for panel, part, title in ((left, "hidden", "hidden weights scaled"), (right, "all", "all weights scaled")):
        for at, (arm, name) in enumerate((("batch", "batch norm"), ("none", "no norm"))):
            accuracy = np.array(found[arm][part])[:, : len(scales)]
            plots.points(panel, scales, accuracy, at, f"{name}, rate {found[arm]['rate']:g}")
        plots.finish(panel, "scale of the weights over He's", "accuracy on training images", title)
        panel.set(xscale="log", ylim=(0, 1.03))
        panel.axhline(LEARNS, color="0.4", lw=0.8, ls=":")
    small = np.array(found["small_epsilon"])[:, : len(scales)]
    plots.points(left, scales, small, 2, "batch norm, epsilon 1e-12")
    for panel in (left, right):
        panel.legend(frameon=False, fontsize=8, loc="center left")
    return f"After training from each start; medians and quartiles of n = {len(small)} seeds. Dotted: what counts."
