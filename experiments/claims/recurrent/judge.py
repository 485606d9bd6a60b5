"""Claim 12: the estimates and the figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims._lib import plots
from experiments.claims._lib.compare import at_best, better, level, moved, sooner
from experiments.claims._lib.intervals import exact, median
from experiments.claims._lib.verdict import Estimates

TASKS = {"digits": "digits, 16 pieces", "mnist": "permuted MNIST, 28 pieces", "vowels": "JapaneseVowels"}
NAMES = {
    "none": "no norm",
    "batch": "batch norm",
}


def estimates(found: dict[str, Any]) -> Estimates:
    """Return the estimates by the keys of the criteria."""
    made: Estimates = {}
    for task, run in found["tasks"].items():
        none, batch = ((run, arm) for arm in ("none", "batch"))
        made |= {
            f"gain_{task}": better(batch, none),
            f"sooner_{task}": sooner(none, batch),
            f"none_{task}": level(none),
            f"batch_{task}": level(batch),
            f"moved_{task}": moved(none),
        }
    return made | {
        "step_cost": median(np.array(found["cost"]["batch"]) / np.array(found["cost"]["none"])),
        "stored": exact(float(found["stored"]["batch"]), "counted"),
        "stored_shared": exact(float(found["stored"]["shared"]), "counted"),
    }


def draw(found: dict[str, Any], figure: Figure) -> tuple[str, str]:
    """Draw validation accuracy over training on each task."""
    panels = figure.subplots(1, len(TASKS), sharey=True)
    for panel, (task, title) in zip(panels, TASKS.items(), strict=True):
        run = found["tasks"][task]
        for arm, name in NAMES.items():
            plots.band(panel, run[arm]["at"], 100 * np.array(run[arm]["curve"]), arm, name)
        plots.finish(panel, "training step", "", title, "lower right", ylim=(0, 100))
    panels[0].set_ylabel("validation accuracy, %")
    said = [
        f"{100 * np.mean(at_best((found['tasks'][task], 'batch'))):.1f}% with batch norm and "
        f"{100 * np.mean(at_best((found['tasks'][task], 'none'))):.1f}% without on {title}"
        for task, title in TASKS.items()
    ]
    n = len(found["tasks"]["digits"]["none"]["test"])
    return "Validation accuracy over training of LSTMs with and without batch norm, on three tasks.", (
        f"Test accuracy: {'; '.join(said)}. Each at its best rate; medians and quartiles, n = {n}."
    )
