"""Claim 3: the estimates and the figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims._lib import plots
from experiments.claims._lib.intervals import Estimate, at_edge, exact, median, ratio, resampled
from experiments.claims._lib.verdict import Estimates

TITLES = {
    "sigmoid": "sigmoid, weights of 0.1",
    "small_weights": "sigmoid, weights of 0.01",
    "relu_he": "ReLU, He weights",
}


def estimates(found: dict[str, Any]) -> Estimates:
    """Return the estimates by the keys of the criteria."""

    def edge(kind: str, same: bool) -> str:
        best = {
            name: found[kind][f"{arm}_best"]["rate"] for arm, name in (("none", "no_norm"), ("batch", "batch_norm"))
        }
        return at_edge(found["rates"], **({"no_norm": best["no_norm"]} if same else best))

    def steps(kind: str, same: bool = False) -> Estimate:
        part = found[kind]
        made = median(_ratios(part, same))
        if "by_rate" in part:
            made = resampled(lambda drawn: _chosen(part["by_rate"], drawn, same), len(part["target"]), "", "median")
        return made.with_caveat(edge(kind, same))

    cost = np.array(found["cost"]["batch"]) / np.array(found["cost"]["none"])
    return {
        "same_rate": steps("sigmoid", same=True),
        "same_rate_seeds": exact(float(np.mean(np.array(_ratios(found["sigmoid"], True)) > 1)), "counted"),
        "best_rate": steps("sigmoid"),
        "step_cost": median(cost),
        "time_to_target": median(np.array(_ratios(found["sigmoid"], False)) / np.median(cost)),
        "small_weights": steps("small_weights"),
        "relu_he": steps("relu_he"),
        "rate_none": exact(found["sigmoid"]["none_best"]["rate"], "chosen by validation"),
        "rate_batch": exact(found["sigmoid"]["batch_best"]["rate"], "chosen by validation"),
    }


def _ratios(part: dict[str, Any], same: bool) -> np.ndarray:
    """Return the steps without a norm over those with one, at the plain network's best rate or each at its own."""
    return ratio(*(part[f"{arm}_{'same' if same else 'best'}"]["steps_to_target"] for arm in ("none", "batch")))


def _chosen(by: dict[str, Any], drawn: np.ndarray, same: bool) -> np.ndarray:
    """Return the median ratio of each resample, with the rates, and so the target, chosen in it.

    `by` has for each arm `validation [seeds, rates]` and `steps [seeds, rates of the plain arm, rates]`.
    """
    best = {a: np.argmax(np.array(by[a]["validation"])[drawn].mean(1), -1) for a in ("none", "batch")}
    none, batch = best["none"][:, None], best["none" if same else "batch"][:, None]
    above = np.array(by["none"]["steps"], float)[drawn, none, none]
    below = np.array(by["batch"]["steps"], float)[drawn, none, batch]
    with np.errstate(invalid="ignore"):
        each = np.where(np.isinf(above) & np.isinf(below), 1.0, above / below)
    ordered = np.sort(each, -1)
    low, high = ordered[:, (each.shape[1] - 1) // 2], ordered[:, each.shape[1] // 2]
    with np.errstate(invalid="ignore"):
        return np.where(np.isinf(high), high, (low + high) / 2)


def draw(found: dict[str, Any], figure: Figure) -> tuple[str, str]:
    """Draw validation accuracy against steps in three networks."""
    panels = figure.subplots(1, 3, sharey=True)
    for panel, (kind, title) in zip(panels, TITLES.items(), strict=True):
        for arm, name in (("batch", "batch norm"), ("none", "no norm")):
            curve = found[kind][f"{arm}_best"]
            label = f"{name}, rate {curve['rate']:g}"
            plots.band(panel, found[kind]["steps"], curve["val_accuracy"], arm, label)
        plots.finish(panel, "training step", "validation accuracy", title, "best", xscale="log", ylim=(0, 1))
    medians = [f"{median(_ratios(found[kind], False)).value:.3g} for {title}" for kind, title in TITLES.items()]
    alt = f"Validation accuracy against steps with and without batch norm; ratios of steps: {'; '.join(medians)}."
    n = len(found["sigmoid"]["target"])
    return alt, f"Each arm at its best learning rate by validation. Lines: median of n = {n} seeds; bands: quartiles."
