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

    def at(arm: str, name: str, probe: int = -1, over: Any = np.mean) -> Estimate:
        return mean(over(np.mean(np.asarray(found[arm][name])[:, probe], -1), -1))

    return {
        "mean": worst("batch", "mean"),
        "var": worst("batch", "var"),
        "correlation": at("batch", "all", over=np.min),
        "whitened": at("whiten", "within"),
        "whitened_all": at("whiten", "all"),
        "whitened_mean": worst("whiten", "mean"),
        "whitened_var": worst("whiten", "var"),
        "same_whitened": at("batch", "same_whitened"),
        "after": at("batch", "all"),
        "before": at("batch", "before"),
        "start": at("batch", "all", 0),
        "next_mean": at("batch", "next_mean"),
        "next_var": at("batch", "next_var"),
        "through": extremes(found["batch"]["through"]),
    }


def draw(found: dict[str, Any], figure: Figure) -> tuple[str, str]:
    """Draw units by mean and deviation, their correlations, and how these move in training."""
    left, middle, right = figure.subplots(1, 3)
    clouds = {"entering": ("pooled", "before batch norm"), "leaving": ("other", "inputs of the next layer")}
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
    off, n = np.max(np.abs(np.array(found["batch"]["units"]["batch"]) - [[0], [1]])), len(found["batch"]["all"])
    alt = (
        f"Units scattered before batch norm, and after it at mean 0 and deviation 1 to within {off:.3f}; a matrix of "
        "correlations, many large off its diagonal; correlations over training, lower with whitening."
    )
    return alt, (
        f"After training two units of a layer are correlated by {last['batch']:.2f} with batch norm, as before it, "
        f"and by {last['whiten']:.2f} with whitening in a network of its own. "
        "Left and middle: one network; right: medians and quartiles, "
        f"n = {n} splits, mean over layers and rates."
    )
