"""Claim 12: LSTMs with norms where the literature has put them: accuracy, steps, cost."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.claims._lib.intervals import best
from experiments.claims._lib.search import Results, search
from experiments.claims._lib.splits import SIDE, mnist, on
from experiments.claims._lib.study import Study
from experiments.claims._lib.trained import Trained, to_target
from experiments.training import networks
from experiments.training.config import Settings
from experiments.training.data import Data, Split, japanese_vowels, stratified
from experiments.training.models import Model
from experiments.training.recurrent import Recurrence, lstm
from experiments.training.train import compile_arm

STEPS, NOISE = 16, 0.1  # pieces of a digit, deviation of the first h
TARGET = 0.95  # of the validation accuracy without a norm at its best rate: to be reached
WARM, TIMED, AT_ONCE = 2, 40, 5  # calls before, calls measured, steps in a call
TRAINED = ("none", "batch")
ARMS = {
    "none": Recurrence("none"),
    "batch": Recurrence("batch", noise=NOISE),
    "shared": Recurrence("batch", shared=True, noise=NOISE),
}
# Pieces of an example, the splits, None for the study's own images, and the steps.
TASKS: dict[str, tuple[int, Any, int]] = {
    "digits": (STEPS, None, 800),
    "mnist": (2 * SIDE, mnist, 600),
    "vowels": (29, lambda split: vowels(split), 300),
}


def measure(study: Study, given: Settings) -> dict[str, Any]:
    """Measure accuracies and steps on each task at each rate, and the seconds of a step."""
    found: dict[str, Any] = {"tasks": {}}
    for task, (pieces, split, steps) in TASKS.items():
        if study.smoke and found["tasks"]:  # the first stands for all: to compile an LSTM takes longer than to train it
            found["tasks"][task] = found["tasks"]["digits"]
            continue
        here, s = on(study, split) if split else study, study.settings(given, steps=steps)
        make = functools.partial(_model, here, pieces, task)
        run = search(here, f"recurrent-{task}", s, TRAINED, make, asked={"task": task}, optimizer=clipped, read=_curve)
        target = TARGET * float(np.max(np.mean(run["none"]["validation"], 0)))
        found["tasks"][task] = run | {arm: _shown(run[arm], target) for arm in TRAINED}
    s = study.settings(given)
    timed = dataclasses.replace(s, seeds=1, log_every=AT_ONCE, learning_rates=s.learning_rates[:1])
    arms = {arm: compile_arm(timed, _model(study, STEPS, "digits", timed, arm), clipped) for arm in TRAINED}
    found["cost"] = study.part("recurrent-cost", {"settings": timed}, lambda: study.clock(timed, arms, WARM, TIMED))
    return found | {"stored": {arm: _stored(study, s, arm) for arm in ("batch", "shared")}}


@functools.cache
def vowels(split: int) -> Data:
    """Divide the 640 sequences of JapaneseVowels again: 330 to learn from, 110 to choose by, 200 to test with."""
    sequences = japanese_vowels()
    x, y = (np.concatenate([part[i] for part in sequences[:3]]) for i in (0, 1))
    return stratified(Split(x, y), split, 110, 200)._replace(shape=sequences.shape, classes=9)


def order(pixels: int) -> np.ndarray:
    """Return the permutation in which all networks read the pixels."""
    return np.random.default_rng(0).permutation(pixels)


def clipped(rate: Any) -> optax.GradientTransformation:
    """Clip gradients to norm 1, then Adam."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


def _model(study: Study, steps: int, task: str, s: Settings, arm: str) -> Model:
    how, head = ARMS[arm]._replace(momentum=s.bn_momentum), networks.weights(s)
    if task == "vowels":
        return lstm(how, s.widths[0], steps, head, study.data.pixels, None, 9, ragged=True)
    return lstm(how, s.widths[0], steps, head, study.data.pixels, order(study.data.pixels))


def _curve(done: Trained) -> Results:
    return {"curve": done.log.val_accuracy, "at": np.broadcast_to(done.log.steps, done.log.val_accuracy.shape)}


def _shown(arm: Results, target: float) -> Results:
    """Return the results of an arm with its steps to the target and the score that chooses by them.

    Of the curves only those at the rate that is best by validation are kept.
    """
    curves, at = arm["curve"], arm["at"][0, 0]
    return arm | to_target(at, curves, target) | {"curve": curves[:, best(arm["validation"])], "at": at}


def _stored(study: Study, s: Settings, arm: str) -> int:
    """Count the numbers that are kept for evaluation."""
    state = jax.eval_shape(_model(study, STEPS, "digits", s, arm).init, jax.random.key(0))[1]
    return sum(v.size for v in jax.tree.leaves(state) if jnp.issubdtype(v.dtype, jnp.floating))
