"""Claim 5: at which learning rates networks of several depths learn, stay finite, and how good they become."""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from experiments.claims._lib.networks import stack
from experiments.claims._lib.study import Study
from experiments.training import layers, networks
from experiments.training.config import Settings

WIDTH, ARMS, DOUBLINGS = 64, ("none", "batch"), 3
LEARNED, SHARE = 0.95, 7 / 8  # training accuracy, and the share of seeds, that count as learning
HEAD, HEAD_RATE = ("head", "last"), 0.1  # the weights that no norm follows


class Network(NamedTuple):
    """A network and its rates; all rates for all networks would cost too much."""

    depth: int = 10
    rates: slice = slice(None)
    batch_size: int | None = None
    head_fixed: bool = False


NETWORKS = {
    "depth_10": Network(),
    "depth_2": Network(2, slice(4, 17)),
    "depth_5": Network(5, slice(2, 17)),
    "depth_20": Network(20, slice(0, 13)),
    "small": Network(rates=slice(2, 14), batch_size=16),
    "head_fixed": Network(rates=slice(2, 17), head_fixed=True),
}


def measure(study: Study, given: Settings) -> dict[str, Any]:
    """Measure for each network, arm, seed and rate whether the loss is finite, and the accuracies at the end."""
    found = {}
    for name in study.few(tuple(NETWORKS)):
        network = NETWORKS[name]
        changes: dict[str, Any] = {"learning_rates": given.learning_rates[network.rates]}
        if network.batch_size:
            # As many examples as with the larger batches.
            steps = given.steps * given.batch_size // network.batch_size
            changes |= {"batch_size": network.batch_size, "steps": steps, "log_every": steps // 4}
        s = study.settings(given, **changes)
        for _ in range(1 if study.smoke else DOUBLINGS + 1):
            asked = {"settings": s, "network": network}
            part = study.part(f"learning_rates-{name}-{s.steps}", asked, lambda s=s, n=network: _arms(study, s, n))
            found[name] = part | {"steps": s.steps}
            learned = np.mean(np.asarray(part["none"]["train_accuracy"]) >= LEARNED, 0)
            if np.max(learned) >= SHARE:
                break
            s = dataclasses.replace(s, steps=2 * s.steps)  # until the plain network learns at some rate
    return found


def _arms(study: Study, s: Settings, network: Network) -> dict[str, Any]:
    """Train both arms; results are `[seeds, rates]`."""
    found: dict[str, Any] = {"rates": s.learning_rates}
    for arm in ARMS:
        model = stack(layers.of(s, arm), network.depth, WIDTH, networks.weights(s), study.pixels)
        trained = study.fit(s, model, optimizer=head_fixed if network.head_fixed else None)
        log = trained.log
        best = np.argmax(log.val_accuracy, -1)[..., None]
        found[arm] = {
            "finite": np.isfinite(log.train_loss[..., -1]) & np.isfinite(log.val_loss[..., -1]),
            "train_accuracy": study.learned(trained),
            "val_accuracy": log.val_accuracy[..., -1],
            "test_accuracy": np.take_along_axis(log.test_accuracy, best, -1)[..., 0],
        }
    return found


def head_fixed(rate: Any) -> optax.GradientTransformation:
    """SGD at `rate`, but for the last layer, whose rate is always the same."""

    def update(gradients: Any, _: Any) -> Any:
        rates = {name: HEAD_RATE if name in HEAD else rate for name in gradients}
        return {name: jax.tree.map(lambda g, r=rates[name]: -r * g, own) for name, own in gradients.items()}

    return optax.stateless(update)
