"""Claim 5: at which learning rates networks of several depths learn, stay finite, and how good they become."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from experiments.claims._lib.intervals import mean
from experiments.claims._lib.networks import stack
from experiments.claims._lib.search import DOUBLINGS, Results, results
from experiments.claims._lib.study import Study
from experiments.claims._lib.trained import Trained
from experiments.training import layers, networks
from experiments.training.config import Settings
from experiments.training.models import Model

WIDTH, ARMS, WIDENINGS = 64, ("none", "batch"), 4
HALVES, LEAST = ("train_half", "train"), 1e-6
LEARNED = 0.95  # a training accuracy that counts as learning


class Network(NamedTuple):
    """A network, and which rates it starts with; all for all networks would cost too much."""

    depth: int = 10
    rates: slice = slice(4, 14)
    batch_size: int | None = None


NETWORKS = {
    "depth_10": Network(),
    "depth_2": Network(2, slice(7, 15)),
    "depth_5": Network(5, slice(5, 15)),
    "depth_20": Network(20, slice(3, 10)),
    "small": Network(rates=slice(4, 12), batch_size=16),
}


def measure(study: Study, given: Settings) -> dict[str, Any]:
    """Measure for each network, arm, seed and rate whether the loss is finite, and the accuracies."""
    found = {}
    for name in study.few(tuple(NETWORKS)):
        network = NETWORKS[name]
        changes: dict[str, Any] = {"learning_rates": given.learning_rates[network.rates]}
        if network.batch_size:
            # As many examples as with the larger batches.
            steps = given.steps * given.batch_size // network.batch_size
            changes |= {"batch_size": network.batch_size, "steps": steps, "log_every": steps // 8}
        s = study.settings(given, **changes)
        for _ in range(DOUBLINGS + 1):
            found[name] = {"steps": s.steps} | widened(study, f"learning_rates-{name}", s, network)
            half, end = (np.log2(np.maximum(largest(found[name], "none", what), LEAST)) for what in HALVES)
            rests = abs(np.mean(half) - np.mean(end)) <= mean(end).high - np.mean(end)
            if study.smoke or (rests and np.all(end > np.log2(LEAST))):
                break
            s = dataclasses.replace(s, steps=2 * s.steps)  # until it makes little difference to the plain network
        if study.vary:
            s = study.varied(s)
            found[name] = {"steps": s.steps} | widened(study, f"learning_rates-{name}", s, network)
    return found


def widened(study: Study, name: str, s: Settings, network: Network) -> Results:
    """Train both arms, at twice the largest rate again while an arm learns there; results are `[seeds, rates]`."""
    found: Results = {"rates": [], **{arm: {} for arm in ARMS}}
    for _ in range(1 + WIDENINGS):
        for arm in ARMS:
            asked = {"settings": s, "arm": arm, "network": network}
            part = study.part(
                f"{name}-{arm}-{s.steps}-{s.learning_rates[0]:.3g}",
                asked,
                lambda arm=arm, s=s: results(study, s, lambda one: model(study, one, arm, network), read=finite),
            )
            old = found[arm] or {k: np.zeros((s.seeds, 0)) for k in part}
            found[arm] = {k: np.concatenate([old[k], np.asarray(v)], 1) for k, v in part.items()}
        found["rates"] += s.learning_rates
        if study.smoke or all(np.max(largest(found, arm)) < found["rates"][-1] for arm in ARMS):
            break
        s = dataclasses.replace(s, learning_rates=(2 * s.learning_rates[-1],))
    return found


def largest(found: Results, arm: str, what: str = "train") -> np.ndarray:
    """Return the largest rate at which each seed learns; 0 if there is none."""
    return np.max(np.where(np.asarray(found[arm][what]) >= LEARNED, found["rates"], 0.0), -1)


def model(study: Study, s: Settings, arm: str, network: Network) -> Model:
    """Return the stack of an arm."""
    return stack(layers.of(s, arm), network.depth, WIDTH, networks.weights(s), study.data.pixels)


def finite(done: Trained) -> Results:
    """Return whether the losses at the end are finite."""
    return {"finite": np.isfinite(done.log.train_loss[..., -1]) & np.isfinite(done.log.val_loss[..., -1])}
