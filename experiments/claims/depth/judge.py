"""Claim 7: the estimates and the figure."""

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims._lib import plots
from experiments.claims._lib.intervals import Estimate, at_edge, exact, extremes, mean, median
from experiments.claims._lib.verdict import Estimates
from experiments.tables import markdown

HE, MIDDLE, LEARNS = 2, slice(10, 20), 0.9
NAMES = {"batch": "batch norm", "none": "no norm", "residual": "batch norm, residual"}
BATCHES = (8, 32, 64, 256)
TYPICAL = 64  # the batch of the training


def growth_of(batch: int) -> float:
    """Return the growth of the squared gradient norm in a ReLU layer after batch norm, in wide stacks before training.

    Yang et al. 2019, "A mean field theory of batch normalization", theorem 8, with the arc-cosine kernel of ReLU.
    """
    c = -1 / (batch - 1)
    kernel = (math.sqrt(1 - c * c) + (math.pi - math.acos(c)) * c) / math.pi
    slope = (math.pi - math.acos(c)) / math.pi
    b = batch - 1
    return b * (slope + b) / ((batch - 3) * b * (1 - kernel)) - 1 / (batch - 3)


def linear_growth_of(batch: int) -> float:
    """Return the same growth without an activation."""
    return (batch - 2) / (batch - 3)


def limit_of(batch: int) -> float:
    """Return the depth at which Yang et al. expect training to fail: 16 / log(growth)."""
    return 16 / math.log(growth_of(batch))


def ratios(found: dict[str, Any], name: str) -> np.ndarray:
    """Return the gradient of the first layer over that of the last, `[seeds, gains]`."""
    logs = np.array(found["gradients"][name]["log_norm"])
    return np.exp(logs[:, :, 0] - logs[:, :, -1])


def growth(found: dict[str, Any], name: str) -> np.ndarray:
    """Return the squared growth of a layer, from the middle of the stack, of each seed at He's gain."""
    logs = np.array(found["growth"][name]["log_norm"])[:, HE, MIDDLE]
    return np.exp(2 * (logs[:, 0] - logs[:, -1]) / (logs.shape[1] - 1))


def deepest(found: dict[str, Any], arm: str) -> np.ndarray:
    """Return the largest depth at which each seed learns; the smallest of the series where it never does."""
    parts = found["trained"][arm]
    depths = np.array([int(d) for d in parts])
    learned = np.array([p["train_accuracy"] for p in parts.values()]) >= LEARNS
    return np.where(learned.any(0), np.max(np.where(learned, depths[:, None], 0), 0), depths[0])


def edges(found: dict[str, Any], *names: str) -> str:
    """Say at which depth a best rate was at the edge of its grid; nothing if none was."""
    parts = [(name, depth, part) for name in names for depth, part in found["trained"][name].items()]
    edge = [
        f"{name.split('-')[0].replace('relu', 'ReLU')}, {NAMES[name.split('-')[1]]}, {depth} layers"
        for name, depth, part in parts
        if at_edge(part.get("grid", found.get("grid", ())), arm=part["rate"])
    ]
    return f"a best rate is at the edge of its grid: {edge[-1]}" if edge else ""


def estimates(found: dict[str, Any]) -> Estimates:
    """Return the estimates by the keys of the criteria."""
    relu = ratios(found, "relu-batch-30")
    closed = {"relu-8": growth_of(8), "relu-32": growth_of(32), "relu-64": growth_of(64)}
    closed["linear-64"] = linear_growth_of(64)
    measured = {name: mean(growth(found, name) / of) for name, of in closed.items() if name in found["growth"]}

    def deeper(one: str, other: str) -> Estimate:
        e = median(deepest(found, one) / deepest(found, other))
        return e.with_caveat(edges(found, other, one))

    batch = deepest(found, "relu-batch")
    return {
        "sigmoid_batch": median(ratios(found, "sigmoid-batch-30")[:, HE]),
        "gain": extremes(relu.max(1) / relu.min(1)),
        "relu_he_batch": median(relu[:, HE]),
        "depth_sigmoid": deeper("sigmoid-batch", "sigmoid-none"),
        "sigmoid_plain": median(ratios(found, "sigmoid-none-30")[:, HE]),
        "relu_he_plain": median(ratios(found, "relu-none-30")[:, HE]),
        "relu_he_explodes": median(relu[:, HE]),
        "growth_8": measured["relu-8"],
        # A smoke run has no batch of 32.
        "growth_32": measured.get("relu-32", measured["relu-8"]),
        "growth_64": measured["relu-64"],
        "growth_linear_64": measured["linear-64"],
        "depth_relu": deeper("relu-batch", "relu-none"),
        "deepest_relu_batch": median(batch),
        "limit": exact(limit_of(TYPICAL), "closed formula"),
        "deepest_over_limit": median(batch / limit_of(TYPICAL)),
        "residual": deeper("relu-residual", "relu-batch"),
    }


