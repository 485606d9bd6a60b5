"""Claim 4: test accuracy with and without batch norm, each arm at its best rate, in four networks on splits."""

from functools import partial
from typing import Any

from experiments.claims._lib.networks import stack
from experiments.claims._lib.search import WITH_HALVES, kept, search
from experiments.claims._lib.splits import fewer, mnist, on
from experiments.claims._lib.study import Study
from experiments.training import layers, networks
from experiments.training.config import Settings
from experiments.training.models import Model, mlp

FEW = 300
ARMS = ("none", "batch")
SIGMOID = {"activation": "sigmoid", "init": "constant", "init_scale": 0.1}
RELU = {"activation": "relu", "init": "he", "init_scale": 1.0}
# The networks, and where their grids and budgets start; six seeds decided nothing about ReLU.
KINDS: dict[str, dict[str, Any]] = {
    "sigmoid": {**SIGMOID, "widths": (100,) * 3, "steps": 3200, "learning_rates": (0.3, 1.0, 3.0, 10.0)},
    "relu": {**RELU, "widths": (100,) * 3, "steps": 600, "seeds": 24},
    "deep": {**SIGMOID, "seeds": 6, "widths": (64,) * 20, "steps": 600, "learning_rates": (0.1, 0.3, 1.0, 3.0)},
    "few": {**RELU, "widths": (64,) * 8, "steps": 400},
}
KINDS["relu_mnist"] = KINDS["relu"]


def measure(study: Study, given: Settings) -> dict[str, Any]:
    """Measure test and training accuracies `[seeds, rates]` of both arms in each network."""
    found: dict[str, Any] = {}
    for kind, changes in KINDS.items():
        if study.smoke and found:  # the first stands for the rest
            found[kind] = found["sigmoid"]
            continue
        here, s = on(study, mnist) if kind.endswith("mnist") else study, study.settings(given, **changes)
        change = partial(fewer, FEW) if kind == "few" else lambda data: data
        run = search(here, f"accuracy-{kind}", s, ARMS, partial(_model, here), asked={"kind": kind}, change=change)
        found[kind] = kept(run, ARMS, WITH_HALVES)
    return found


def _model(study: Study, s: Settings, arm: str) -> Model:
    layer, kernel = layers.of(s, arm), networks.weights(s)
    if len(s.widths) > 3:
        return stack(layer, len(s.widths), s.widths[0], kernel, study.data.pixels)
    return mlp([layer] * len(s.widths), s.widths, kernel, study.data.pixels)
