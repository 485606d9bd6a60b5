"""Claim 2: the estimates and the figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims import plots
from experiments.claims.intervals import Estimate, mean, median

EVERY = 50  # steps between two observations of the ReLU network


def estimates(found: dict[str, Any]) -> dict[str, Estimate]:
    """By the keys of the criteria."""

    def drifts(name: str, tuned: bool, base: str = "") -> np.ndarray:
        best = {arm: found[f"drift_{arm}"]["best"] if tuned else 0 for arm in ("batch", "none")}
        batch, none = (np.array(found[f"drift_{a}"][n]) for a, n in (("batch", name), ("none", base or name)))
        return batch[:, best["batch"]] / none[:, best["none"]]

    def gradients(kind: str, name: str, best: bool = True) -> tuple[np.ndarray, np.ndarray]:
        parts = [found[f"{kind}_{arm}"] for arm in ("batch", "none")]
        batch, none = (np.array(p[name])[:, p["best"] if best else 0] for p in parts)
        return batch, none

    def difference(kind: str, best: bool = True) -> Estimate:
        batch, none = gradients(kind, "cosine", best)
        return mean(batch - none, against=0.0)

    def cosine(kind: str, arm: str) -> Estimate:
        part = found[f"{kind}_{arm}"]
        return mean(np.array(part["cosine"])[:, part["best"]])

    test = {arm: 100 * np.array(found[f"relu_{arm}"]["test"]) for arm in ("none", "batch", "noisy", "noise")}
    changes = {kind: median(np.divide(*gradients(kind, "relative")), against=1.0) for kind in ("relu", "linear")}
    return {
        "drift": median(drifts("inputs", False), against=1.0),
        "drift_scaled": median(drifts("inputs_scaled", False), against=1.0),
        "drift_tuned": median(drifts("inputs", True), against=1.0),
        "drift_tuned_scaled": median(drifts("inputs_scaled", True), against=1.0),
        "drift_normalized": median(drifts("normalized_scaled", False), against=1.0),
        "cosine": difference("relu"),
        "cosine_linear": difference("linear"),
        "change": changes["relu"],
        "change_linear": changes["linear"],
        "cosine_small_rate": difference("linear", best=False),
        "cosine_relu_batch": cosine("relu", "batch"),
        "cosine_relu_none": cosine("relu", "none"),
        "cosine_linear_batch": cosine("linear", "batch"),
        "cosine_linear_none": cosine("linear", "none"),
        "noisy": mean(test["batch"] - test["noisy"], "pp", against=0.0),
        "noisy_and_plain": mean(test["noisy"] - test["none"], "pp", against=0.0),
        "noise_alone": mean(test["none"] - test["noise"], "pp", against=0.0),
    }


def draw(found: dict[str, Any], figure: Figure) -> str:
    """One unit's quantiles, the gradients' cosine, and learning with noise; the caption."""
    left, middle, right = figure.subplots(1, 3)
    for at, (arm, name) in enumerate((("batch", "batch norm"), ("none", "no norm"))):
        part = found[f"drift_{arm}"]
        unit = np.array(part["inputs_unit"])[:, 0]
        color, dashes = plots.STYLES[at]
        steps = np.linspace(0, found["steps"], len(unit))
        for quantile in range(3):
            label = name if quantile == 1 else None
            left.plot(steps, unit[:, quantile], color=color, ls=dashes, lw=2 if quantile == 1 else 1, label=label)
        gradient = found[f"relu_{arm}"]
        by_step = np.array(gradient["by_step"])[..., gradient["best"]]
        plots.band(middle, np.arange(len(by_step)) * EVERY, by_step.reshape(len(by_step), -1).T, at, name)
    for at, (arm, name) in enumerate(
        (("batch", "batch norm"), ("none", "no norm"), ("noisy", "noisy batch norm"), ("noise", "no norm, same noise"))
    ):
        part = found[f"relu_{arm}"]
        steps = EVERY * np.arange(1, len(part["val_curve"][0]) + 1)
        plots.band(right, steps, part["val_curve"], at, name)
    plots.finish(
        left, "training step", "input of one sigmoid", f"quantiles 15, 50 and 85%,\nrate {found['rates'][0]:g}"
    )
    plots.finish(middle, "training step", "cosine", "a layer's gradient before and after\nthe earlier layers' step")
    plots.finish(right, "training step", "validation accuracy", "with noise that restores the shift")
    right.set_ylim(0, 1)
    for panel in (left, middle):  # room for the legend above the lines
        low, high = panel.get_ylim()
        panel.set_ylim(low, high + 0.2 * (high - low))
    for panel in (left, middle, right):
        panel.legend(frameon=False, fontsize=8, loc="lower right" if panel is right else "upper left")
    n = len(found["relu_batch"]["test"])
    return (
        f"Left: the first unit of the last hidden layer, first seed of n = {n}, at the rate of the rows that decide. "
        f"Middle: ReLU network, mean over layers, each arm at its best rate. Middle and right: median of n = {n} "
        "seeds, bands quartiles."
    )
