"""Claim 8: overfitting with and without batch norm, dropout and the noise of batch statistics, on few images."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import jaxbn
from experiments.claims._lib.search import WITH_HALVES, kept, search, widened
from experiments.claims._lib.splits import fewer, mnist, on
from experiments.claims._lib.study import Study
from experiments.training import layers, networks
from experiments.training.config import Settings
from experiments.training.layers import ACTIVATIONS, Layer, Pass
from experiments.training.models import Model, mlp, model
from experiments.training.shapes import Images, Logits, Tree
from experiments.training.train import Carry

ROWS, FEWER = 200, 24  # images to learn from, and seeds on MNIST
# The norm and the rate of dropout: after each layer without a norm, after the last one with it.
ARMS = {
    "none": ("none", 0.0),
    "none_0.2": ("none", 0.2),
    "none_0.5": ("none", 0.5),
    "batch": ("batch", 0.0),
    "batch_0.2": ("batch", 0.2),
    "batch_0.5": ("batch", 0.5),
    "ghost_8": ("ghost", 0.0),
}
few = partial(fewer, ROWS)
ALSO = ("none", "batch", "batch_0.2")  # on MNIST


def measure(study: Study, given: Settings) -> dict[str, Any]:
    """Measure accuracies `[seeds, rates]` of each arm on two sets of images."""
    found: dict[str, Any] = {}
    for data, here, arms, seeds in (
        ("digits", study, tuple(ARMS), given.seeds),
        ("mnist", on(study, mnist), ALSO, FEWER),
    ):
        if study.smoke and found:  # the first stands for the second
            found[data] = found["digits"]
            continue
        s = study.settings(given, seeds=seeds)
        trained = ("none",) if study.smoke else arms
        run = search(here, f"regularizes-{data}", s, trained, partial(_model, here), asked={"rows": ROWS}, change=few)
        found[data] = kept(run | {arm: run[arm if arm in trained else "none"] for arm in arms}, arms, WITH_HALVES)
    # The noise is taken out: each step has the statistics of all images that there are to learn from.
    digits = found["digits"]
    s = dataclasses.replace(study.settings(given), learning_rates=tuple(digits["grid"]), steps=digits["steps"])
    images = np.stack([few(study.on(k).data).train.images for k in range(s.seeds)])
    start, asked = partial(_with_images, images), {"rows": ROWS}
    run = widened(
        study, "regularizes-digits", s, ("whole",), partial(_model, study), asked=asked, change=few, start=start
    )
    return found | {"still": kept(run, ("whole",), WITH_HALVES)}


def dropout(layer: Layer, rate: float) -> Layer:
    """`layer`, then dropout."""

    def apply(params: Tree, state: Tree, x: Array, run: Pass) -> tuple[Array, Tree]:
        y, state = layer.apply(params, state, x, run)
        if run.train and rate:
            assert run.key is not None
            y = jnp.where(jax.random.bernoulli(run.key, 1 - rate, y.shape), y / (1 - rate), 0.0)
        return y, state

    return Layer(layer.init, apply)


def whole(front: int, options: dict[str, Any], make: Any, rows: int, inputs: int) -> Model:
    """Return a network whose batch statistics in training are those of all images in its state, under present weights.

    The examples of the batch go through it before these images, and enter no statistic: the gradient is that of
    their loss alone, and the statistics have no noise from the drawing of the batch.

    Args:
        front: examples in a batch.
        options: of batch norm.
        make: from a layer, the network.
        rows: how many images there are.
        inputs: values of an image.
    """
    trained, evaluated = make(leave_out(front, **options)), make(layers.batch_norm(**options))

    def init(key: Array) -> tuple[Tree, Tree]:
        params, state = evaluated.init(key)
        return params, (state, jnp.zeros((rows, inputs)))

    def forward(params: Tree, state: Tree, x: Images, run: Pass) -> tuple[Logits, Tree]:
        own, images = state
        if not run.train:
            return evaluated.apply(params, own, x, *run)[0], state
        logits, own = trained.apply(params, own, jnp.concatenate([jnp.asarray(x), images]), *run)
        return logits[:front], (own, images)

    return model(init, forward)


def leave_out(front: int, **options: Any) -> Layer:
    """Batch norm by the statistics of all rows but the first `front`, which are normalized with the rest."""

    def apply(params: Tree, state: Tree, x: Array, run: Pass) -> tuple[Array, Tree]:
        counted = (jnp.arange(x.shape[0]) >= front)[:, None]
        return jaxbn.bn_apply(params, state, x, run.train, mask=counted, axis_name=run.axis_name, **options)

    return Layer(jaxbn.bn_init, apply)


def _with_images(images: np.ndarray, carry: Carry) -> Carry:
    """Put `images [seeds, rows, values]` where `whole` looks for them."""
    own, there = carry.state
    return carry._replace(state=(own, jnp.broadcast_to(jnp.asarray(images)[:, None], there.shape)))


def _model(study: Study, s: Settings, arm: str) -> Model:
    options: dict[str, Any] = {"momentum": s.bn_momentum, "activation": ACTIVATIONS[s.activation]}

    def make(*between: Layer) -> Model:
        return mlp(between * (2 // len(between)), s.widths, networks.weights(s), study.data.pixels)

    if arm == "whole":
        return whole(s.batch_size, options, make, ROWS, study.data.pixels)
    norm, rate = ARMS[arm]
    plain = layers.plain(options["activation"])
    batch = layers.batch_norm(**options, ghost_batches=s.batch_size // 8 if norm == "ghost" else 1)
    return make(dropout(plain, rate)) if norm == "none" else make(batch, dropout(batch, rate))
