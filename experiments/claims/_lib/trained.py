"""Finished trainings, and what is read from them."""

from typing import Any, NamedTuple

import numpy as np

from experiments.claims._lib.intervals import first_step
from experiments.training import train


class Log(NamedTuple):
    """The report of a training after every chunk, `[seeds, rates, logged]`."""

    steps: np.ndarray
    train_loss: np.ndarray
    val_loss: np.ndarray
    val_accuracy: np.ndarray
    test_accuracy: np.ndarray


class Trained(NamedTuple):
    """A finished training: its log, its end, and the compiled arm."""

    log: Log
    carry: train.Carry
    arm: train.Arm


def tested(log: Log, rate: int) -> np.ndarray:
    """Return the test accuracy of each seed at the step with the best validation accuracy, the first of several."""
    at = np.argmax(log.val_accuracy[:, rate], axis=-1)
    return np.take_along_axis(log.test_accuracy[:, rate], at[:, None], -1)[:, 0]


def to_target(steps: np.ndarray, curves: Any, target: float) -> dict[str, np.ndarray]:
    """Return the steps to the target of `curves [seeds, rates, logged]`, and the score that chooses by them."""
    reached = np.array(first_step(steps, curves, target))
    return {"steps": reached, "sooner": -np.where(np.isfinite(reached), reached, 2 * steps[-1])}
