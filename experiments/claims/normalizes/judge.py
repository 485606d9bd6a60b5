"""Claim 1: the estimates and the figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims._lib import plots
from experiments.claims._lib.intervals import Estimate, extremes, mean
from experiments.claims._lib.verdict import Estimates

NOISE = np.sqrt(2 / (np.pi * 1024))  # the mean |correlation| of independent columns of so many rows


def estimates(found: dict[str, Any]) -> Estimates:
    """Return the estimates by the keys of the criteria; numbers are `[seeds, probes, rates, layers]`."""

    def worst(arm: str, name: str) -> Estimate:
        return extremes(np.max(found[arm][name], axis=(1, 2, 3)))

    def at(arm: str, name: str, probe: int = -1) -> Estimate:
        each = np.mean(np.asarray(found[arm][name])[:, probe], -1)
        return mean(np.min(each, -1) if arm == "batch" and name == "all" else np.mean(each, -1))

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
        "through": extremes(found["batch"]["through"]),
    }


def draw(found: dict[str, Any], figure: Figure) -> tuple[str, str]:
    """Draw units by mean and deviation, their correlations, and how these move in training."""
    left, middle, right = figure.subplots(1, 3)
    clouds = {"entering": ("none", "before batch norm"), "leaving": ("other", "inputs of the next layer")}
    for name, (arm, label) in (clouds | {"batch": ("batch", "after batch norm")}).items():
        left.plot(*found["batch"]["units"][name], label=label, **plots.style(arm) | {"ls": "", "alpha": 0.6, "ms": 3.5})
    low, high = left.get_ylim()
    names = ("mean of a unit", "standard deviation of a unit", "all hidden units, one network")
    plots.finish(left, *names, "upper left", ylim=(low, high + 0.25 * (high - low)))
    shown = middle.imshow(np.abs(found["batch"]["matrix"]), vmin=0, vmax=1, cmap="viridis")
    figure.colorbar(shown, ax=middle, shrink=0.8, label="|correlation|")
    plots.finish(middle, "unit", "unit", "after batch norm: still correlated")
    middle.grid(visible=False)
    lines = {
        "batch": ("batch", "all", "batch norm"),
        "whiten": ("whiten", "all", "whitening, all pairs"),
        "whiten_within": ("whiten", "within", "whitening, in groups of 20"),
    }
    steps = found["steps"]
    for style, (arm, name, label) in lines.items():
        plots.points(right, range(len(steps)), np.mean(found[arm][name], (2, 3)), style, label)
    right.axhline(NOISE, color="black", lw=1, ls=":", label="noise of 1,024 images")
    right.set_xticks(range(len(steps)), [str(step) for step in steps])
    names = ("training step", "mean |correlation| of two units", "in the course of training")
    plots.finish(right, *names, "best", yscale="log")
    last = {arm: np.mean(np.asarray(found[arm]["all"])[:, -1]) for arm in ("batch", "whiten")}
    alt = (
        "Units by mean and standard deviation before and after batch norm, a matrix of their correlations, and the "
        f"mean correlation, at the end {last['batch']:.2f} with batch norm and {last['whiten']:.2f} with whitening."
    )
    n = len(found["batch"]["all"])
    return alt, (
        f"After training two units of a layer are correlated by {last['batch']:.2f} with batch norm, as before it, "
        f"and by {last['whiten']:.2f} with whitening. Left and middle: one network; right: medians and quartiles of "
        f"n = {n} seeds on splits of their own, mean over three layers and {len(found['rates'])} rates."
    )
