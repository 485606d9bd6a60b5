"""Claim 3: the estimates and the figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims import plots
from experiments.claims.intervals import Estimate, median, ratio


def estimates(found: dict[str, Any]) -> dict[str, Estimate]:
    """By the keys of the criteria."""

    def steps(kind: str, rate: str) -> list[float]:
        part = found[kind]
        return ratio(part[f"none_{rate}"]["steps_to_target"], part[f"batch_{rate}"]["steps_to_target"])

    cost = np.array(found["cost"]["batch"]) / np.array(found["cost"]["none"])
    best = steps("sigmoid", "best")
    return {
        "same_rate": median(steps("sigmoid", "same")),
        "best_rate": median(best),
        "step_cost": median(cost),
        "time_to_target": median(np.array(best) / np.median(cost)),
        "small_weights": median(steps("small_weights", "best")),
        "relu_he": median(steps("relu_he", "best")),
    }


def draw(found: dict[str, Any], figure: Figure) -> str:
    """Validation accuracy against steps in three networks; the caption."""
    titles = {
        "sigmoid": "sigmoid, weights of 0.1",
        "small_weights": "sigmoid, weights of 0.01",
        "relu_he": "ReLU, He weights",
    }
    panels = figure.subplots(1, 3, sharey=True)
    for panel, (kind, title) in zip(panels, titles.items(), strict=True):
        part = found[kind]
        for at, (arm, name) in enumerate((("batch", "batch norm"), ("none", "no norm"))):
            curve = part[f"{arm}_best"]
            label = f"{name}, rate {curve['rate']:g}"
            plots.band(panel, part["steps"], curve["val_accuracy"], at, label)
        plots.finish(panel, "training step", "validation accuracy", title)
        panel.set_xscale("log")
        panel.legend(frameon=False, fontsize=8)
    n = len(found["sigmoid"]["target"])
    return f"Each arm at its best learning rate by validation. Lines: median of n = {n} seeds; bands: quartiles."
