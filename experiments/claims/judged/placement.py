"""Claim 9: the estimates and the figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims import plots
from experiments.claims.intervals import Estimate, compared, extremes, mean, median, ratio

ACTIVATIONS = {"sigmoid": "sigmoid", "tanh": "tanh", "relu": "ReLU"}


def estimates(found: dict[str, Any]) -> dict[str, Estimate]:
    """By the keys of the criteria."""
    made = {"bias_gradient": extremes([found[name]["before"]["bias_gradient"] for name in ACTIVATIONS])}
    for name in ACTIVATIONS:
        part = found[name]
        made |= {
            f"{name}_steps": _geometric(ratio(part["after"]["steps_to_target"], part["before"]["steps_to_target"])),
            f"{name}_test": mean(_gain(part, "after"), "pp", against=0.0),
            f"{name}_none": mean(_gain(part, "none"), "pp", against=0.0),
            f"{name}_before_steps": median(part["before"]["steps_to_target"]),
            f"{name}_none_steps": median(part["none"]["steps_to_target"]),
        }
    return made


def draw(found: dict[str, Any], figure: Figure) -> str:
    """Validation accuracy against steps for each activation; the caption."""
    panels = figure.subplots(1, 3, sharey=True)
    for panel, (name, title) in zip(panels, ACTIVATIONS.items(), strict=True):
        for at, (place, label) in enumerate((("before", "before"), ("none", "no norm"), ("after", "after"))):
            part = found[name][place]
            plots.band(panel, part["steps"], part["val_accuracy"], at, f"{label}, rate {part['rate']:g}")
        panel.axhline(found["target"], color="black", lw=1, ls=":")
        panel.set_xscale("log")
        plots.finish(panel, "training step", "validation accuracy", title)
        panel.legend(loc="center right", frameon=False, fontsize=8)
    n = len(found["relu"]["before"]["test_accuracy"])
    return (
        f"Batch norm before and after the activation, each at its best rate. Lines: median of n = {n} seeds; bands: "
        "quartiles; dotted: the target."
    )


def _geometric(ratios: list[float]) -> Estimate:
    """The geometric mean: steps are counted in threes, so that a median would often be a tie."""
    with np.errstate(divide="ignore"):
        found = mean(np.log(ratios))
    value, low, high = np.exp([found.value, found.low, found.high]).tolist()
    return compared(found._replace(value=value, low=low, high=high, how=f"geometric {found.how}"), ratios, 1.0)


def _gain(part: dict[str, Any], other: str) -> np.ndarray:
    """Percentage points of test accuracy that batch norm before the activation has over another place."""
    return 100 * (np.array(part["before"]["test_accuracy"]) - np.array(part[other]["test_accuracy"]))
