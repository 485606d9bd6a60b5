"""Claim 6: the estimates and the figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims._lib import plots
from experiments.claims._lib.intervals import at_edge, extremes, mean, median
from experiments.claims._lib.verdict import Estimates

LEARNS = 0.9
NAMES = {"batch": "batch norm", "none": "no norm"}


def spans(accuracy: Any, scales: Any) -> np.ndarray:
    """Return how many powers of ten of scales around 1, without a gap, each seed learns at; 0 if not at 1."""
    learned, log = np.array(accuracy)[:, : len(scales)] >= LEARNS, np.log10(scales)
    one = list(scales).index(1.0)
    found = []
    for run in learned:
        low = high = one
        while low > 0 and run[low - 1]:
            low -= 1
        while high + 1 < len(run) and run[high + 1]:
            high += 1
        found.append(log[high] - log[low] if run[one] else 0.0)
    return np.array(found)


def estimates(found: dict[str, Any]) -> Estimates:
    """Return the estimates by the keys of the criteria."""
    scales = found["scales"]
    edge = at_edge(found["grid"], no_norm=found["none"]["rate"], batch_norm=found["batch"]["rate"])
    by = {(arm, part): spans(found[arm][part], scales) for arm in NAMES for part in ("hidden", "all")}
    span = median(by["batch", "hidden"] - by["none", "hidden"])
    batch = 100 * np.array(found["batch"]["hidden"])
    tuned = {arm: np.array(found[arm]["hidden_tuned"]) for arm in NAMES if "hidden_tuned" in found[arm]}
    return {
        "span": span.with_caveat(edge),
        "span_test": median(spans(tuned["batch"], scales) - spans(tuned["none"], scales)) if tuned else None,
        "hundred_test": mean(100 * (tuned["batch"][:, 7] - tuned["batch"][:, 4]), "pp") if tuned else None,
        "span_batch": mean(by["batch", "hidden"]),
        "span_plain": mean(by["none", "hidden"]),
        "span_all": median(by["batch", "all"] - by["none", "all"]),
        "hundred": mean(batch[:, len(scales) - 1], "%"),
        "thousandth": mean(batch[:, 0], "%"),
        "thousandth_small_epsilon": mean(100 * np.array(found["small_epsilon"]["hidden"])[:, 0], "%"),
        "zero": mean(batch[:, -2], "%"),
        "constant": mean(batch[:, -1], "%"),
        "same_training": extremes(np.concatenate([np.array(v) for v in found["same_training"].values()])),
    }


def draw(found: dict[str, Any], figure: Figure) -> tuple[str, str]:
    """Draw training accuracy against the weights' scale, hidden layers and all."""
    left, right = figure.subplots(1, 2, sharey=True)
    scales = found["scales"]
    for panel, part, title in ((left, "hidden", "hidden weights scaled"), (right, "all", "all weights scaled")):
        for arm, name in NAMES.items():
            accuracy = np.array(found[arm][part])[:, : len(scales)]
            plots.points(panel, scales, accuracy, arm, f"{name}, rate {found[arm]['rate']:g}")
        if part == "hidden":
            small = np.array(found["small_epsilon"]["hidden"])[:, : len(scales)]
            plots.points(panel, scales, small, "small_epsilon", "batch norm, epsilon 1e-12")
        panel.axhline(LEARNS, color="0.4", lw=0.8, ls=":")
        names = ("scale of the weights over He's", "accuracy on training images")
        plots.finish(panel, *names, title, "center left", xscale="log", ylim=(0, 1.03))
    medians = [np.median(np.array(found[arm]["hidden"])[:, : len(scales)], 0) for arm in NAMES]
    n = len(found["none"]["hidden"])
    alt = (
        f"Training accuracy against the scale of the hidden weights, from {scales[0]:g} to {scales[-1]:g}: at least "
        f"{LEARNS} at {np.sum(medians[0] >= LEARNS)} of {len(scales)} scales with batch norm and at "
        f"{np.sum(medians[1] >= LEARNS)} without."
    )
    return (
        alt,
        f"At the end of training; medians and quartiles of n = {n} seeds. Dotted: what counts.",
    )
