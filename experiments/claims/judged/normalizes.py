"""Claim 1: the estimates and the figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims import plots
from experiments.claims.intervals import Estimate, extremes, mean

NOISE = np.sqrt(2 / (np.pi * 1024))  # the mean |correlation| of independent columns of so many rows


def estimates(found: dict[str, Any]) -> dict[str, Estimate]:
    """By the keys of the criteria."""

    def worst(arm: str, name: str) -> Estimate:
        return extremes(np.max(found[arm][name], axis=(0, 2)))

    def at(arm: str, name: str, probe: int = -1) -> Estimate:
        return mean(np.mean(found[arm][name][probe], -1))

    return {
        "mean": worst("batch", "mean"),
        "var": worst("batch", "var"),
        "correlation": at("batch", "all"),
        "whitened": at("whiten", "within"),
        "whitened_all": at("whiten", "all"),
        "whitened_mean": worst("whiten", "mean"),
        "whitened_var": worst("whiten", "var"),
        "same_whitened": at("batch", "same_whitened"),
        "before": at("batch", "before"),
        "start": at("batch", "all", 0),
        "next_mean": at("batch", "next_mean"),
        "next_var": at("batch", "next_var"),
    }


def draw(found: dict[str, Any], figure: Figure) -> str:
    """Units by mean and deviation, their correlations, and how these move in training; the caption."""
    left, middle, right = figure.subplots(1, 3)
    clouds = {"entering": "before batch norm", "leaving": "what the next layer gets", "batch": "after batch norm"}
    for at, (name, label) in enumerate(clouds.items()):
        means, deviations = found["batch"]["units"][name]
        style = {"color": plots.STYLES[at][0], "marker": plots.MARKERS[at], "ls": "", "alpha": 0.6, "ms": 3.5}
        left.plot(means, deviations, label=label, **style)
    left.legend(frameon=False, fontsize=8, loc="upper left")
    low, high = left.get_ylim()
    left.set_ylim(low, high + 0.25 * (high - low))
    plots.finish(left, "mean of a unit", "standard deviation of a unit", "all hidden units, one network")
    shown = middle.imshow(np.abs(found["batch"]["matrix"]), vmin=0, vmax=1, cmap="viridis")
    figure.colorbar(shown, ax=middle, shrink=0.8, label="|correlation|")
    plots.finish(middle, "unit", "unit", "after batch norm: still correlated")
    middle.grid(visible=False)
    lines = (
        ("batch", "all", "batch norm"),
        ("whiten", "all", "whitening, all pairs"),
        ("whiten", "within", "whitening, in groups of 20"),
    )
    steps = found["batch"]["steps"]
    for at, (arm, name, label) in enumerate(lines):
        plots.points(right, range(len(steps)), np.mean(found[arm][name], -1).T, at, label)
    right.axhline(NOISE, color="black", lw=1, ls=":", label="noise of 1,024 images")
    right.set_xticks(range(len(steps)), [str(step) for step in steps])
    right.set_yscale("log")
    plots.finish(right, "training step", "mean |correlation| of two units", "in the course of training")
    right.legend(frameon=False, fontsize=8)
    n = len(found["batch"]["val_accuracy"])
    return (
        f"Left and middle: after training, one of n = {n} seeds; the middle shows units of the second layer. Right: "
        f"medians and quartiles of n = {n} seeds, mean over three layers."
    )
