"""Claim 12: the estimates and the figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims._lib import plots
from experiments.claims._lib.intervals import Estimate, at_edge, exact, mean, median, ratio
from experiments.claims._lib.verdict import Estimates

NAMES = {
    "none": "no norm",
    "batch": "batch norm, scales 0.1",
    "scale_1": "scales 1",
    "shared": "shared statistics",
    "input": "inputs only",
    "layer": "layer norm",
}


def estimates(found: dict[str, Any]) -> Estimates:
    """Return the estimates by the keys of the criteria."""
    arms = found["arms"]
    plain, norm = arms["none"]["tuned"], arms["batch"]["tuned"]
    edge = at_edge(found["grid"], no_norm=plain["rate"], batch_norm=norm["rate"])

    def gain(one: dict[str, Any], other: dict[str, Any]) -> Estimate:
        return mean(100 * (np.asarray(one["test_accuracy"]) - np.asarray(other["test_accuracy"])), "pp")

    def sooner(one: dict[str, Any], other: dict[str, Any]) -> Estimate:
        return median(ratio(other["steps_to_target"], one["steps_to_target"]))

    def cost(arm: str) -> Estimate:
        return median(np.array(found["cost"][arm]) / np.array(found["cost"]["none"]))

    def decay(one: str, other: str, when: str = "before") -> Estimate:
        return mean(_decay(arms[one][f"gradients_{when}"]) - _decay(arms[other][f"gradients_{when}"]))

    return {
        "gain": gain(arms["batch"], arms["none"]),
        "sooner": sooner(arms["batch"], arms["none"]),
        "step_cost": cost("batch"),
        "stored": exact(float(arms["batch"]["stored"]), "counted"),
        "stored_shared": exact(float(arms["shared"]["stored"]), "counted"),
        "shared": gain(arms["batch"], arms["shared"]),
        "decay": decay("scale_1", "batch"),
        "decay_plain": decay("none", "batch"),
        "decay_trained": decay("scale_1", "batch", "after"),
        "gain_tuned": gain(norm, plain).with_caveat(edge),
        "sooner_tuned": sooner(norm, plain).with_caveat(edge),
        "scale_1": gain(arms["scale_1"], arms["batch"]),
        "input": gain(arms["input"], arms["none"]),
        "input_sooner": sooner(arms["input"], arms["none"]),
        "layer": gain(arms["layer"], arms["none"]),
        "layer_sooner": sooner(arms["layer"], arms["none"]),
        "layer_cost": cost("layer"),
    }


def draw(found: dict[str, Any], figure: Figure) -> tuple[str, str]:
    """Draw validation accuracy over training, test accuracy at its best, and gradients through time."""
    over, best, back = figure.subplots(1, 3, width_ratios=(1.2, 1, 1))
    arms = found["arms"]
    for arm, name in NAMES.items():
        plots.band(over, arms[arm]["steps"], 100 * np.asarray(arms[arm]["val_accuracy"]), arm, name)
        norms = np.asarray(arms[arm]["gradients_before"])
        plots.band(back, np.arange(norms.shape[1]), norms / norms[:, -1:], arm, name)
    names = ("training step", "validation accuracy, %", f"all at rate {found['grid'][0]:g}")
    plots.finish(over, *names, "lower right", ylim=(0, 100))
    plots.strip(best, {name: (arm, 100 * np.asarray(arms[arm]["test_accuracy"])) for arm, name in NAMES.items()})
    best.tick_params(axis="y", labelsize=8)
    plots.finish(best, "test accuracy, %", "", "at the best step by validation")
    names = ("piece of the image", "norm of the gradient, last = 1", "gradient by h, before training")
    plots.finish(back, *names, yscale="log")
    means = ", ".join(f"{100 * np.mean(arms[arm]['test_accuracy']):.1f}% {name}" for arm, name in NAMES.items())
    n = len(arms["none"]["test_accuracy"])
    alt = f"Validation accuracy over training and gradients through time of six LSTMs; test accuracy: {means}."
    return alt, f"Lines: median of n = {n} seeds; bands: quartiles; dots: seeds, their median a bar."


def _decay(norms: Any) -> np.ndarray:
    """Return the slope of log10 of `norms [seeds, steps]`: the decades that are lost for each step back."""
    norms = np.asarray(norms, float)
    return np.polyfit(np.arange(norms.shape[1]), np.log10(norms).T, 1)[0]
