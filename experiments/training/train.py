"""The training loop: every seed and learning rate of an arm at once, in compiled chunks of steps."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from experiments.training import models, parallel
from experiments.training.config import Settings
from experiments.training.data import Data, Split, batches
from experiments.training.shapes import Count, Indices, Labels, Logits, PerRun, Scalar, Tree

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "momentum": lambda learning_rate: optax.sgd(learning_rate, momentum=0.9),
    "adam": optax.adam,
}


class Carry(NamedTuple):
    """What training changes; every array has leading axes `[seeds, rates]`."""

    params: Any
    state: Any
    optimizer: Any


class Metrics(NamedTuple):
    """What a chunk of steps reports: the mean training loss over it, and validation after it."""

    train_loss: PerRun
    val_loss: PerRun
    val_accuracy: PerRun


class Arm(NamedTuple):
    """One arm, compiled: what is done to all its runs.

    Attributes:
        start: `() -> carry`.
        advance: `(carry, first_step, digits) -> (carry, metrics)`, by `log_every` steps.
        evaluate: `(carry, split) -> (loss, accuracy)` under running statistics, each `[seeds, rates]`.
    """

    start: Callable[[], Carry]
    advance: jax.stages.Wrapped
    evaluate: Callable[..., tuple[jax.Array, jax.Array]]


class Trained(NamedTuple):
    """Where an arm stands after its last chunk."""

    carry: Carry
    steps: int
    seconds: list[float]  # of each chunk; the first holds the compilation


def train(
    settings: Settings,
    arm: Arm,
    digits: Data,
    log: Callable[[int, Metrics, Carry], None],
    stopped: Callable[[], bool] = lambda: False,
    start: Carry | None = None,
) -> Trained:
    """Train all runs of an arm to the end, or until `stopped` between two chunks.

    Args:
        settings: of the run.
        arm: from `compile_arm`.
        digits: the data.
        log: called after each chunk with the number of steps done, the metrics, and where training stands.
        stopped: whether to end here.
        start: where to begin, in the place of what `arm.start` gives.

    Returns:
        The state of training. A run that diverges is trained to the end like the others: that is its result.
    """
    carry, step, seconds = start or arm.start(), 0, []
    while step < settings.steps and not stopped():
        began = time.perf_counter()
        carry, metrics = arm.advance(carry, jnp.asarray(step, jnp.int32), digits)
        metrics = jax.device_get(metrics)
        seconds.append(time.perf_counter() - began)
        step += settings.log_every
        log(step, metrics, carry)
    return Trained(carry, step, seconds)


def compile_arm(
    settings: Settings, model: models.Model, optimizer: Callable[[Any], optax.GradientTransformation] | None = None
) -> Arm:
    """The compiled parts of training `model`; compiled when first called.

    Args:
        settings: of the run. Of the network only `model` counts, which `models.build` makes of the settings.
        model: the network.
        optimizer: of a learning rate; that of the settings by default.
    """
    way, optimizer = parallel.way(settings), optimizer or OPTIMIZERS[settings.optimizer]
    shared, divided = P(), P(None, None, parallel.AXIS)
    specs = Carry(shared, shared if way.shared else divided, shared)
    placed = jax.tree.map(lambda s: NamedSharding(way.mesh, s), specs, is_leaf=lambda s: isinstance(s, P))
    here = NamedSharding(way.mesh, shared)
    seeds = np.arange(settings.seeds, dtype=np.int32)
    rates = np.asarray(settings.learning_rates, np.float32)

    def start() -> Carry:
        def one(seed, rate):
            params, state = model.init(jax.random.fold_in(jax.random.key(seed), 0))
            return Carry(params, parallel.replicated_state(way, state), optimizer(rate).init(params))

        return _over_runs(one, (0, None), (None, 0))(seeds, rates)

    def advance(carry: Carry, first: Count, digits: Data) -> tuple[Carry, Metrics]:
        def order(seed):
            sizes = {"steps": settings.log_every, "batch_size": settings.batch_size}
            return batches(seed, first, examples=len(digits.train.labels), **sizes)

        def keys(seed):
            own = jax.random.fold_in(jax.random.key(seed), 2)  # 0 makes the weights, 1 the order
            return jax.vmap(partial(jax.random.fold_in, own))(first + jnp.arange(settings.log_every, dtype=jnp.int32))

        def run(carry, rate, steps, split):
            return lax.scan(lambda c, now: _step(model, way, optimizer(rate), split, c, *now), carry, steps)

        # Each device gets its part of every batch by the sharding of the indices.
        runs = _over_runs(run, (0, None, 0, None), (0, 0, None, None))
        spread = way.spread(runs, (specs, shared, (divided, shared), shared), (specs, shared))
        carry, losses = spread(carry, rates, (jax.vmap(order)(seeds), jax.vmap(keys)(seeds)), digits.train)
        return carry, Metrics(jnp.mean(losses, axis=-1), *evaluate(carry, digits.validation))

    def evaluate(carry: Carry, split: Split) -> tuple[PerRun, PerRun]:
        images, labels = jax.tree.map(way.split, split)

        def one(params, state):
            logits, _ = model.apply(params, parallel.pooled_state(way, state), images, False, None)
            return loss_of(logits, labels), accuracy_of(logits, labels)

        return _over_runs(one, (0, 0), (0, 0))(carry.params, carry.state)

    return Arm(
        jax.jit(start, out_shardings=placed),
        jax.jit(advance, in_shardings=(placed, here, here), out_shardings=(placed, here)),
        jax.jit(evaluate, in_shardings=(placed, here), out_shardings=here),
    )


def _step(
    model: models.Model,
    way: parallel.Way,
    optimizer: optax.GradientTransformation,
    split: Split,
    carry: Carry,
    indices: Indices,
    key: Array,
) -> tuple[Carry, Scalar]:
    """One update of one run on the examples `indices`, and the loss over the whole batch before it."""
    images, labels = split.images[indices], split.labels[indices]

    def loss(params: Tree):
        logits, state = way.forward(partial(model.apply, key=key), params, carry.state, images)
        return way.mean(loss_of(logits, labels)), state

    (value, state), gradients = jax.value_and_grad(loss, has_aux=True)(carry.params)
    updates, moved = optimizer.update(gradients, carry.optimizer, carry.params)
    return Carry(optax.apply_updates(carry.params, updates), state, moved), value


def loss_of(outputs: Logits, labels: Labels) -> Scalar:
    """Mean cross-entropy; of real labels `[batch, outputs]` the mean squared distance."""
    if jnp.issubdtype(labels.dtype, jnp.floating):
        return jnp.mean(jnp.sum((outputs - labels) ** 2, -1))
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs, labels))


def accuracy_of(outputs: Logits, labels: Labels) -> Scalar:
    """The share of right classes; of real labels the share of their variance that is explained."""
    if jnp.issubdtype(labels.dtype, jnp.floating):
        return 1 - loss_of(outputs, labels) / jnp.mean(jnp.sum(jnp.asarray(labels) ** 2, -1))
    return jnp.mean((jnp.argmax(outputs, -1) == labels).astype(jnp.float32))


def _over_runs(
    f: Callable[..., Any], seeds: tuple[int | None, ...], rates: tuple[int | None, ...]
) -> Callable[..., Any]:
    """`f` for all seeds and learning rates at once; the arguments' axes for each. Axes `[seeds, rates]` come first."""
    return jax.vmap(jax.vmap(f, rates), seeds)
