"""Claim 3: the estimates and the figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims._lib import plots
from experiments.claims._lib.compare import sooner
from experiments.claims._lib.intervals import exact, median
from experiments.claims._lib.verdict import Estimates

KINDS = {
    "sigmoid_digits": "sigmoid, digits",
    "sigmoid_mnist": "sigmoid, MNIST",
    "relu_digits": "ReLU, digits",
    "relu_mnist": "ReLU, MNIST",
}


def estimates(found: dict[str, Any]) -> Estimates:
    """Return the estimates by the keys of the criteria."""
    times = median(np.array(found["cost"]["batch"]) / np.array(found["cost"]["none"]))
    made: Estimates = {"step_cost": times}
    for kind in KINDS:
        none, batch = ((found[kind], arm) for arm in ("none", "batch"))
        made[kind] = sooner(none, batch)
        made[f"{kind}_time"] = sooner(none, batch, cost=times.value)
        made[f"{kind}_same"] = sooner(none, batch, rate_of=none)
        for arm in ("none", "batch"):
            made[f"{kind}_{arm}"] = exact(found[kind]["grid"][_fastest(found[kind][arm])], "chosen by steps")
    return made


def draw(found: dict[str, Any], figure: Figure) -> tuple[str, str]:
    """Draw the steps to the target against the learning rate."""
    panels, said, both, lower = figure.subplots(1, len(KINDS), sharey=True), [], 0, 0
    for panel, (kind, title) in zip(panels, KINDS.items(), strict=True):
        run = found[kind]
        for arm, name in (("batch", "batch norm"), ("none", "no norm")):
            steps = np.array(run[arm]["steps"], float)
            plots.points(panel, run["grid"], steps, arm, name)
        plots.finish(panel, "learning rate", "", title, "best", xscale="log", yscale="log")
        least = [np.median(np.array(run[arm]["steps"], float)[:, _fastest(run[arm])]) for arm in ("none", "batch")]
        said.append(f"{least[0]:g} and {least[1]:g} ({title})")
        medians = [np.median(np.array(run[arm]["steps"], float), 0) for arm in ("none", "batch")]
        both += np.sum(np.isfinite(medians).all(0))
        lower += np.sum(np.isfinite(medians[0]) & (medians[1] < medians[0]))
    panels[0].set_ylabel("steps to the target accuracy")
    n = len(found["sigmoid_digits"]["none"]["steps"])
    alt = (
        f"Four panels of steps to the target by learning rate: of the {both} rates where the medians of both arms "
        f"get there, batch norm is sooner at {lower}."
    )
    return alt, (
        f"Median steps to 90% without and with batch norm, at the rate with the fewest steps on average: "
        f"{'; '.join(said)}. Markers: medians and quartiles, n = {n}; "
        "there is none where a quarter of the runs never gets there."
    )


def _fastest(arm: dict[str, Any]) -> int:
    return int(np.argmax(np.mean(np.array(arm["sooner"], float), 0)))
