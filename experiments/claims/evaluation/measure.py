"""Claim 10: the same networks evaluated by batch statistics, by running averages and by pooled moments."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import jaxbn
from experiments.claims._lib.search import at_best, search
from experiments.claims._lib.study import Study
from experiments.training import layers, networks
from experiments.training.config import Settings
from experiments.training.data import Data, Split
from experiments.training.layers import ACTIVATIONS, Layer, Pass
from experiments.training.models import CLASSES, Model, mlp
from experiments.training.shapes import Tree
from experiments.training.train import Carry, accuracy_of, compile_arm, loss_of

CHECKED = (10, 30, 100, 300)
SMALLER = 32  # the batch size that is trained beside that of the settings
KEPT = (0.9, 0.99, 0.999)
AVERAGES = {f"{m:g}": m for m in KEPT} | {f"{m:g} debiased": jaxbn.zero_debiased(m) for m in KEPT}
SERVES = "0.99"  # the average that evaluation means where it is not said
MOST = 100  # batches of training images to pool, of larger data


def measure(study: Study, given: Settings) -> dict[str, Any]:
    """Measure accuracy and loss by every kind of statistics, and how far rows depend on their companions."""
    found = {}
    for name, size in (("large", given.batch_size), ("small", SMALLER)):
        # Compiling a second size is half of a smoke run.
        s = study.settings(given, batch_size=given.batch_size if study.smoke else size)
        run = search(study, f"evaluation-rate-{name}", s, ("batch",), partial(_model, study))
        rate = run["grid"][at_best(run["batch"])[0]]
        s = dataclasses.replace(s, learning_rates=(rate,), steps=run["steps"])
        part = study.part(f"evaluation-{name}", {"settings": s}, lambda s=s: _watched(study, s))
        found[name] = part | {"grid": run["grid"], "moved": run["moved"]}
    return found


def _model(study: Study, s: Settings, arm: str) -> Model:
    """Return the network whose norm is batch norm, or `averages`."""
    act = ACTIVATIONS[s.activation]
    layer = averages(AVERAGES, act) if arm == "averages" else layers.batch_norm(momentum=s.bn_momentum, activation=act)
    return mlp([layer] * len(s.widths), s.widths, networks.weights(s), study.data.pixels)


def averages(momenta: dict[str, Any], activation: Callable[[Array], Array]) -> Layer:
    """Make batch norm that keeps a running average by each of `momenta`, under its name; it evaluates by the first.

    One training then serves them all, and nothing else can differ.
    """

    def init(features: int) -> tuple[Tree, Tree]:
        params, state = jaxbn.bn_init(features)
        return params, {name: state for name in momenta}

    def apply(params: Tree, state: Tree, x: Array, run: Pass) -> tuple[Array, Tree]:
        options = {"axis_name": run.axis_name, "activation": activation}
        made = {n: jaxbn.bn_apply(params, state[n], x, run.train, momentum=m, **options) for n, m in momenta.items()}
        return next(iter(made.values()))[0], {name: new for name, (_, new) in made.items()}

    return Layer(init, apply)


def _watched(study: Study, s: Settings) -> dict[str, Any]:
    """Train each seed on its split; return accuracies at the steps `CHECKED`, and at the end those on other images."""
    seeds, s = range(s.seeds), dataclasses.replace(s, seeds=1)
    plain = _model(study, s, "batch")
    arm = compile_arm(s, _model(study, s, "averages"))
    look, other = _over_runs(partial(_seen, plain, s.batch_size)), _over_runs(partial(_on_others, plain, s.batch_size))
    rows, steps, companions = [], [step for step in CHECKED if step < s.steps] + [s.steps], {}
    for seed in seeds:
        data, seen = study.on(seed).data, []
        pooled = _batches(data.train.images, s.batch_size)[:MOST]

        def watch(step: int, carry: Carry, data: Data = data, pooled: Any = pooled, seen: Any = seen) -> None:
            if step in steps:
                seen.append(jax.device_get(look(carry.params, carry.state, pooled, data.test)))

        end = study.fit(s, arm, data=data, first_seed=seed, watch=watch, test=False).carry
        states = [state[SERVES] for state in end.state]
        seen = jax.tree.map(lambda *v: np.stack(v, -1)[0, 0], *seen)
        others = jax.device_get(other(end.params, states, *_other_images(data)))
        rows.append({"seen": seen, "shifted": jax.tree.map(lambda v: v[0, 0], others)})
        companions = companions or _companions(plain, s.batch_size, end.params, states, data.test)
    return jax.tree.map(lambda *v: np.stack(v), *rows) | {
        "rate": s.learning_rates[0],
        "batch_size": s.batch_size,
        "steps": steps,
        "companions": companions,
    }


def _seen(
    model: Model, size: int, params: Tree, states: Tree, pooled: Array, test: Split
) -> dict[str, dict[str, Array]]:
    """Return test loss and accuracy of one network by batch statistics, by each average, and by pooled statistics."""
    running = {name: [state[name] for state in states] for name in AVERAGES}
    start = running[SERVES]
    running["precise"] = precise(model, params, start, pooled)
    running["layerwise"] = layerwise(model, params, start, pooled)

    def evaluated(state: Tree) -> dict[str, Array]:
        return _judged(model.apply(params, state, test.images, False, None)[0], test)

    all_at_once = jax.vmap(evaluated)(jax.tree.map(lambda *v: jnp.stack(v), *running.values()))
    found = {name: jax.tree.map(lambda v, at=at: v[at], all_at_once) for at, name in enumerate(running)}
    return found | {"batch": _judged(_by_batches(model, size, params, start, test.images), test)}


def precise(model: Model, params: Tree, state: Tree, batches: Any) -> Tree:
    """Return the state of the pooled moments of `batches [n, size, pixels]`, each seen as in training."""

    def moments_of(images: Array) -> list[jaxbn.Moments]:
        assert model.hidden
        return [jaxbn.moments(x) for x, _ in model.hidden(params, state, images, Pass(train=True))]

    found = jax.lax.map(moments_of, jnp.asarray(batches))
    return [jaxbn.statistics.adapt(s, jaxbn.pool(m)) for s, m in zip(state, found, strict=True)]


def layerwise(model: Model, params: Tree, state: Tree, batches: Any) -> Tree:
    """Pool as `precise`, layer by layer: each layer's moments with those before it already in evaluation."""
    assert model.hidden
    images, state = jnp.reshape(jnp.asarray(batches), (-1, batches.shape[-1])), list(state)
    for at in range(len(state)):
        entering, _ = model.hidden(params, state, images, Pass(train=False))[at]
        state[at] = jaxbn.statistics.adapt(state[at], jaxbn.moments(entering))
    return state


