"""Claim 9: the estimates and the figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims._lib import plots
from experiments.claims._lib.compare import Arm, better, edge
from experiments.claims._lib.intervals import Estimate, best, exact, extremes, ratio, tuned
from experiments.claims._lib.verdict import Estimates
from experiments.tables import markdown

ACTIVATIONS = {"sigmoid": "sigmoid", "tanh": "tanh", "relu": "ReLU"}
PLACES = {
    "before": ("batch", "batch norm before the activation"),
    "after": ("after", "batch norm after it"),
    "none": ("none", "no norm"),
}


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
            f"{name}_budget": exact(float(found[name]["steps"]), "counted"),
            f"{name}_moved": exact(found[name]["moved"][-1], "mean of all seeds, no interval kept", "pp"),
        }
    relu, standard, gaussian = (found["relu"], "before"), (found["standard"], "none"), (found["gaussian"], "none")
    return made | {
        "input_steps": _slower(standard, relu),
        "input_test": better(relu, standard),
        "input_train": better(relu, standard, "train"),
        "inputs_budget": exact(float(found["standard"]["steps"]), "counted"),
        "gaussian_steps": _slower(standard, gaussian),
        "minimum": _slower((found["relu"], "none"), relu, "to_minimum"),
    }


def _slower(one: Arm, other: Arm, what: str = "to_target") -> Estimate:
    """Return the steps of one arm over those of another, each at its fastest rate."""
    steps = [np.array(run[arm][what], float) for run, arm in (one, other)]
    return tuned([-v for v in steps], steps, ratio, log=True).with_caveat(edge((one, other), [-v for v in steps]))


def tables(found: dict[str, Any]) -> str:
    """Return the rates of each activation and place, and the steps and accuracies at them."""
    rows = []
    for name, title in ACTIVATIONS.items():
        for place, (_, label) in PLACES.items():
            run, part = found[name], found[name][place]
            steps, chosen = np.array(part["to_target"], float), best(part["validation"])
            fastest = best(-steps)
            accuracies = [f"{100 * np.mean(np.array(part[what])[:, chosen]):.1f}" for what in ("test", "train")]
            rates = [f"{run['grid'][at]:.3g}" for at in (fastest, chosen)]
            needed = f"{np.median(steps[:, fastest]):.3g}".replace("inf", "∞")
            rows.append([title, label, rates[0], needed, rates[1], *accuracies])
    head = ["units", "place", "fastest rate", "its steps, median", "best rate", "test, %", "training, %"]
    return f"Rates chosen, steps to the target, and mean accuracies.\n\n{markdown(head, rows)}"


def draw(found: dict[str, Any], figure: Figure) -> tuple[str, str]:
    """Draw validation accuracy against steps for each activation."""
    panels, said, ratios = figure.subplots(1, 3, sharey=True), [], []
    for panel, (name, title) in zip(panels, ACTIVATIONS.items(), strict=True):
        run, steps = found[name], []
        for place, (arm, label) in PLACES.items():
            part = run[place]
            curve = 100 * np.asarray(part["curve"], float)
            plots.band(panel, part["at"], curve, arm, label if name == "sigmoid" else "_")
            to_target = np.array(part["to_target"], float)
            steps.append(np.median(to_target[:, best(-to_target)]))
        panel.axhline(100 * found["target"], color="black", lw=1, ls=":")
        plots.finish(panel, "training step", "", title, xscale="log", ylim=(0, 100))
        said.append(f"{title} {steps[0]:g}, {steps[1]:g} and {steps[2]:g}".replace("inf", "∞"))
        e = _slower((run, "after"), (run, "before"))
        ratios.append(f"{e.value:.2f} ({e.low:.2f} to {e.high:.2f}) with {title}")
    panels[0].set_ylabel("validation accuracy, %")
    figure.legend(loc="outside upper center", ncols=3, fontsize=9)
    n, target = len(found["relu"]["before"]["test"]), f"{found['target']:.0%}"
    alt = f"Validation accuracy over steps. Median steps to {target} at the fastest rates, before, after and without:"
    return f"{alt} {'; '.join(said)}.", (
        f"Steps to {target} after the activation over those before, each at its fastest rate, with 95% intervals: "
        f"{', '.join(ratios)}. Curves: medians and quartiles of {n} splits at the rates that validation chose, which "
        "may be slower; dotted: the target."
    )