def tables(found: dict[str, Any]) -> str:
    """Return the measurements before training as two tables."""
    rows = []
    for name in found["gradients"]:
        activation, norm, depth = name.split("-")
        by_gain = [f"{v:.0f}" if 1e3 <= v < 1e6 else f"{v:.3g}" for v in np.median(ratios(found, name), 0)]
        rows.append([activation.replace("relu", "ReLU"), NAMES[norm], depth, *by_gain])
    first = markdown(["units", "norm", "layers", *(f"gain {g:.3g}" for g in found["gains"])], rows)
    rows = []
    for batch in BATCHES:
        measured = [f"relu-{batch}", f"linear-{batch}"]
        shown = [f"{np.mean(growth(found, n)):.3f}" if n in found["growth"] else "" for n in measured]
        closed = [f"{of(batch):.3f}" for of in (growth_of, linear_growth_of)]
        rows.append([str(batch), shown[0], closed[0], shown[1], closed[1], f"{limit_of(batch):.1f}"])
    second = markdown(["batch", "ReLU", "formula", "linear", "formula", "16 ξ, ReLU"], rows)
    return (
        "Before training: the gradient of the first layer over that of the last, medians of all seeds, batches of "
        f"{TYPICAL}.\n\n{first}\n\nBefore training, with batch norm: by how much squared gradients grow in a layer, "
        f"means of all seeds; and 16 ξ = 16 / log(growth), the number of layers up to which Yang et al. expect it to "
        f"train.\n\n{second}"
    )


def draw(found: dict[str, Any], figure: Figure) -> tuple[str, str]:
    """Draw gradients by layer, and accuracy by depth."""
    left, middle, right = figure.subplots(1, 3)
    styles = {("relu", "batch"): "batch", ("relu", "none"): "none", ("sigmoid", "batch"): "sigmoid_batch"}
    for (activation, norm), arm in (styles | {("sigmoid", "none"): "sigmoid_none"}).items():
        logs = np.array(found["gradients"][f"{activation}-{norm}-30"]["log_norm"])[:, HE]
        shown = np.exp(logs - logs[:, -1:])
        label = f"{activation.replace('relu', 'ReLU')}, {NAMES[norm]}"
        plots.band(left, np.arange(1, shown.shape[1] + 1), shown, arm, label)
    names = ("layer", "gradient over that of the last layer", "before training, 30 layers")
    plots.finish(left, *names, "lower right", yscale="log")
    for panel, activation in ((middle, "sigmoid"), (right, "relu")):
        every = sorted({int(d) for arm in NAMES for d in found["trained"][f"{activation}-{arm}"]})
        for arm, name in NAMES.items():
            parts = found["trained"][f"{activation}-{arm}"]
            accuracy = np.array([p["train_accuracy"] for p in parts.values()]).T
            plots.points(panel, [int(d) for d in parts], accuracy, arm, name)
        panel.axhline(LEARNS, color="0.4", lw=0.8, ls=":")
        names = ("hidden layers", "accuracy on training images", activation.replace("relu", "ReLU"))
        # Room for the legend above the lines.
        plots.finish(panel, *names, "upper right", xscale="log", ylim=(0, 1.3), yticks=np.linspace(0, 1, 6))
        panel.set_xticks(every, [str(d) for d in every], fontsize=8)
        panel.minorticks_off()
    first = {k: np.median(ratios(found, f"{k}-30")[:, HE]) for k in ("relu-batch", "relu-none", "sigmoid-none")}
    alt = (
        "Gradients by layer before training: the first layer's over the last's is "
        f"{first['relu-batch']:.3g} with ReLU and batch norm, {first['relu-none']:.3g} with ReLU alone and "
        f"{first['sigmoid-none']:.1e} with sigmoid alone; and accuracy by depth with and without batch norm."
    )
    n = len(found["gradients"]["relu-batch-30"]["log_norm"])
    return alt, (
        f"Medians and quartiles of n = {n} seeds. Left: weights of He's gain, batch of {TYPICAL}. Middle, right: after "
        "training, each at its best learning rate; a series ends after two depths at which no run learns."
    )
