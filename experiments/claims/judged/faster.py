"""Claim 3: the estimates and the figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims import plots
from experiments.claims.intervals import Estimate, exact, median, ratio, share


def estimates(found: dict[str, Any]) -> dict[str, Estimate]:
    """By the keys of the criteria."""

    def steps(kind: str, rate: str) -> list[float]:
        part = found[kind]
        return ratio(part[f"none_{rate}"]["steps_to_target"], part[f"batch_{rate}"]["steps_to_target"])

    cost = np.array(found["cost"]["batch"]) / np.array(found["cost"]["none"])
    same, best = steps("sigmoid", "same"), steps("sigmoid", "best")
    return {
        "same_rate": median(same, against=1.0),
        "same_rate_seeds": share(same, 1.0),
        "best_rate": median(best, against=1.0),
        "step_cost": median(cost),
        "time_to_target": median(np.array(best) / np.median(cost), against=1.0),
        "small_weights": median(steps("small_weights", "best"), against=1.0),
        "relu_he": median(steps("relu_he", "best"), against=1.0),
        "rate_none": exact(found["sigmoid"]["none_best"]["rate"], "chosen by validation"),
        "rate_batch": exact(found["sigmoid"]["batch_best"]["rate"], "chosen by validation"),
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
