"""Claim 7: the estimates and the figure."""

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims import plots
from experiments.claims.intervals import Estimate, extremes, mean, median

HE, MIDDLE, LEARNS = 2, slice(10, 20), 0.9
NAMES = {"none": "no norm", "batch": "batch norm", "residual": "batch norm, residual"}


def growth_of(batch: int) -> float:
    """The growth of the squared gradient norm in a ReLU layer behind batch norm, in wide stacks before training.

    Yang et al. 2019, "A mean field theory of batch normalization", theorem 8, with the arc-cosine kernel of ReLU.
    """
    c = -1 / (batch - 1)
    kernel = (math.sqrt(1 - c * c) + (math.pi - math.acos(c)) * c) / math.pi
    slope = (math.pi - math.acos(c)) / math.pi
    b = batch - 1
    return b * (slope + b) / ((batch - 3) * b * (1 - kernel)) - 1 / (batch - 3)


def linear_growth_of(batch: int) -> float:
    """The same without an activation."""
    return (batch - 2) / (batch - 3)


def ratios(found: dict[str, Any], name: str) -> np.ndarray:
    """The gradient of the first layer over that of the last, `[seeds, gains]`."""
    logs = np.array(found["gradients"][name]["log_norm"])
    return np.exp(logs[:, :, 0] - logs[:, :, -1])


def growth(found: dict[str, Any], name: str) -> np.ndarray:
    """Squared growth a layer, from the middle of the stack, of each seed at He's gain."""
    logs = np.array(found["growth"][name]["log_norm"])[:, HE, MIDDLE]
    return np.exp(2 * (logs[:, 0] - logs[:, -1]) / (logs.shape[1] - 1))


def deepest(found: dict[str, Any], arm: str) -> np.ndarray:
    """The largest depth at which each seed learns; the smallest there is where it never does."""
    parts = found["trained"][arm]
    depths = np.array([int(d) for d in parts])
    learned = np.array([p["train_accuracy"] for p in parts.values()]) >= LEARNS
    return np.where(learned.any(0), np.max(np.where(learned, depths[:, None], 0), 0), depths[0])


def estimates(found: dict[str, Any]) -> dict[str, Estimate]:
    """By the keys of the criteria."""
    relu = ratios(found, "relu-batch-30")
    sigmoid = [deepest(found, f"sigmoid-{arm}") for arm in ("batch", "none")]
    plain, batch, residual = (deepest(found, f"relu-{arm}") for arm in ("none", "batch", "residual"))
    closed = {"relu-8": growth_of(8), "relu-64": growth_of(64), "linear-64": linear_growth_of(64)}
    closed["relu-32"] = growth_of(32)
    measured = {name: mean(growth(found, name) / of) for name, of in closed.items() if name in found["growth"]}
    return {
        "sigmoid_batch": median(ratios(found, "sigmoid-batch-30")[:, HE]),
        "gain": extremes(relu.max(1) / relu.min(1)),
        "relu_he_batch": median(relu[:, HE]),
        "depth_sigmoid": median(sigmoid[0] / sigmoid[1]),
        "sigmoid_plain": median(ratios(found, "sigmoid-none-30")[:, HE]),
        "relu_he_plain": median(ratios(found, "relu-none-30")[:, HE]),
        "relu_he_explodes": median(relu[:, HE]),
        "growth_8": measured["relu-8"],
        # A smoke run has no batch of 32.
        "growth_32": measured.get("relu-32", measured["relu-8"]),
        "growth_64": measured["relu-64"],
        "growth_linear_64": measured["linear-64"],
        "depth_relu": median(batch / plain),
        "deepest_relu_batch": median(batch),
        "residual": median(residual / batch),
    }


def draw(found: dict[str, Any], figure: Figure) -> str:
    """Gradients by layer, and accuracy by depth; the caption."""
    left, middle, right = figure.subplots(1, 3)
    at = 0
    for activation in ("sigmoid", "relu"):
        for norm in ("batch", "none"):
            logs = np.array(found["gradients"][f"{activation}-{norm}-30"]["log_norm"])[:, HE]
            shown = np.exp(logs - logs[:, -1:])
            label = f"{activation.replace('relu', 'ReLU')}, {NAMES[norm]}"
            plots.band(left, np.arange(1, shown.shape[1] + 1), shown, at, label)
            at += 1
    left.set_yscale("log")
    plots.finish(left, "layer", "gradient over that of the last layer", "before training, 30 layers")
    left.legend(frameon=False, fontsize=8)
    for panel, activation in ((middle, "sigmoid"), (right, "relu")):
        for at, (arm, name) in enumerate(NAMES.items()):
            parts = found["trained"][f"{activation}-{arm}"]
            depths = [int(d) for d in parts]
            plots.points(panel, depths, np.array([p["train_accuracy"] for p in parts.values()]).T, at, name)
        plots.finish(panel, "hidden layers", "accuracy on training images", activation.replace("relu", "ReLU"))
        panel.set(xscale="log", ylim=(0, 1.03))
        panel.axhline(LEARNS, color="0.4", lw=0.8, ls=":")
        panel.legend(frameon=False, fontsize=8, loc="center left")
    n = len(found["gradients"]["relu-batch-30"]["log_norm"])
    return (
        f"Medians and quartiles of n = {n} seeds. Left: weights of He's gain, batch of 64. Middle, right: after "
        "training, each at its best learning rate; a series ends after two depths at which no run learns."
    )
