"""Claim 2: the estimates and the figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims import plots
from experiments.claims.intervals import Estimate, mean, median


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
        return mean(batch - none)

    test = {arm: 100 * np.array(found[f"relu_{arm}"]["test"]) for arm in ("none", "batch", "noisy", "noise")}
    changes = {kind: median(np.divide(*gradients(kind, "relative"))) for kind in ("relu", "linear")}
    return {
        "drift": median(drifts("inputs", False)),
        "drift_scaled": median(drifts("inputs_scaled", False)),
        "drift_tuned": median(drifts("inputs", True)),
        "drift_tuned_scaled": median(drifts("inputs_scaled", True)),
        "drift_normalized": median(drifts("normalized_scaled", False)),
        "cosine": difference("relu"),
        "cosine_linear": difference("linear"),
        "change": changes["relu"],
        "change_linear": changes["linear"],
        "cosine_small_rate": difference("linear", best=False),
        "noisy": mean(test["batch"] - test["noisy"], "pp"),
        "noisy_and_plain": mean(test["noisy"] - test["none"], "pp"),
        "noise_alone": mean(test["none"] - test["noise"], "pp"),
    }


def draw(found: dict[str, Any], figure: Figure) -> str:
    """One unit's quantiles, the gradients' cosine, and learning with noise; the caption."""
    left, middle, right = figure.subplots(1, 3)
    for at, (arm, name) in enumerate((("batch", "batch norm"), ("none", "no norm"))):
        part = found[f"drift_{arm}"]
        unit = np.array(part["inputs_unit"])[:, part["best"]]
        color, dashes = plots.STYLES[at]
        steps = np.linspace(0, found["steps"], len(unit))
        for quantile in range(3):
            label = f"{name}, rate {found['rates'][part['best']]:g}" if quantile == 1 else None
            left.plot(steps, unit[:, quantile], color=color, ls=dashes, lw=2 if quantile == 1 else 1, label=label)
        gradient = found[f"relu_{arm}"]
        by_step = np.array(gradient["by_step"])[:, gradient["best"]]
        middle.plot(np.arange(len(by_step)) * 50, by_step, color=color, ls=dashes, lw=1.8, label=name)
    for at, (arm, name) in enumerate(
        (("batch", "batch norm"), ("none", "no norm"), ("noisy", "noisy batch norm"), ("noise", "no norm, same noise"))
    ):
        part = found[f"relu_{arm}"]
        steps = np.linspace(50, 50 * len(part["val_curve"][0]), len(part["val_curve"][0]))
        plots.band(right, steps, part["val_curve"], at, name)
    plots.finish(left, "training step", "input of one sigmoid", "quantiles 15, 50 and 85%")
    plots.finish(middle, "training step", "cosine", "a layer's gradient before and after\nthe earlier layers' step")
    plots.finish(right, "training step", "validation accuracy", "with noise that restores the shift")
    right.set_ylim(0, 1)
    for panel in (left, middle, right):
        panel.legend(frameon=False, fontsize=8)
    n = len(found["relu_batch"]["test"])
    return (
        f"Left: the first unit of the last hidden layer, first seed of n = {n}. Middle: ReLU network, mean over layers "
        f"and seeds, each arm at its best rate. Right: median of n = {n} seeds, bands quartiles."
    )