def _judged(logits: Array, split: Split) -> dict[str, Array]:
    return {
        "loss": loss_of(logits, jnp.asarray(split.labels)),
        "accuracy": accuracy_of(logits, jnp.asarray(split.labels)),
    }


def _batches(images: Any, size: int) -> Any:
    """Return as many whole batches as there are, `[n, size, pixels]`."""
    whole = len(images) // size * size
    return images[:whole].reshape(-1, size, images.shape[-1])


def _by_batches(model: Model, size: int, params: Tree, state: Tree, images: Any) -> Array:
    """Return outputs by the statistics of each batch of `images`; the last one is filled up with the first images."""
    rows = np.arange(-(-len(images) // size) * size) % len(images)
    parts = jnp.asarray(images)[rows].reshape(-1, size, images.shape[-1])
    logits = jax.lax.map(lambda part: model.apply(params, state, part, True, None)[0], parts)
    return logits.reshape(-1, logits.shape[-1])[: len(images)]


def _other_images(data: Data) -> tuple[dict[str, Array], Array, Array]:
    """Return changed test images by name, their labels, and as many images of each class."""
    images, labels = jnp.asarray(data.test.images), np.asarray(data.test.labels)
    noise = 0.3 * jax.random.normal(jax.random.key(0), images.shape)
    cases = {"none": images, "contrast": 0.5 * images, "noise": images + noise, "both": 0.5 * images + noise}
    each = min(np.bincount(labels, minlength=CLASSES))
    rows = np.stack([np.flatnonzero(labels == c)[:each] for c in range(CLASSES)])
    return cases, jnp.asarray(labels), images[rows]


def _on_others(
    model: Model, size: int, params: Tree, state: Tree, cases: dict[str, Array], labels: Array, alone: Array
) -> dict[str, Any]:
    """Return test accuracy by the running average and by batch statistics, of each case and of single classes."""

    def of_class(images: Array, label: Array) -> list[Array]:
        logits = [model.apply(params, state, images, train, None)[0] for train in (False, True)]
        return [jnp.mean((jnp.argmax(y, -1) == label).astype(jnp.float32)) for y in logits]

    found = {}
    for name, images in cases.items():
        running = model.apply(params, state, images, False, None)[0]
        both = (running, _by_batches(model, size, params, state, images))
        found[name] = [accuracy_of(y, labels) for y in both]
    found["single"] = [v.mean() for v in jax.vmap(of_class)(alone, jnp.arange(CLASSES))]
    return {name: {"running": v[0], "batch": v[1]} for name, v in found.items()}


def _companions(model: Model, size: int, params: Tree, states: Tree, test: Split) -> dict[str, Any]:
    """Return by how much outputs change where the rest of the batch does, and statistics and gradients in either mode.

    Of outputs the largest change if half of the batch is replaced, or all but one row are gone; of running statistics
    the largest change by an evaluation, and the largest gradient of the training loss by them.
    """
    rows, labels = jnp.asarray(test.images[:size]), jnp.asarray(test.labels[:size])
    half = len(rows) // 2
    others = rows.at[half:].set(jax.random.uniform(jax.random.key(0), rows[half:].shape))
    # Called twice, so that both times it is the same compiled program.
    run = {train: _over_runs(lambda p, s, x, t=train: model.apply(p, s, x, t, None)) for train in (False, True)}
    before, after = ({t: f(params, states, x) for t, f in run.items()} for x in (rows, others))
    alone, _ = run[False](params, states, rows[:1])

    def loss(params: Tree, states: Tree, moments: Tree) -> Array:
        given = [state._replace(mean=mean, var=var) for state, (mean, var) in zip(states, moments, strict=True)]
        return loss_of(model.apply(params, given, rows, True, None)[0], labels)

    def gradient(params: Tree, states: Tree) -> Tree:
        return jax.grad(partial(loss, params, states))([(state.mean, state.var) for state in states])

    def largest(tree: Tree, other: Tree = None) -> Array:
        apart = tree if other is None else jax.tree.map(jnp.subtract, tree, other)
        return jnp.max(jnp.stack([jnp.max(jnp.abs(v)).astype(jnp.float32) for v in jax.tree.leaves(apart)]))

    return {
        "evaluation": largest(before[False][0][:, :, :half], after[False][0][:, :, :half]),
        "alone": largest(before[False][0][:, :, :1], alone) / largest(before[False][0]),
        "batch": largest(before[True][0][:, :, :half], after[True][0][:, :, :half]) / largest(before[True][0]),
        "state": largest(before[False][1], states),
        "gradient": largest(_over_runs(gradient)(params, states)),
    }


def _over_runs(f: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `f` of each run's parameters and states and the same further arguments."""

    @jax.jit
    def run(params: Tree, states: Tree, *shared: Any) -> Any:
        return jax.vmap(jax.vmap(lambda p, s: f(p, s, *shared)))(params, states)

    return run
