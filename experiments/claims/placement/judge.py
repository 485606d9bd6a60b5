"""Claim 9: the estimates and the figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims._lib import plots
from experiments.claims._lib.compare import Arm, better, edge
from experiments.claims._lib.intervals import Estimate, best, extremes, ratio, tuned
from experiments.claims._lib.verdict import Estimates

ACTIVATIONS = {"sigmoid": "sigmoid", "tanh": "tanh", "relu": "ReLU"}
PLACES = {"before": ("batch", "before"), "none": ("none", "no norm"), "after": ("after", "after")}


def estimates(found: dict[str, Any]) -> Estimates:
    """Return the estimates by the keys of the criteria."""
    made: Estimates = {"bias_gradient": extremes(found["bias_gradient"])}
    for name in ACTIVATIONS:
        before, after, none = ((found[name], place) for place in ("before", "after", "none"))
        made |= {
            f"{name}_steps": _slower(after, before),
            f"{name}_test": better(before, after),
            f"{name}_none": better(before, none),
            f"{name}_train": better(before, after, "train"),
            f"{name}_none_steps": _slower(none, before),
        }
    relu, standard, gaussian = (found["relu"], "before"), (found["standard"], "none"), (found["gaussian"], "none")
    return made | {
        "input_steps": _slower(standard, relu),
        "input_test": better(relu, standard),
        "gaussian_steps": _slower(standard, gaussian),
        "minimum": _slower((found["relu"], "none"), relu, "to_minimum"),
    }


def _slower(one: Arm, other: Arm, what: str = "to_target") -> Estimate:
    """Return the steps of one arm over those of another, each at its fastest rate."""
    steps = [np.array(run[arm][what], float) for run, arm in (one, other)]
    return tuned([-v for v in steps], steps, ratio, log=True).with_caveat(edge((one, other), [-v for v in steps]))


def draw(found: dict[str, Any], figure: Figure) -> tuple[str, str]:
    """Draw validation accuracy against steps for each activation."""
    panels, medians = figure.subplots(1, 3, sharey=True), []
    for panel, (name, title) in zip(panels, ACTIVATIONS.items(), strict=True):
        run, steps = found[name], []
        for place, (arm, label) in PLACES.items():
            part = run[place]
            plots.band(panel, part["at"], part["curve"], arm, f"{label}, rate {run['grid'][part['best']]:.3g}")
            to_target = np.array(part["to_target"], float)
            steps.append(np.median(to_target[:, best(-to_target)]))
        panel.axhline(found["target"], color="black", lw=1, ls=":")
        names = ("training step", "validation accuracy", title)
        plots.finish(panel, *names, "center right", xscale="log", ylim=(0, 1))
        medians.append(f"{steps[0]:g} steps before and {steps[2]:g} after with {title}")
    n = len(found["relu"]["before"]["test"])
    alt = f"Validation accuracy against steps; to {found['target']:.0%} it takes {', '.join(medians)}, medians."
    return alt, (
        f"Each place at the rate that validation chose. Lines: median of n = {n} seeds on splits of their own; bands: "
        f"quartiles; dotted: the target. At its fastest rate each takes {'; '.join(medians)}."
    )
