"""Claim 9: batch norm before the activation, after it, and nowhere; and normalized inputs alone."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from scipy import stats
from sklearn.preprocessing import StandardScaler

from experiments.claims._lib.intervals import first_step
from experiments.claims._lib.search import Results, at_best, checked, search
from experiments.claims._lib.study import Study
from experiments.claims._lib.trained import Trained
from experiments.training import layers, networks
from experiments.training.config import Settings
from experiments.training.data import Data
from experiments.training.layers import Layer, Pass
from experiments.training.models import Model, mlp
from experiments.training.shapes import Tree
from experiments.training.train import loss_of

PLACES = ("before", "after", "none")
DRAWN = 32  # points of a curve that are kept for the figure, closer where it rises
LEARNED, SMOOTHED = 0.01, 6  # a training loss near its minimum of 0, the mean of so many chunks
# 1 / fan_in for units that saturate, 2 / fan_in for ReLU, which halves the power.
GAINS = {"sigmoid": math.sqrt(0.5), "tanh": math.sqrt(0.5), "relu": 1.0}
INPUTS = ("standard", "gaussian")


def measure(study: Study, given: Settings) -> dict[str, Any]:
    """Measure for each activation and place steps to the target and test accuracy, by seed and rate."""
    found: dict[str, Any] = {"target": given.target_accuracy}
    read = partial(_steps, given.target_accuracy)
    # A smoke run measures the last, and lets it stand for the rest.
    activations = tuple(GAINS)[-1 if study.smoke else 0 :]
    for activation in activations:
        s = study.settings(given, activation=activation, init_scale=GAINS[activation])
        run = search(study, f"placement-{activation}", s, PLACES, partial(_model, study), read=read)
        found[activation] = run | {place: _shown(run[place]) for place in PLACES}
    # As many steps as the networks have that they are compared with: the search doubled those of the config so often.
    doubled = len(found["relu"]["moved"]) - 1
    s = study.settings(given, activation="relu", init_scale=GAINS["relu"], steps=given.steps * 2**doubled)
    for name in INPUTS:
        make, asked, change = partial(_model, study), {"inputs": name}, partial(prepared, name)
        run = checked(study, f"placement-{name}", s, ("none",), make, asked=asked, change=change, read=read)
        found[name] = run | {"none": _shown(run["none"])}
    own = study.settings(given, activation="relu", seeds=2, learning_rates=(0.1,))
    found["bias_gradient"] = study.part(
        "placement-bias", {"settings": own}, lambda: {"largest": _bias_gradients(study, own)}
    )["largest"]
    return found | {name: found[activations[0]] for name in GAINS if name not in activations}


def prepared(name: str, data: Data) -> Data:
    """Return the images with mean 0 and variance 1 of each pixel, or also Gaussian values, by the training images."""
    parts = [np.asarray(part.images, np.float64) for part in data[:3]]
    if name == "gaussian":
        parts = [normal_scores(parts[0], images) for images in parts]
    scaler = StandardScaler().fit(parts[0])
    train, validation, test = (
        own._replace(images=np.asarray(scaler.transform(images), np.float32))
        for own, images in zip(data[:3], parts, strict=True)
    )
    return data._replace(train=train, validation=validation, test=test)


def normal_scores(train: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Map each pixel's values to those quantiles of a normal distribution that they are of the training images.

    Equal values share the quantile in their middle.
    """
    found = np.empty_like(images)
    for at, pixel in enumerate(train.T):
        values, counts = np.unique(pixel, return_counts=True)
        found[:, at] = np.interp(images[:, at], values, stats.norm.ppf((np.cumsum(counts) - counts / 2) / len(pixel)))
    return found


def both(first: Layer, second: Layer) -> Layer:
    """Chain one layer and then the other."""

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
    return mlp([layer] * len(s.widths), s.widths, networks.weights(s), study.data.pixels)


def _layer(s: Settings, place: str) -> Layer:
    """Make the layer; after the activation batch norm does not take the bias out, so there each unit has one."""
    if place == "after":
        return both(layers.of(s, "none"), layers.batch_norm(momentum=s.bn_momentum))
    return layers.of(s, "none" if place == "none" else "batch")


def _steps(target: float, done: Trained) -> Results:
    """Return the steps to the target and near the smallest loss, and points of the curve, `[seeds, rates, ...]`."""
    log = done.log
    before = np.pad(log.train_loss, ((0, 0), (0, 0), (SMOOTHED - 1, 0)), constant_values=np.inf)
    loss = np.lib.stride_tricks.sliding_window_view(before, SMOOTHED, -1).mean(-1)
    drawn = np.unique(np.round(np.geomspace(1, len(log.steps), DRAWN)).astype(int)) - 1

    return {
        "to_target": np.array(first_step(log.steps, log.val_accuracy, target)),
        "to_minimum": np.array(first_step(log.steps, -loss, -LEARNED)),
        "curve": log.val_accuracy[..., drawn],
        "at": np.broadcast_to(log.steps[drawn], (*log.val_accuracy.shape[:2], len(drawn))),
    }


def _shown(arm: Results) -> Results:
    """Return the results of an arm, with the curve at its best rate alone."""
    best, curve = at_best(arm, "curve")
    names = ("validation", "test", "train", "to_target", "to_minimum")
    return {n: arm[n] for n in names} | {"best": best, "curve": curve, "at": arm["at"][0, best]}


def _bias_gradients(study: Study, s: Settings) -> Array:
    """Return the largest |dL/db| of a bias before batch norm, of each seed, where training ended."""
    carry = study.fit(s, _model(study, s, "before"), test=False).carry
    model = _model(study, s, both(layers.plain(lambda x: x), layers.of(s, "batch")))
    images, labels = (jnp.asarray(part[: s.batch_size]) for part in study.data.train)

    def largest(params: Tree, state: Tree) -> Array:
        def loss(biases: list[Array]) -> Array:
            shifts = list(zip(biases, params["shifts"], strict=True))
            logits, _ = model.apply(params | {"shifts": shifts}, [(None, v) for v in state], images, True, None)
            return loss_of(logits, labels)

        gradients = jax.grad(loss)([jnp.zeros(n) for n in s.widths])
        return jnp.max(jnp.abs(jnp.concatenate(gradients)))

    return jax.jit(jax.vmap(jax.vmap(largest)))(carry.params, carry.state)[:, 0]
