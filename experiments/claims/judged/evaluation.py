"""Claim 10: the estimates and the figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims import plots
from experiments.claims.intervals import Estimate, exact, extremes, mean

EARLY = 100  # the last step that counts as early
NAMES = {
    "batch": "test batch",
    "precise": "pooled",
    "0.9": "average, 0.9",
    "0.99": "average, 0.99",
    "0.999": "average, 0.999",
    "0.999 debiased": "0.999, debiased",
}


def estimates(found: dict[str, Any]) -> dict[str, Estimate]:
    """By the keys of the criteria."""
    large, companions = found["large"], found["large"]["companions"]

    def early(name: str) -> Estimate:
        at = np.asarray(large["steps"]) <= EARLY
        return mean(_points(large, "precise", name)[:, at].mean(1), "pp", against=0.0)

    def shift(case: str) -> Estimate:
        part = large["shifted"][case]
        return mean(100 * (np.asarray(part["batch"]) - np.asarray(part["running"])), "pp", against=0.0)

    losses = {name: np.asarray(large["seen"][name]["loss"])[:, -1] for name in ("batch", "0.99")}
    return {
        "gap": mean(abs(_points(large, "batch", "0.99")[:, -1]), "pp"),
        "gap_32": mean(abs(_points(found["small"], "batch", "0.99")[:, -1]), "pp"),
        "companions": extremes(companions["evaluation"]),
        "companions_alone": extremes(companions["alone"]),
        "companions_batch": extremes(companions["batch"]),
        "early": early("0.999"),
        "early_debiased": early("0.999 debiased"),
        "early_short": early("0.9"),
        "layerwise": mean(_points(large, "layerwise", "precise")[:, -1], "pp", against=0.0),
        "loss": mean(losses["batch"] - losses["0.99"], against=0.0),
        "shift": shift("both"),
        "contrast": shift("contrast"),
        "noise": shift("noise"),
        "single_class": shift("single"),
        "rate": exact(large["rate"], "chosen by validation"),
        "rate_32": exact(found["small"]["rate"], "chosen by validation"),
    }


def draw(found: dict[str, Any], figure: Figure) -> str:
    """Test accuracy by kind of statistics over training, and on other images; the caption."""
    over, other = figure.subplots(1, 2, width_ratios=(1.25, 1))
    large = found["large"]
    steps = np.asarray(large["steps"], float)
    for at, (name, label) in enumerate(NAMES.items()):
        # Side by side, where points would hide one another.
        apart = steps * 1.035 ** (at - len(NAMES) / 2)
        plots.points(over, apart, 100 * np.asarray(large["seen"][name]["accuracy"]), at, label)
    over.set_xscale("log")
    plots.finish(over, "training step", "test accuracy, %", f"during training, batches of {large['batch_size']}")
    over.legend(loc="center right", bbox_to_anchor=(1, 0.68), title="statistics of", frameon=False, fontsize=8)
    cases = {
        "none": "as in\ntraining",
        "contrast": "half the\ncontrast",
        "noise": "noise",
        "both": "both",
        "single": "one class\nto a batch",
    }
    for at, (kind, label) in enumerate((("batch", "test batch"), ("running", "average, 0.99"))):
        values = np.stack([100 * np.asarray(large["shifted"][case][kind]) for case in cases], 1)
        plots.points(other, np.arange(len(cases)) + 0.1 * (2 * at - 1), values, 3 * at, label)
        other.containers[-1][0].set_linestyle("")  # cases have no order
    other.set_xticks(range(len(cases)), list(cases.values()), fontsize=8)
    plots.finish(other, "test images", "test accuracy, %", "the finished network on other images")
    other.legend(loc="lower left", title="statistics of", frameon=False, fontsize=8)
    n = len(large["shifted"]["none"]["batch"])
    return (
        f"Learning rate {large['rate']:g}, the best by validation. Markers: median of n = {n} seeds; bars: quartiles."
    )


def _points(part: dict[str, Any], one: str, other: str) -> np.ndarray:
    """By how many percentage points the accuracy by one kind of statistics exceeds the other, `[seeds, steps]`."""
    return 100 * (np.asarray(part["seen"][one]["accuracy"]) - np.asarray(part["seen"][other]["accuracy"]))
