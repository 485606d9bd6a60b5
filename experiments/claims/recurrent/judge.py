"""Claim 12: the estimates and the figure."""

from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims._lib import plots
from experiments.claims._lib.compare import better, level, moved, sooner
from experiments.claims._lib.intervals import exact, median
from experiments.claims._lib.verdict import Estimates

TASKS = {"digits": "digits", "mnist": "permuted MNIST", "vowels": "JapaneseVowels"}
NAMES = {"none": "no norm", "batch": "batch norm"}


def estimates(found: dict[str, Any]) -> Estimates:
    """Return the estimates by the keys of the criteria."""
    made: Estimates = {}
    for task, run in found["tasks"].items():
        none, batch = ((run, arm) for arm in ("none", "batch"))
        train = better(batch, none, "train")
        made |= {
            f"gain_{task}": better(batch, none),
            f"sooner_{task}": sooner(none, batch),
            f"none_{task}": level(none),
            f"batch_{task}": level(batch),
            f"moved_{task}": moved(none),
            f"train_{task}": replace(train, value=round(train.value, 6)),
            f"budget_{task}": exact(float(run["steps"]), "counted"),
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
    arms = {title: [(found["tasks"][task], arm) for arm in ("batch", "none")] for task, title in TASKS.items()}
    gains = {title: better(both[0], both[1]) for title, both in arms.items()}
    seen = [f"{level(both[0]).value:.1f} and {level(both[1]).value:.1f}% on {title}" for title, both in arms.items()]
    said = [f"{e.value:+.2f} ({e.low:.2f} to {e.high:.2f}) on {title}" for title, e in gains.items()]
    start = "No gain is shown: b" if all(e.low <= 0 <= e.high for e in gains.values()) else "B"
    n = len(found["tasks"]["digits"]["none"]["test"])
    alt = f"Validation accuracy rises over training; test accuracy with batch norm and without: {', '.join(seen)}."
    return alt, (
        f"{start}atch norm changes test accuracy, in points, by {', '.join(said)}, with 95% intervals. "
        f"Curves: medians and quartiles, n = {n}, at the best rates."
    )
