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

from experiments.training import feed, models, parallel
from experiments.training.config import Settings
from experiments.training.data import Data, Split
from experiments.training.feed import Feed
from experiments.training.shapes import Count, Labels, Logits, PerExample, PerRun, Scalar, Tree

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "momentum": lambda learning_rate: optax.sgd(learning_rate, momentum=0.9),
    "adam": optax.adam,
}


class Carry(NamedTuple):
    """The state of training; every array has leading axes `[seeds, rates]`."""

    params: Any
    state: Any
    optimizer: Any


class Metrics(NamedTuple):
    """The report of a chunk of steps: the mean training loss over it, and validation after it."""

    train_loss: PerRun
    val_loss: PerRun
    val_accuracy: PerRun


class Arm(NamedTuple):
    """One arm, compiled: what is done to all its runs.

    Attributes:
        start: `(first_seed=0) -> carry`, of the seeds from that one on.
        feed: `(first_step, data) -> feed`, the examples of a chunk of `log_every` steps.
        step: `(carry, first_step, feed, validation) -> (carry, metrics)`, by that chunk.
        evaluate: `(carry, split) -> (loss, accuracy)` under running statistics, each `[seeds, rates]`; arrays of the
            split may have an axis of seeds in front.
        shapes: `() -> carry`, of shapes, dtypes and shardings, without computing anything.
    """

    start: Callable[..., Carry]
    feed: Callable[[int, Data], Feed]
    step: jax.stages.Wrapped
    evaluate: Callable[..., tuple[jax.Array, jax.Array]]
    shapes: Callable[[], Carry]

    def advance(self, carry: Carry, first: Count, data: Data) -> tuple[Carry, Metrics]:
        """Read the chunk that begins with step `first`, and train on it."""
        return self.step(carry, np.int32(first), self.feed(int(first), data), data.validation)


class Trained(NamedTuple):
    """The state of an arm after its last chunk."""

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
    first: int = 0,
) -> Trained:
    """Train all runs of an arm to the end, or until `stopped` between two chunks.

    The next chunk is read while the devices work on the present one: the host holds two at most.

    Args:
        settings: of the run.
        arm: from `compile_arm`.
        digits: the data.
        log: called after each chunk with the number of steps done, the metrics, and where training stands.
        stopped: whether to end here.
        start: where to begin, instead of `arm.start()`.
        first: how many steps `start` has had.

    Returns:
        The state of training. A run that diverges is trained to the end like the others: that is its result.
    """
    carry, step, seconds = arm.start() if start is None else start, first, []
    chunk = arm.feed(step, digits) if step < settings.steps else None
    while chunk is not None and not stopped():
        began = time.perf_counter()
        carry, metrics = arm.step(carry, np.int32(step), chunk, digits.validation)
        step += settings.log_every
        chunk = arm.feed(step, digits) if step < settings.steps else None
        metrics = jax.device_get(metrics)
        seconds.append(time.perf_counter() - began)
        log(step, metrics, carry)
    return Trained(carry, step, seconds)


