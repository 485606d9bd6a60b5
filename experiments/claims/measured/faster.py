"""Claim 3: steps to a target, at the same and at the best learning rate, and the cost of a step."""

import time
from typing import Any

import jax
import numpy as np

from experiments.claims.intervals import first_step
from experiments.claims.study import Study, chosen
from experiments.training import layers, networks
from experiments.training.config import Settings
from experiments.training.data import Split
from experiments.training.models import mlp
from experiments.training.train import compile_arm

WARM, TIMED, AT_ONCE = 5, 40, 25  # calls before, calls measured, steps in a call


def measure(study: Study, given: Settings) -> dict[str, Any]:
    """Steps to the best validation accuracy that each seed reaches without a norm, in three networks."""
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
    """Of both arms: the curves of validation accuracy, the chosen rate, and the steps to the target."""
    logs = {arm: study.fit(s, _model(study, s, arm), test=False).log for arm in ("none", "batch")}
    best = {arm: chosen(log) for arm, log in logs.items()}
    target = logs["none"].val_accuracy[:, best["none"]].max(-1)
    found: dict[str, Any] = {"steps": logs["none"].steps, "target": target}
    for arm, log in logs.items():
        for kind, rate in (("best", best[arm]), ("same", best["none"])):
            curve = log.val_accuracy[:, rate]
            found[f"{arm}_{kind}"] = {
                "rate": s.learning_rates[rate],
                "steps_to_target": first_step(log.steps, curve, target),
                "val_accuracy": curve,
            }
    return found


def _cost(study: Study, s: Settings) -> dict[str, Any]:
    """Seconds a step of one network of each arm, measured in turns."""
    # One image to validate by: evaluation is no part of a step.
    data = study.data._replace(validation=Split(*(v[:1] for v in study.data.validation)))
    arms = {arm: compile_arm(s, _model(study, s, arm)) for arm in ("none", "batch")}
    at = {arm: compiled.start() for arm, compiled in arms.items()}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    warm, timed = (1, 3) if study.smoke else (WARM, TIMED)
    for call in range(warm + timed):
        for arm, compiled in arms.items():
            began = time.perf_counter()
            at[arm] = jax.block_until_ready(compiled.advance(at[arm], np.asarray(0, np.int32), data))[0]
            if call >= warm:
                seconds[arm].append((time.perf_counter() - began) / s.log_every)
        study.tick()
    return seconds
