"""Claim 9: batch norm before the activation, after it, and nowhere."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.claims._lib.intervals import first_step
from experiments.claims._lib.search import at_best, search
from experiments.claims._lib.study import Study, at_rate, tested
from experiments.training import layers, networks
from experiments.training.config import Settings
from experiments.training.layers import Layer, Pass
from experiments.training.models import Model, mlp
from experiments.training.shapes import Tree
from experiments.training.train import Carry, loss_of

PLACES = ("none", "before", "after")
DRAWN = 32  # points of a curve that are kept for the figure, closer where it rises
# 1 / fan_in for units that saturate, 2 / fan_in for ReLU, which halves the power.
GAINS = {"sigmoid": math.sqrt(0.5), "tanh": math.sqrt(0.5), "relu": 1.0}


def measure(study: Study, given: Settings) -> dict[str, Any]:
    """Measure for each activation and place steps to the target, test accuracy and the curve, at the best rate."""
    found: dict[str, Any] = {"target": given.target_accuracy}
    # A smoke run measures the first, and lets it stand for the rest.
    activations = tuple(GAINS)[: 1 if study.smoke else None]
    for activation in activations:
        s = study.settings(given, activation=activation, init_scale=GAINS[activation])
        run = search(study, f"placement-rate-{activation}", s, PLACES, partial(_model, study), asked={})
        found["grid"], found[activation] = run["grid"], {"steps": run["steps"], "moved": run["moved"]}
        for place in PLACES:
            rate = run["grid"][at_best(run[place])[0]]
            own = dataclasses.replace(s, learning_rates=(rate,), steps=run["steps"])
            asked = {"settings": own, "place": place}
            part = study.part(f"placement-{activation}-{place}", asked, partial(_trained, study, own, place))
            found[activation][place] = part
    return found | {name: found[activations[0]] for name in GAINS if name not in activations}


def both(first: Layer, second: Layer) -> Layer:
    """One layer and then the other."""

    def init(features: int) -> tuple[Tree, Tree]:
        (a, before), (b, after) = first.init(features), second.init(features)
        return (a, b), (before, after)

    def apply(params: Tree, state: Tree, x: Array, run: Pass) -> tuple[Array, Tree]:
        y, before = first.apply(params[0], state[0], x, run)
        y, after = second.apply(params[1], state[1], y, run)
        return y, (before, after)

    return Layer(init, apply)


def _model(study: Study, s: Settings, place: str | Layer) -> Model:
    layer = _layer(s, place) if isinstance(place, str) else place
    return mlp([layer] * len(s.widths), s.widths, networks.weights(s), study.pixels)


def _layer(s: Settings, place: str) -> Layer:
    """After the activation batch norm does not take the bias out, so there each unit has one."""
    if place == "after":
        return both(layers.of(s, "none"), layers.batch_norm(momentum=s.bn_momentum))
    return layers.of(s, "none" if place == "none" else "batch")


def _trained(study: Study, s: Settings, place: str) -> dict[str, Any]:
    """Return the numbers of one place at the rate of `s`."""
    trained = study.fit(s, _model(study, s, place))
    curve = trained.log.val_accuracy[:, 0]
    drawn = np.unique(np.round(np.geomspace(1, len(trained.log.steps), DRAWN)).astype(int)) - 1
    found = {
        "rate": s.learning_rates[0],
        "steps": trained.log.steps[drawn],
        "val_accuracy": curve[:, drawn],
        "steps_to_target": first_step(trained.log.steps, curve, s.target_accuracy),
        "test_accuracy": tested(trained.log, 0),
    }
    if place == "before":
        found["bias_gradient"] = _bias_gradients(study, s, at_rate(trained.carry, 0))
    return found


def _bias_gradients(study: Study, s: Settings, carry: Carry) -> Array:
    """Return the largest |dL/db| of a bias before batch norm, of each seed, where training ended."""
    model = _model(study, s, both(layers.plain(lambda x: x), layers.of(s, "batch")))
    images, labels = (jnp.asarray(part[: s.batch_size]) for part in study.data.train)

    def largest(params: Tree, state: Tree) -> Array:
        def loss(biases: list[Array]) -> Array:
            shifts = list(zip(biases, params["shifts"], strict=True))
            logits, _ = model.apply(params | {"shifts": shifts}, [(None, v) for v in state], images, True, None)
            return loss_of(logits, labels)

        gradients = jax.grad(loss)([jnp.zeros(n) for n in s.widths])
        return jnp.max(jnp.abs(jnp.concatenate(gradients)))

    over_runs = jax.vmap(jax.vmap(largest))
    return jax.jit(over_runs)(carry.params, carry.state)[:, 0]
