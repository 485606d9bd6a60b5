"""Claim 4: test accuracy with and without batch norm, each arm at its best rate, in four networks and on splits."""

from functools import partial
from typing import Any

import numpy as np

from experiments.claims.networks import stack
from experiments.claims.study import Study, chosen, tested
from experiments.training import layers, networks
from experiments.training.config import Settings
from experiments.training.data import Data, Split, digits
from experiments.training.models import Model, mlp
from experiments.training.train import Arm, compile_arm

SPLITS, FEW = 5, 300
SIGMOID = {"activation": "sigmoid", "init": "constant", "init_scale": 0.1}
RELU = {"activation": "relu", "init": "he", "init_scale": 1.0}
# The rates of a network are the same for both arms, and the steps so many that accuracy is no matter of speed.
FAST, SLOW = (1.0, 3.0), (0.1, 0.3, 1.0)
KINDS: dict[str, dict[str, Any]] = {
    "sigmoid": {**SIGMOID, "widths": (100,) * 3, "steps": 2000, "learning_rates": FAST},
    "relu": {**RELU, "widths": (100,) * 3, "steps": 800, "learning_rates": SLOW},
    "deep": {**SIGMOID, "widths": (64,) * 20, "steps": 300, "learning_rates": (0.03, *SLOW)},
    "few": {**RELU, "widths": (64,) * 8, "steps": 500, "learning_rates": (0.03, *SLOW)},
}


def measure(study: Study, given: Settings) -> dict[str, Any]:
    """Test accuracies `[splits, seeds]` of both arms in each network."""
    data = splits(study)
    found: dict[str, Any] = {"splits": len(data)}
    kinds = study.few(tuple(KINDS))
    for kind in kinds:
        s = study.settings(given, **KINDS[kind])
        # Compiled when first used: not at all where all parts are on disk.
        arms = {arm: compile_arm(s, _model(study, s, arm)) for arm in ("none", "batch")}
        parts = []
        for at, split in enumerate(data):
            some = _first(split, FEW) if kind == "few" else split
            asked = {"settings": s, "kind": kind, "split": at, "splits": len(data), "few": FEW}
            parts.append(study.part(f"accuracy-{kind}-{at}", asked, partial(_compared, study, s, arms, some)))
        found[kind] = {name: [part[name] for part in parts] for name in parts[0]}
    # A smoke run measures the first and the last, and lets the first stand for the rest.
    return found | {kind: found[kinds[0]] for kind in KINDS if kind not in kinds}


def splits(study: Study) -> list[Data]:
    """Five splits of the digits; of other data the one that there is."""
    own = digits()
    same = own.train.images.shape == study.data.train.images.shape
    if not same or not np.array_equal(own.train.images, study.data.train.images):
        return [study.data]
    return [digits(k) for k in study.few(range(SPLITS))]


def _first(data: Data, examples: int) -> Data:
    """The same with so few to learn from."""
    return data._replace(train=Split(*(part[:examples] for part in data.train)))


def _model(study: Study, s: Settings, arm: str) -> Model:
    layer, kernel = layers.of(s, arm), networks.weights(s)
    if len(set(s.widths)) == 1 and len(s.widths) > 3:
        return stack(layer, len(s.widths), s.widths[0], kernel, study.pixels)
    return mlp([layer] * len(s.widths), s.widths, kernel, study.pixels)


def _compared(study: Study, s: Settings, arms: dict[str, Arm], data: Data) -> dict[str, Any]:
    """Of both arms the rate that validation chooses, test accuracy at it, and what validation still gained late."""
    found = {}
    for name, arm in arms.items():
        log = study.refit(s, arm, data).log
        rate = chosen(log)
        found[name] = tested(log, rate)
        found[f"{name}_rate"] = s.learning_rates[rate]
        late = log.val_accuracy[:, rate, [-1 - len(log.steps) // 4, -1]]
        found[f"{name}_late"] = late[:, 1] - late[:, 0]
    return found
