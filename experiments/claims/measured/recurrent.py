"""Claim 12: LSTMs with norms where the literature has put them: accuracy, gradients through time, cost."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from experiments.claims.intervals import first_step
from experiments.claims.study import Study, chosen, tested
from experiments.training import networks
from experiments.training.config import Settings
from experiments.training.data import Split
from experiments.training.models import Model
from experiments.training.recurrent import Recurrence, lstm, outputs, pieces
from experiments.training.shapes import Images, Labels, Tree
from experiments.training.train import compile_arm, loss_of

TUNED = ("none", "batch")  # these get all rates; the first is that of the comparison of all arms
STEPS, NOISE, TARGET = 16, 0.1, 0.9  # pieces of an image, deviation of the first h, validation accuracy to reach
WARM, TIMED, AT_ONCE = 2, 15, 5  # calls before, calls measured, steps in a call
TIMED_ARMS = ("none", "batch", "layer")
ARMS = {
    "none": Recurrence("none"),
    "batch": Recurrence("batch", noise=NOISE),
    "scale_1": Recurrence("batch", scale=1.0, noise=NOISE),
    "shared": Recurrence("batch", shared=True, noise=NOISE),
    "input": Recurrence("input", scale=1.0),
    "layer": Recurrence("layer", scale=1.0),
}


def measure(study: Study, given: Settings) -> dict[str, Any]:
    """Curves, test accuracy and gradients through time of each arm, and seconds a step."""
    s = study.settings(given)
    one_rate = dataclasses.replace(s, learning_rates=s.learning_rates[:1])
    # A smoke run has one arm, which stands for all: to compile an LSTM takes longer than to train it.
    trained = TUNED[-1:] if study.smoke else tuple(ARMS)
    arms = {}
    for arm in trained:
        own = s if arm in TUNED else one_rate
        asked = {"settings": own, "arm": arm}
        arms[arm] = study.part(f"recurrent-{arm}", asked, lambda arm=arm, own=own: _trained(study, own, arm))
    timed = study.settings(given, seeds=1, log_every=AT_ONCE, learning_rates=given.learning_rates[:1])
    slow = tuple(arm for arm in TIMED_ARMS if arm in trained)
    cost = study.part("recurrent-cost", {"settings": timed, "arms": slow}, lambda: _cost(study, timed, slow))
    of = {arm: arm if arm in trained else trained[-1] for arm in ARMS}
    return {"arms": {arm: arms[of[arm]] for arm in ARMS}, "cost": {arm: cost[of[arm]] for arm in TIMED_ARMS}}


def order(pixels: int) -> np.ndarray:
    """The permutation of the pixels that all networks read them in."""
    return np.random.default_rng(0).permutation(pixels)


def clipped(rate: Any) -> optax.GradientTransformation:
    """Adam behind gradients whose norm is at most 1."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


def gradients(how: Recurrence, params: Tree, state: Tree, images: Images, labels: Labels, first: Array) -> Array:
    """The norm of the loss's gradient by the h that enters each step, `[steps]`; `first` is what the first one gets.

    Were it zero, batch norm and layer norm would divide by the root of epsilon alone, and the gradient would be theirs.
    """
    xs = pieces(images, STEPS, order(images.shape[1]))

    def loss(added: Array) -> Array:
        last = outputs(how, params, state, xs, added)[-1]
        return loss_of(last @ params["head"] + params["last"][None], jnp.asarray(labels))

    added = jnp.zeros((STEPS, *first.shape), first.dtype).at[0].set(first)
    return jnp.sqrt(jnp.sum(jax.grad(loss)(added) ** 2, (1, 2)))


def _model(study: Study, s: Settings, arm: str) -> Model:
    how = ARMS[arm]._replace(momentum=s.bn_momentum)
    return lstm(how, s.widths[0], STEPS, networks.weights(s), study.pixels, order(study.pixels))


def _trained(study: Study, s: Settings, arm: str) -> dict[str, Any]:
    """One arm from all seeds: curves, and gradients through time on the first training images, before and after.

    All at the first learning rate, but for what is `tuned`.
    """
    some = Split(*(v[: s.batch_size] for v in study.data.train))
    first = NOISE * jax.random.normal(jax.random.key(0), (s.batch_size, s.widths[0]))

    @jax.jit
    def through_time(params: Tree, state: Tree) -> Array:
        params, state = jax.tree.map(lambda v: v[:, 0], (params, state))
        return jax.vmap(lambda p, n: gradients(ARMS[arm], p, n, *some, first))(params, state)

    norms = {}

    def watch(step: int, carry: Any) -> None:
        if step in (0, s.steps):
            norms[step] = jax.device_get(through_time(carry.params, carry.state))

    done = study.fit(s, _model(study, s, arm), optimizer=clipped, watch=watch)
    curve = done.log.val_accuracy[:, 0]
    best = chosen(done.log)
    kept = [v for v in jax.tree.leaves(done.carry.state) if jnp.issubdtype(v.dtype, jnp.floating)]
    return {
        "steps": done.log.steps,
        "val_accuracy": curve,
        "train_loss": done.log.train_loss[:, 0, -1],
        "steps_to_target": first_step(done.log.steps, curve, TARGET),
        "test_accuracy": tested(done.log, 0),
        "gradients_before": norms[0],
        "gradients_after": norms[s.steps],
        "stored": sum(v[0, 0].size for v in kept),
        "tuned": {
            "rate": s.learning_rates[best],
            "steps_to_target": first_step(done.log.steps, done.log.val_accuracy[:, best], TARGET),
            "test_accuracy": tested(done.log, best),
        },
    }


def _cost(study: Study, s: Settings, names: tuple[str, ...]) -> dict[str, Any]:
    """Seconds a step of one network of each arm, measured in turns."""
    # One image to validate by: evaluation is no part of a step.
    data = study.data._replace(validation=Split(*(v[:1] for v in study.data.validation)))
    arms = {arm: compile_arm(s, _model(study, s, arm), clipped) for arm in names}
    # Time does not depend on values, and to compile the making of weights would take longer than all the rest.
    like = {arm: jax.eval_shape(compiled.start) for arm, compiled in arms.items()}
    at = jax.tree.map(lambda v: jnp.full(v.shape, 0.1 if jnp.issubdtype(v.dtype, jnp.floating) else 0, v.dtype), like)
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
