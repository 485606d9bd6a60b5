"""Claim 3: steps to an accuracy at each learning rate, and the cost of a step."""

from functools import partial
from typing import Any

from experiments.claims._lib.search import Results, checked
from experiments.claims._lib.splits import mnist, on
from experiments.claims._lib.study import Study
from experiments.claims._lib.trained import Trained, to_target
from experiments.training import layers, networks
from experiments.training.config import Settings
from experiments.training.models import Model, mlp
from experiments.training.train import compile_arm

ARMS = ("none", "batch")
WARM, TIMED, AT_ONCE = 5, 40, 25  # calls before, calls measured, steps in a call
RELU: dict[str, Any] = {
    "activation": "relu",
    "init": "he",
    "init_scale": 1.0,
    "log_every": 5,
    "learning_rates": (0.03, 0.1, 0.3, 1.0, 3.0),
}
KINDS: dict[str, dict[str, Any]] = {
    "sigmoid_digits": {},
    "sigmoid_mnist": {},
    "relu_digits": RELU | {"steps": 200},
    "relu_mnist": RELU | {"steps": 400},
}


def measure(study: Study, given: Settings) -> dict[str, Any]:
    """Measure the steps to the target accuracy with and without batch norm, in two networks on two sets of images."""
    found: dict[str, Any] = {}
    for kind, changes in KINDS.items():
        if study.smoke and found:  # one network stands for all
            found[kind] = found["sigmoid_digits"]
            continue
        here, s = on(study, mnist) if kind.endswith("mnist") else study, study.settings(given, **changes)
        read, name = partial(_reached, s.target_accuracy), f"faster-{kind.replace('_', '-')}"
        found[kind] = checked(here, name, s, ARMS, partial(_model, here), read=read, by="sooner")
    s = study.settings(given, learning_rates=(0.1,), seeds=1, log_every=AT_ONCE)
    arms = {arm: compile_arm(s, _model(study, s, arm)) for arm in ARMS}
    found["cost"] = study.part("faster-cost", {"settings": s}, lambda: study.clock(s, arms, WARM, TIMED))
    return found


def _model(study: Study, s: Settings, arm: str) -> Model:
    return mlp([layers.of(s, arm)] * len(s.widths), s.widths, networks.weights(s), study.data.pixels)


def _reached(target: float, done: Trained) -> Results:
    return to_target(done.log.steps, done.log.val_accuracy, target)
