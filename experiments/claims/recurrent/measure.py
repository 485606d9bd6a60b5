"""Claim 12: LSTMs with norms where the literature has put them: accuracy, gradients through time, cost."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from experiments.claims._lib.intervals import first_step
from experiments.claims._lib.search import at_best, search
from experiments.claims._lib.study import Study, tested
from experiments.training import networks
from experiments.training.config import Settings
from experiments.training.data import Split
from experiments.training.models import Model
from experiments.training.recurrent import Recurrence, lstm, outputs, pieces
from experiments.training.shapes import Images, Labels, Tree
from experiments.training.train import compile_arm, loss_of

TUNED = ("none", "batch")  # these are tuned too; all are compared at the first rate
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
    """Measure curves, test accuracy and gradients through time of each arm, and the seconds of a step."""
    s = study.settings(given)
    one_rate = dataclasses.replace(s, learning_rates=s.learning_rates[:1])
    # A smoke run has one arm, which stands for all: to compile an LSTM takes longer than to train it.
    trained = TUNED[-1:] if study.smoke else tuple(ARMS)
    tuned, arms = TUNED[-1:] if study.smoke else TUNED, {}
    run = search(study, "recurrent-rate", s, tuned, partial(_model, study), asked={}, optimizer=clipped)
    for arm in trained:
        asked = {"settings": one_rate, "arm": arm}
        arms[arm] = study.part(f"recurrent-{arm}", asked, lambda arm=arm: _trained(study, one_rate, arm))
        if arm in tuned:
            rate = run["grid"][at_best(run[arm])[0]]
            own = dataclasses.replace(s, learning_rates=(rate,), steps=run["steps"])
            asked = {"settings": own, "arm": arm}
            best = study.part(f"recurrent-tuned-{arm}", asked, lambda arm=arm, own=own: _trained(study, own, arm))
            arms[arm]["tuned"] = {k: best[k] for k in ("steps_to_target", "test_accuracy")} | {"rate": rate}
    timed = study.settings(given, seeds=1, log_every=AT_ONCE, learning_rates=given.learning_rates[:1])
    slow = tuple(arm for arm in TIMED_ARMS if arm in trained)
    cost = study.part("recurrent-cost", {"settings": timed, "arms": slow}, lambda: _cost(study, timed, slow))
    of = {arm: arm if arm in trained else trained[-1] for arm in ARMS}
    found = {"grid": run["grid"], "steps": run["steps"], "moved": run["moved"]}
    return found | {"arms": {arm: arms[of[arm]] for arm in ARMS}, "cost": {arm: cost[of[arm]] for arm in TIMED_ARMS}}


def order(pixels: int) -> np.ndarray:
    """Return the permutation in which all networks read the pixels."""
    return np.random.default_rng(0).permutation(pixels)


def clipped(rate: Any) -> optax.GradientTransformation:
    """Clip gradients to norm 1, then Adam."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


def gradients(how: Recurrence, params: Tree, state: Tree, images: Images, labels: Labels, first: Array) -> Array:
    """Return the norm of the loss's gradient by the h that enters each step, `[steps]`; `first` enters the first.

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
    """Train one arm from all seeds: curves, and gradients through time on the first training images, before and after.

    All at the first learning rate.
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
    }


def _cost(study: Study, s: Settings, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the seconds of a step of one network of each arm, measured in turns."""
    return study.clock(s, {arm: compile_arm(s, _model(study, s, arm), clipped) for arm in names}, WARM, TIMED)
