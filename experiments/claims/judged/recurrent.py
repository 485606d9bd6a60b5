"""Claim 12: the estimates and the figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims import plots
from experiments.claims.intervals import Estimate, exact, mean, median, ratio

NAMES = {
    "none": "no norm",
    "batch": "batch norm, scales 0.1",
    "scale_1": "scales 1",
    "shared": "shared statistics",
    "input": "inputs only",
    "layer": "layer norm",
}


def estimates(found: dict[str, Any]) -> dict[str, Estimate]:
    """By the keys of the criteria."""
    arms = found["arms"]

    def gain(one: str, other: str) -> Estimate:
        accuracy = [np.asarray(arms[arm]["test_accuracy"]) for arm in (one, other)]
        return mean(100 * (accuracy[0] - accuracy[1]), "pp", against=0.0)

    def sooner(arm: str) -> Estimate:
        return median(ratio(arms["none"]["steps_to_target"], arms[arm]["steps_to_target"]), against=1.0)

    def cost(arm: str) -> Estimate:
        return median(np.array(found["cost"][arm]) / np.array(found["cost"]["none"]))

    def decay(one: str, other: str, when: str = "before") -> Estimate:
        return mean(_decay(arms[one][f"gradients_{when}"]) - _decay(arms[other][f"gradients_{when}"]), against=0.0)

    with_norm, without = arms["batch"]["tuned"], arms["none"]["tuned"]

    return {
        "gain": gain("batch", "none"),
        "sooner": sooner("batch"),
        "step_cost": cost("batch"),
        "stored": exact(float(arms["batch"]["stored"]), "counted"),
        "stored_shared": exact(float(arms["shared"]["stored"]), "counted"),
        "shared": gain("batch", "shared"),
        "decay": decay("scale_1", "batch"),
        "decay_plain": decay("none", "batch"),
        "decay_trained": decay("scale_1", "batch", "after"),
        "gain_tuned": mean(
            100 * (np.asarray(with_norm["test_accuracy"]) - np.asarray(without["test_accuracy"])), "pp", against=0.0
        ),
        "sooner_tuned": median(ratio(without["steps_to_target"], with_norm["steps_to_target"]), against=1.0),
        "scale_1": gain("scale_1", "batch"),
        "input": gain("input", "none"),
        "input_sooner": sooner("input"),
        "layer": gain("layer", "none"),
        "layer_sooner": sooner("layer"),
        "layer_cost": cost("layer"),
    }


def draw(found: dict[str, Any], figure: Figure) -> str:
    """Validation accuracy over training, test accuracy at its best, and gradients through time; the caption."""
    over, best, back = figure.subplots(1, 3, width_ratios=(1.2, 1, 1))
    arms = found["arms"]
    for at, (arm, name) in enumerate(NAMES.items()):
        part = arms[arm]
        plots.band(over, part["steps"], 100 * np.asarray(part["val_accuracy"]), at, name)
        norms = np.asarray(part["gradients_before"])
        plots.band(back, np.arange(norms.shape[1]), norms / norms[:, -1:], at, name)
    plots.finish(over, "training step", "validation accuracy, %")
    over.legend(loc="lower right", frameon=False, fontsize=8)
    plots.strip(best, {name: 100 * np.asarray(arms[arm]["test_accuracy"]) for arm, name in NAMES.items()})
    best.tick_params(axis="y", labelsize=8)
    plots.finish(best, "test accuracy, %", "", "at the best step by validation")
    back.set_yscale("log")
    plots.finish(back, "piece of the image", "norm of the gradient, last = 1", "gradient by h, before training")
    n = len(arms["none"]["test_accuracy"])
    return f"Lines: median of n = {n} seeds; bands: quartiles; dots: seeds, their median a bar."


def _decay(norms: Any) -> np.ndarray:
    """The slope of log10 of `norms [seeds, steps]` along the steps: decades that are lost for each step back."""
    norms = np.asarray(norms, float)
    return np.polyfit(np.arange(norms.shape[1]), np.log10(norms).T, 1)[0]
