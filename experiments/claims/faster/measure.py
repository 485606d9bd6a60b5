"""Claim 3: steps to a target, at the same and at the best learning rate, and the cost of a step."""

from typing import Any

import numpy as np

from experiments.claims._lib.intervals import first_step
from experiments.claims._lib.study import Study, chosen
from experiments.training import layers, networks
from experiments.training.config import Settings
from experiments.training.models import mlp
from experiments.training.train import compile_arm

WARM, TIMED, AT_ONCE = 5, 40, 25  # calls before, calls measured, steps in a call


def measure(study: Study, given: Settings) -> dict[str, Any]:
    """Measure the steps to the best validation accuracy that each seed reaches without a norm, in three networks."""
    kinds = {
        "sigmoid": {"activation": "sigmoid", "init": "constant", "init_scale": 0.1},
        "small_weights": {"activation": "sigmoid", "init": "constant", "init_scale": 0.01},
        "relu_he": {"activation": "relu", "init": "he", "init_scale": 1.0},
    }
    found: dict[str, Any] = {"rates": list(study.settings(given).learning_rates)}
    for name, changes in kinds.items():
        # In a smoke run one network stands for all.
        own = "sigmoid" if study.smoke else name
        s = study.settings(given, **(kinds[own] if study.smoke else changes))
        found[name] = study.part(f"faster-{own}", {"settings": s}, lambda s=s: _compared(study, s))
    s = study.settings(given, learning_rates=(0.1,), seeds=1, log_every=AT_ONCE)
    found["cost"] = study.part("faster-cost", {"settings": s}, lambda: _cost(study, s))
    return found


def _model(study: Study, s: Settings, arm: str) -> Any:
    between = [layers.of(s, arm)] * len(s.widths)
    return mlp(between, s.widths, networks.weights(s), study.pixels)


def _compared(study: Study, s: Settings) -> dict[str, Any]:
    """Return for both arms the curves of validation accuracy, the chosen rates, and the steps to the target."""
    logs = {arm: study.fit(s, _model(study, s, arm), test=False).log for arm in ("none", "batch")}
    best = {arm: chosen(log) for arm, log in logs.items()}
    targets = logs["none"].val_accuracy.max(-1)  # of each rate of the plain network
    found: dict[str, Any] = {"steps": logs["none"].steps, "target": targets[:, best["none"]], "by_rate": {}}
    for arm, log in logs.items():
        steps = [[first_step(log.steps, curve, t) for curve in log.val_accuracy.swapaxes(0, 1)] for t in targets.T]
        # [seeds, rates of the plain network, rates]
        found["by_rate"][arm] = {"validation": log.val_accuracy[:, :, -1], "steps": np.moveaxis(np.array(steps), -1, 0)}
        for kind, rate in (("best", best[arm]), ("same", best["none"])):
            found[f"{arm}_{kind}"] = {
                "rate": s.learning_rates[rate],
                "steps_to_target": steps[best["none"]][rate],
                "val_accuracy": log.val_accuracy[:, rate],
            }
    return found


def _cost(study: Study, s: Settings) -> dict[str, Any]:
    """Return the seconds of a step of one network of each arm, measured in turns."""
    return study.clock(s, {arm: compile_arm(s, _model(study, s, arm)) for arm in ("none", "batch")}, WARM, TIMED)
