"""Claim 10: the estimates and the figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims._lib import plots
from experiments.claims._lib.intervals import Estimate, at_edge, exact, mean
from experiments.claims._lib.verdict import Estimates

EARLY = 100  # the last step that counts as early
NAMES = {
    "batch": ("batch", "test batch"),
    "precise": ("pooled", "pooled"),
    "0.9": ("residual", "average, 0.9"),
    "0.99": ("moving", "average, 0.99"),
    "0.999": ("renorm", "average, 0.999"),
    "0.999 debiased": ("noisy", "0.999, debiased"),
}
CASES = {
    "none": "as in\ntraining",
    "contrast": "half the\ncontrast",
    "noise": "noise",
    "both": "both",
    "single": "one class\nto a batch",
}


def estimates(found: dict[str, Any]) -> Estimates:
    """Return the estimates by the keys of the criteria."""
    large, companions = found["large"], found["large"]["companions"]
    steps = np.asarray(large["steps"])

    def gap(part: dict[str, Any], at: int = -1) -> Estimate:
        return mean(abs(_points(part, "batch", "0.99")[:, at]), "pp").with_caveat(
            at_edge(part["grid"], network=part["rate"])
        )

    def early(name: str) -> Estimate:
        return mean(_points(large, "precise", name)[:, steps <= EARLY].mean(1), "pp")

    def shift(case: str) -> Estimate:
        part = large["shifted"][case]
        return mean(100 * (np.asarray(part["batch"]) - np.asarray(part["running"])), "pp")

    losses = {name: np.asarray(large["seen"][name]["loss"])[:, -1] for name in ("batch", "0.99")}
    return {
        "gap": gap(large),
        "gap_32": gap(found["small"]),
        # A smoke run ends before; its last step stands for the others.
        **{f"gap_{step}": gap(large, int(min(np.sum(steps < step), len(steps) - 1))) for step in (10, 30, 100, 300)},
        "companions": exact(companions["evaluation"], "largest of all"),
        "companions_alone": exact(companions["alone"], "largest of all"),
        "companions_batch": exact(companions["batch"], "largest of all"),
        "state": exact(companions["state"], "largest of all"),
        "gradient": exact(companions["gradient"], "largest of all"),
        "early": early("0.999"),
        "early_debiased": early("0.999 debiased"),
        "early_short": early("0.9"),
        "layerwise": mean(_points(large, "layerwise", "precise")[:, -1], "pp"),
        "loss": mean(losses["batch"] - losses["0.99"]),
        "shift": shift("both"),
        "contrast": shift("contrast"),
        "noise": shift("noise"),
        "single_class": shift("single"),
        "rate": exact(large["rate"], "chosen by validation"),
        "rate_32": exact(found["small"]["rate"], "chosen by validation"),
    }


def draw(found: dict[str, Any], figure: Figure) -> tuple[str, str]:
    """Draw test accuracy by kind of statistics over training, and on other images."""
    over, other = figure.subplots(1, 2, width_ratios=(1.25, 1))
    large = found["large"]
    steps = np.asarray(large["steps"], float)
    for at, (name, (arm, label)) in enumerate(NAMES.items()):
        # Side by side, where points would hide one another.
        beside = steps * 1.035 ** (at - len(NAMES) / 2)
        plots.points(over, beside, 100 * np.asarray(large["seen"][name]["accuracy"]), arm, label)
    title = f"during training, batches of {large['batch_size']}"
    plots.finish(over, "training step", "test accuracy, %", title, xscale="log", ylim=(0, 100))
    over.legend(loc="center right", bbox_to_anchor=(1, 0.72), title="statistics of", frameon=False, fontsize=8)
    for at, kind in enumerate(("batch", "running")):
        arm, label = NAMES["batch" if kind == "batch" else "0.99"]
        values = np.stack([100 * np.asarray(large["shifted"][case][kind]) for case in CASES], 1)
        plots.points(other, np.arange(len(CASES)) + 0.1 * (2 * at - 1), values, arm, label, ls="")  # no order, no line
    other.set_xticks(range(len(CASES)), list(CASES.values()), fontsize=8)
    title = "the finished network on other images"
    plots.finish(other, "test images", "test accuracy, %", title, ylim=(0, 100))
    other.legend(loc="lower left", title="statistics of", frameon=False, fontsize=8)
    seen = [100 * np.mean(large["seen"][kind]["accuracy"], 0) for kind in ("batch", "0.99")]
    alt = (
        "Test accuracy by the statistics of test batches and by the running average of 0.99: "
        f"{seen[0][0]:.0f} and {seen[1][0]:.0f}% at step {steps[0]:g}, {seen[0][-1]:.0f} and {seen[1][-1]:.0f}% at "
        f"step {steps[-1]:g}; and on changed images."
    )
    n = len(large["shifted"]["none"]["batch"])
    return alt, f"Learning rate {large['rate']:g}. Markers: median of n = {n} seeds; bars: quartiles."


def _points(part: dict[str, Any], one: str, other: str) -> np.ndarray:
    """Return the points by which the accuracy by one kind of statistics exceeds the other, `[seeds, steps]`."""
    return 100 * (np.asarray(part["seen"][one]["accuracy"]) - np.asarray(part["seen"][other]["accuracy"]))