def compile_arm(
    settings: Settings,
    model: models.Model,
    optimizer: Callable[[Any], optax.GradientTransformation] | None = None,
    options: dict[str, Any] | None = None,
) -> Arm:
    """Build the compiled parts of training `model`; compiled when first called.

    Args:
        settings: of the run. Of the network only `model` counts, which `models.build` makes of the settings.
        model: the network.
        optimizer: of a learning rate; that of the settings by default.
        options: of the compiler.
    """
    way, optimizer = parallel.way(settings), optimizer or OPTIMIZERS[settings.optimizer]
    shared, divided = P(), P(None, None, way.axes)
    specs = Carry(shared, P(None, None, way.of_parts) if way.of_parts else shared, shared)
    placed = jax.tree.map(lambda s: NamedSharding(way.mesh, s), specs, is_leaf=lambda s: isinstance(s, P))
    here, spread_out = NamedSharding(way.mesh, shared), NamedSharding(way.mesh, divided)
    seeds = partial(jnp.arange, settings.seeds, dtype=jnp.int32)  # an array of very many would fill memory already here
    rates = np.asarray(settings.learning_rates, np.float32)

    def start(first_seed: Count | int = 0) -> Carry:
        def one(seed, rate):
            params, state = model.init(jax.random.fold_in(jax.random.key(seed), 0))
            return Carry(params, parallel.replicated_state(way, state), optimizer(rate).init(params))

        return _over_runs(one, (0, None), (None, 0))(seeds() + first_seed, rates)

    def step(carry: Carry, first: Count, chunk: Feed, validation: Split) -> tuple[Carry, Metrics]:
        def keys(seed):
            own = jax.random.fold_in(jax.random.key(seed), 2)  # 0 makes the weights, 1 the order
            return jax.vmap(partial(jax.random.fold_in, own))(first + jnp.arange(settings.log_every, dtype=jnp.int32))

        def run(carry, rate, chunk, keys):
            return lax.scan(lambda c, now: _step(model, way, optimizer(rate), c, *now), carry, (chunk, keys))

        runs = _over_runs(run, (0, None, 0, 0), (0, 0, None, None))
        spread = way.spread(runs, (specs, shared, divided, shared), (specs, shared))
        carry, losses = spread(carry, rates, chunk, jax.vmap(keys)(seeds()))
        return carry, Metrics(jnp.mean(losses, axis=-1), *evaluate(carry, validation))

    def evaluate(carry: Carry, split: Split) -> tuple[PerRun, PerRun]:
        def one(params, state, images, labels):
            # Where the devices do not divide the examples, copies of the first are added, and weigh nothing.
            n, more = len(labels), -len(labels) % way.mesh.size
            images, labels = (
                way.split(jnp.concatenate([v, v[:1].repeat(more, 0)]) if more else v) for v in (images, labels)
            )
            logits, _ = model.apply(params, parallel.pooled_state(way, state), images, False, None)
            if not more:
                return loss_of(logits, labels), accuracy_of(logits, labels)
            weight = way.split(jnp.asarray(np.arange(n + more) < n, jnp.float32))
            return tuple(jnp.sum(f(logits, labels) * weight) / n for f in (losses_of, hits_of))

        own = 0 if np.ndim(split.images) == 3 else None  # examples of each seed's own
        runs = _over_runs(one, (0, 0, own, own), (0, 0, None, None))
        return runs(carry.params, carry.state, *map(jnp.asarray, split))

    def within(f: Callable[..., Any]) -> Any:
        """Set an Explicit mesh around what is compiled for it."""
        if settings.way != "explicit":
            return f

        def inside(*args: Any) -> Any:
            with jax.set_mesh(way.mesh):
                return f(*args)

        return inside

    begin = jax.jit(start, out_shardings=placed, compiler_options=options)
    given = {"in_shardings": (placed, here, spread_out, here), "out_shardings": (placed, here)}
    return Arm(
        within(begin),
        lambda first, data: feed.make(settings, data.train, first, spread_out),
        within(jax.jit(step, **given, compiler_options=options)),
        within(jax.jit(evaluate, in_shardings=(placed, here), out_shardings=here, compiler_options=options)),
        within(begin.eval_shape),
    )


def _step(
    model: models.Model,
    way: parallel.Way,
    optimizer: optax.GradientTransformation,
    carry: Carry,
    now: Feed,
    key: Array,
) -> tuple[Carry, Scalar]:
    """Return one run after an update on the examples `now`, and the loss over the whole batch before it."""

    def loss(params: Tree):
        logits, state = way.forward(partial(model.apply, key=key), params, carry.state, now.images, now.mask)
        if now.mask is None:
            return way.mean(loss_of(logits, now.labels)), state
        counted = now.mask.astype(logits.dtype)
        # A padded entry may hold anything: its loss is replaced, not multiplied.
        total = jnp.sum(jnp.where(now.mask, losses_of(logits, now.labels), 0))
        return way.mean(total) / way.mean(jnp.sum(counted)), state

    (value, state), gradients = jax.value_and_grad(loss, has_aux=True)(carry.params)
    updates, moved = optimizer.update(way.gradients(gradients), carry.optimizer, carry.params)
    return Carry(optax.apply_updates(carry.params, updates), state, moved), value


def losses_of(outputs: Logits, labels: Labels) -> PerExample:
    """Return the cross-entropy of each example; of real labels `[batch, outputs]` the squared distance."""
    if jnp.issubdtype(labels.dtype, jnp.floating):
        return jnp.sum((outputs - labels) ** 2, -1)
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels)


def hits_of(outputs: Logits, labels: Labels) -> PerExample:
    """Return 1 for each example whose class is right, else 0."""
    return (jnp.argmax(outputs, -1) == labels).astype(jnp.float32)


def loss_of(outputs: Logits, labels: Labels) -> Scalar:
    """Return the mean loss of the examples."""
    return jnp.mean(losses_of(outputs, labels))


def accuracy_of(outputs: Logits, labels: Labels) -> Scalar:
    """Return the share of right classes; of real labels the share of their variance that is explained."""
    if jnp.issubdtype(labels.dtype, jnp.floating):
        return 1 - loss_of(outputs, labels) / jnp.mean(jnp.sum(jnp.asarray(labels) ** 2, -1))
    return jnp.mean(hits_of(outputs, labels))


def _over_runs(
    f: Callable[..., Any], seeds: tuple[int | None, ...], rates: tuple[int | None, ...]
) -> Callable[..., Any]:
    """Map `f` over seeds and learning rates, given the arguments' axes for each; axes `[seeds, rates]` come first."""
    return jax.vmap(jax.vmap(f, rates), seeds)
