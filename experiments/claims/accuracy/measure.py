"""Claim 4: test accuracy with and without batch norm, each arm at its best rate, in four networks on splits."""

from functools import partial
from typing import Any

from experiments.claims._lib.networks import stack
from experiments.claims._lib.search import kept, search
from experiments.claims._lib.splits import mnist, on
from experiments.claims._lib.study import Study
from experiments.training import layers, networks
from experiments.training.config import Settings
from experiments.training.data import Data, Split
from experiments.training.models import Model, mlp

FEW = 300
NAMES = ("validation", "test", "train", "validation_half", "test_half")
SIGMOID = {"activation": "sigmoid", "init": "constant", "init_scale": 0.1}
RELU = {"activation": "relu", "init": "he", "init_scale": 1.0}
# The networks, and where their grids and budgets start; six seeds decided nothing about ReLU.
KINDS: dict[str, dict[str, Any]] = {
    "sigmoid": {**SIGMOID, "widths": (100,) * 3, "steps": 3200, "learning_rates": (0.3, 1.0, 3.0, 10.0)},
    "relu": {**RELU, "widths": (100,) * 3, "steps": 600, "seeds": 24},
    "deep": {**SIGMOID, "seeds": 6, "widths": (64,) * 20, "steps": 600, "learning_rates": (0.1, 0.3, 1.0, 3.0)},
    "few": {**RELU, "widths": (64,) * 8, "steps": 400},
}
ALSO = ("relu",)


def measure(study: Study, given: Settings) -> dict[str, Any]:
    """Measure test and training accuracies `[seeds, rates]` of both arms in each network."""
    found: dict[str, Any] = {}
    for data, here in (("digits", study), ("mnist", on(study, mnist))):
        for kind in KINDS if data == "digits" else ALSO:
            name = kind if data == "digits" else f"{kind}_{data}"
            if study.smoke and found:  # the first stands for the rest
                found[name] = found["sigmoid"]
                continue
            s = study.settings(given, **KINDS[kind])
            change = few if kind == "few" else lambda data: data
            arms, make = ("none", "batch"), partial(_model, here)
            run = search(here, f"accuracy-{name}", s, arms, make, asked={"kind": kind}, change=change)
            found[name] = kept(run, arms, NAMES)
    return found


def few(data: Data) -> Data:
    """Return the data with few images to learn from."""
    return data._replace(train=Split(*(v[:FEW] for v in data.train)))


def _model(study: Study, s: Settings, arm: str) -> Model:
    layer, kernel = layers.of(s, arm), networks.weights(s)
    if len(s.widths) > 3:
        return stack(layer, len(s.widths), s.widths[0], kernel, study.pixels)
    return mlp([layer] * len(s.widths), s.widths, kernel, study.pixels)
