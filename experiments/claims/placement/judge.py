"""Claim 9: the estimates and the figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims._lib import plots
from experiments.claims._lib.intervals import at_edge, extremes, geometric, mean, median, ratio
from experiments.claims._lib.verdict import Estimates

ACTIVATIONS = {"sigmoid": "sigmoid", "tanh": "tanh", "relu": "ReLU"}
PLACES = {"before": ("batch", "before"), "none": ("none", "no norm"), "after": ("after", "after")}


def estimates(found: dict[str, Any]) -> Estimates:
    """Return the estimates by the keys of the criteria."""
    made: Estimates = {"bias_gradient": extremes([found[name]["before"]["bias_gradient"] for name in ACTIVATIONS])}
    for name in ACTIVATIONS:
        part = found[name]
        edge = at_edge(found["grid"], before=part["before"]["rate"], after=part["after"]["rate"])
        steps = geometric(ratio(part["after"]["steps_to_target"], part["before"]["steps_to_target"]))
        made |= {
            f"{name}_steps": steps.with_caveat(edge),
            f"{name}_test": mean(_gain(part, "after"), "pp").with_caveat(edge),
            f"{name}_none": mean(_gain(part, "none"), "pp"),
            f"{name}_before_steps": median(part["before"]["steps_to_target"]),
            f"{name}_none_steps": median(part["none"]["steps_to_target"]),
        }
    return made


def draw(found: dict[str, Any], figure: Figure) -> tuple[str, str]:
    """Draw validation accuracy against steps for each activation."""
    panels, medians = figure.subplots(1, 3, sharey=True), []
    for panel, (name, title) in zip(panels, ACTIVATIONS.items(), strict=True):
        for place, (arm, label) in PLACES.items():
            part = found[name][place]
            plots.band(panel, part["steps"], part["val_accuracy"], arm, f"{label}, rate {part['rate']:g}")
        panel.axhline(found["target"], color="black", lw=1, ls=":")
        names = ("training step", "validation accuracy", title)
        plots.finish(panel, *names, "center right", xscale="log", ylim=(0, 1))
        steps = [np.median(found[name][place]["steps_to_target"]) for place in ("before", "after")]
        medians.append(f"{steps[0]:g} steps before and {steps[1]:g} after with {title}")
    alt = f"Validation accuracy against steps; to {found['target']:.0%} it takes {', '.join(medians)}, medians."
    n = len(found["relu"]["before"]["test_accuracy"])
    return alt, f"Each place at its best rate. Lines: median of n = {n} seeds; bands: quartiles; dotted: the target."


def _gain(part: dict[str, Any], other: str) -> np.ndarray:
    """Return the points of test accuracy by which batch norm before the activation exceeds another place."""
    return 100 * (np.array(part["before"]["test_accuracy"]) - np.array(part[other]["test_accuracy"]))
