"""Claim 4: test accuracy with and without batch norm, each arm at its best rate, in four networks and on splits."""

import dataclasses
from typing import Any

import numpy as np

from experiments.claims._lib.networks import stack
from experiments.claims._lib.search import at_best, search, widened
from experiments.claims._lib.study import Study
from experiments.training import layers, networks
from experiments.training.config import Settings
from experiments.training.data import Data, Split, digits
from experiments.training.models import Model, mlp
from experiments.training.train import Arm, compile_arm

SPLITS, FEW = 5, 300
SIGMOID = {"activation": "sigmoid", "init": "constant", "init_scale": 0.1}
RELU = {"activation": "relu", "init": "he", "init_scale": 1.0}
FAST, SLOW = (1.0, 3.0), (0.1, 0.3, 1.0)  # where the grids start
KINDS: dict[str, dict[str, Any]] = {
    "sigmoid": {**SIGMOID, "widths": (100,) * 3, "steps": 2000, "learning_rates": FAST},
    "relu": {**RELU, "widths": (100,) * 3, "steps": 800, "learning_rates": SLOW},
    "deep": {**SIGMOID, "widths": (64,) * 20, "steps": 300, "learning_rates": (0.03, *SLOW)},
    "few": {**RELU, "widths": (64,) * 8, "steps": 500, "learning_rates": (0.03, *SLOW)},
}


def measure(study: Study, given: Settings) -> dict[str, Any]:
    """Measure test and training accuracies `[splits, seeds]` of both arms in each network."""
    data = splits(study)
    found: dict[str, Any] = {"splits": len(data)}
    kinds = study.few(tuple(KINDS))
    for kind in kinds:
        compiled: dict[Any, Arm] = {}

        def make(s: Settings, arm: str, compiled: dict[Any, Arm] = compiled) -> Arm:
            if (s, arm) not in compiled:  # once for all splits
                compiled[s, arm] = compile_arm(s, _model(study, s, arm))
            return compiled[s, arm]

        s, runs = study.settings(given, **KINDS[kind]), []
        for at, split in enumerate(data):
            some = split._replace(train=Split(*(v[:FEW] for v in split.train))) if kind == "few" else split
            # The first split finds the budget and the grid that the others start from.
            run = widened if runs else search
            asked = {"kind": kind, "split": at, "splits": len(data), "few": FEW}
            runs.append(run(study, f"accuracy-{kind}-{at}", s, ("none", "batch"), make, asked=asked, data=some))
            s = dataclasses.replace(s, learning_rates=tuple(runs[0]["grid"]), steps=runs[0]["steps"])
        found[kind] = {
            "grid": sorted({r for run in runs for r in run["grid"]}),
            "steps": s.steps,
            "moved": runs[0]["moved"],
        }
        for arm in ("none", "batch"):
            found[kind][f"{arm}_rate"] = [run["grid"][at_best(run[arm])[0]] for run in runs]
            for name, what in ((arm, "test"), (f"{arm}_train", "train"), (f"{arm}_late", "late")):
                found[kind][name] = [at_best(run[arm], what)[1] for run in runs]
    # A smoke run measures the first and the last, and lets the first stand for the rest.
    return found | {kind: found[kinds[0]] for kind in KINDS if kind not in kinds}


def splits(study: Study) -> list[Data]:
    """Return five splits of the digits; of other data the one that there is."""
    own = digits()
    same = own.train.images.shape == study.data.train.images.shape
    if not same or not np.array_equal(own.train.images, study.data.train.images):
        return [study.data]
    return [digits(k) for k in study.few(range(SPLITS))]


def _model(study: Study, s: Settings, arm: str) -> Model:
    layer, kernel = layers.of(s, arm), networks.weights(s)
    if len(set(s.widths)) == 1 and len(s.widths) > 3:
        return stack(layer, len(s.widths), s.widths[0], kernel, study.pixels)
    return mlp([layer] * len(s.widths), s.widths, kernel, study.pixels)
