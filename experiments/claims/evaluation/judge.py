"""Claim 10: the estimates and the figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims._lib import plots
from experiments.claims._lib.intervals import Estimate, at_edge, exact, mean
from experiments.claims._lib.verdict import Estimates

EARLY = 100  # the last step that counts as early
BOUND = 1  # the criterion of the gap, in points
NAMES = {
    "batch": ("batch", "test batch"),
    "precise": ("pooled", "pooled"),
    "0.9": ("0.9", "average, 0.9"),
    "0.99": ("0.99", "average, 0.99"),
    "0.999": ("0.999", "average, 0.999"),
    "0.999 debiased": ("0.999 debiased", "0.999, debiased"),
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

    def early(name: str) -> Estimate:
        return mean(_points(large, "precise", name)[:, steps <= EARLY].mean(1), "pp")

    def shift(case: str) -> Estimate:
        part = large["shifted"][case]
        return mean(100 * (np.asarray(part["batch"]) - np.asarray(part["running"])), "pp")

    def moved(part: dict[str, Any]) -> Estimate:
        return exact(part["moved"][-1], "mean of all seeds, no interval kept", "pp")

    def end(name: str) -> Estimate:
        return mean(100 * np.asarray(large["seen"][name]["accuracy"])[:, -1], "%")

    losses = {name: np.asarray(large["seen"][name]["loss"])[:, -1] for name in ("batch", "0.99")}
    return {
        "gap": _gap(large),
        "gap_32": _gap(found["small"]),
        # A smoke run ends before; its last step stands for the others.
        **{f"gap_{step}": _gap(large, int(min(np.sum(steps < step), len(steps) - 1))) for step in (10, 30, 100, 300)},
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
        "steps": exact(float(steps[-1]), "counted"),
        "moved": moved(large),
        "moved_32": moved(found["small"]),
        "batch_end": end("batch"),
        "running_end": end("0.99"),
        "rate": exact(large["rate"], "chosen by validation"),
        "rate_32": exact(found["small"]["rate"], "chosen by validation"),
    }


def _gap(part: dict[str, Any], at: int = -1) -> Estimate:
    """Return the points of accuracy between statistics of test batches and the running average, whichever is ahead."""
    made = mean(abs(_points(part, "batch", "0.99")[:, at]), "pp")
    return made.with_caveat(at_edge(part["grid"], network=part["rate"]))


def draw(found: dict[str, Any], figure: Figure) -> tuple[str, str]:
    """Draw test accuracy by kind of statistics over training and on other images, and the gap between two kinds."""
    over, apart, other = figure.subplots(1, 3, width_ratios=(1.1, 0.9, 1.1))
    large = found["large"]
    steps = np.asarray(large["steps"], float)
    for at, (name, (arm, label)) in enumerate(NAMES.items()):
        # Side by side, where points would hide one another.
        beside = steps * 1.035 ** (at - len(NAMES) / 2)
        plots.points(over, beside, 100 * np.asarray(large["seen"][name]["accuracy"]), arm, label)
    plots.finish(over, "training step", "test accuracy, %", "", xscale="log", ylim=(0, 100))
    gaps = [_gap(large, at) for at in range(len(steps))]
    value, low, high = np.array([[e.value, max(e.low, 0.01), e.high] for e in gaps]).T
    apart.errorbar(steps, value, [value - low, high - value], **plots.style("0.99") | {"ls": ""}, ms=5, capsize=3)
    apart.axhline(BOUND, color="black", lw=1, ls="--")
    names = ("training step", "difference in test accuracy, points")
    plots.finish(apart, *names, xscale="log", yscale="log", ylim=(0.1, 100))
    for at, kind in enumerate(("batch", "running")):
        arm, _ = NAMES["batch" if kind == "batch" else "0.99"]
        values = np.stack([100 * np.asarray(large["shifted"][case][kind]) for case in CASES], 1)
        plots.points(other, np.arange(len(CASES)) + 0.1 * (2 * at - 1), values, arm, "_", ls="")  # no order, no line
    other.set_xticks(range(len(CASES)), list(CASES.values()), fontsize=7)
    plots.finish(other, "test images, after training", "test accuracy, %", ylim=(0, 100))
    figure.legend(loc="outside upper center", ncols=len(NAMES), title="statistics of")
    seen = [100 * np.mean(large["seen"][kind]["accuracy"], 0) for kind in ("batch", "0.99")]
    at = min(2, len(steps) - 1)
    alt = (
        "Test accuracy by test batches and by the running average of 0.99: "
        f"{seen[0][0]:.0f} and {seen[1][0]:.0f}% at step {steps[0]:g}, {seen[0][-1]:.0f} and {seen[1][-1]:.0f}% at "
        f"step {steps[-1]:g}; their difference; and both on changed images."
    )
    n = len(large["shifted"]["none"]["batch"])
    return alt, (
        f"At step {steps[at]:g} a running average of 0.99 and statistics of test batches are {value[at]:.0f} points "
        f"apart, at step {steps[-1]:g} {value[-1]:.1f}. Medians and quartiles of {n} splits; middle: means with 95% "
        "intervals, dashed the criterion."
    )


def _points(part: dict[str, Any], one: str, other: str) -> np.ndarray:
    """Return the points by which the accuracy by one kind of statistics exceeds the other, `[seeds, steps]`."""
    return 100 * (np.asarray(part["seen"][one]["accuracy"]) - np.asarray(part["seen"][other]["accuracy"]))
