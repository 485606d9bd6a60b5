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
from experiments.claims._lib.search import widened
from experiments.claims._lib.study import Study, at_rate, chosen
from experiments.training import layers, networks
from experiments.training.config import Settings
from experiments.training.data import Data, Split
from experiments.training.layers import ACTIVATIONS, Layer, Pass
from experiments.training.models import CLASSES, Model, mlp
from experiments.training.shapes import Tree
from experiments.training.train import accuracy_of, loss_of

CHECKED = (10, 30, 100, 300, 1000)
SMALLER = 32  # the batch size that is trained beside that of the settings
KEPT = (0.9, 0.99, 0.999)
AVERAGES = {f"{m:g}": m for m in KEPT} | {f"{m:g} debiased": jaxbn.zero_debiased(m) for m in KEPT}
SERVES = "0.99"  # the average that evaluation means where it is not said
MOST = 100  # batches of training images to pool, of larger data


def measure(study: Study, given: Settings) -> dict[str, Any]:
    """Accuracy and loss of each seed by every kind of statistics, and how far rows depend on their companions."""
    found = {}
    for name, size in (("large", given.batch_size), ("small", SMALLER)):
        # Compiling a second size is half of a smoke run.
        s = study.settings(given, batch_size=given.batch_size if study.smoke else size)
        run = widened(study, f"evaluation-rate-{name}", s, ("batch",), partial(_model, study), asked={})
        s = dataclasses.replace(s, learning_rates=tuple(run["grid"]))
        found[name] = study.part(f"evaluation-{name}", {"settings": s}, lambda s=s: _watched(study, s))
        found["grid"] = run["grid"]
    return found


def _model(study: Study, s: Settings, arm: str) -> Model:
    """Return the network whose norm is batch norm, or `averages`."""
    act = ACTIVATIONS[s.activation]
    layer = averages(AVERAGES, act) if arm == "averages" else layers.batch_norm(momentum=s.bn_momentum, activation=act)
    return mlp([layer] * len(s.widths), s.widths, networks.weights(s), study.pixels)


def averages(momenta: dict[str, Any], activation: Callable[[Array], Array]) -> Layer:
    """Batch norm that keeps a running average by each of `momenta`, under its name; it evaluates by the first.

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
    """Train once; return accuracies at the steps `CHECKED`, and those of the finished networks on other images."""
    model, plain = (_model(study, s, arm) for arm in ("averages", "batch"))
    pooled, test = _batches(study.data.train.images, s.batch_size)[:MOST], study.data.test
    look = _over_runs(partial(_seen, plain, s.batch_size))
    seen = {}

    def watch(step: int, carry: Any) -> None:
        if step == s.steps or step in CHECKED:
            seen[step] = jax.device_get(look(carry.params, carry.state, pooled, test))

    trained = study.fit(s, model, watch=watch, test=False)
    rate = chosen(trained.log)
    at = at_rate(trained.carry, rate)
    states = [state[SERVES] for state in at.state]
    return {
        "rate": s.learning_rates[rate],
        "batch_size": s.batch_size,
        "steps": list(seen),
        "seen": {
            name: {
                part: np.stack([seen[step][name][part][:, rate] for step in seen], 1) for part in seen[s.steps][name]
            }
            for name in seen[s.steps]
        },
        "shifted": _other_images(plain, s.batch_size, at.params, states, study.data),
        "companions": _companions(plain, s.batch_size, at.params, states, test),
    }


def _seen(
    model: Model, size: int, params: Tree, states: Tree, pooled: Array, test: Split
) -> dict[str, dict[str, Array]]:
    """Test loss and accuracy of one network by batch statistics, by each average, and by pooled statistics."""
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
    """As `precise`, layer by layer: each layer's moments with those before it already in evaluation."""
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
    """As many whole batches as there are, `[n, size, pixels]`."""
    whole = len(images) // size * size
    return images[:whole].reshape(-1, size, images.shape[-1])


def _by_batches(model: Model, size: int, params: Tree, state: Tree, images: Any) -> Array:
    """Return outputs by the statistics of each batch of `images`; the last one is filled up with the first images."""
    rows = np.arange(-(-len(images) // size) * size) % len(images)
    parts = jnp.asarray(images)[rows].reshape(-1, size, images.shape[-1])
    logits = jax.lax.map(lambda part: model.apply(params, state, part, True, None)[0], parts)
    return logits.reshape(-1, logits.shape[-1])[: len(images)]


def _other_images(model: Model, size: int, params: Tree, states: Tree, data: Data) -> dict[str, Any]:
    """Test accuracy by the running average and by batch statistics: images changed, and batches of a single class."""
    images, labels = jnp.asarray(data.test.images), np.asarray(data.test.labels)
    noise = 0.3 * jax.random.normal(jax.random.key(0), images.shape)
    cases = {"none": images, "contrast": 0.5 * images, "noise": images + noise, "both": 0.5 * images + noise}
    each = min(np.bincount(labels, minlength=CLASSES))
    rows = np.stack([np.flatnonzero(labels == c)[:each] for c in range(CLASSES)])

    def accuracies(params: Tree, state: Tree, shown: Array, alone: Array) -> dict[str, Array]:
        def one(images: Array) -> list[Array]:
            running = model.apply(params, state, images, False, None)[0]
            return [accuracy_of(y, labels) for y in (running, _by_batches(model, size, params, state, images))]

        def of_class(images: Array, label: Array) -> list[Array]:
            logits = [model.apply(params, state, images, train, None)[0] for train in (False, True)]
            return [jnp.mean((jnp.argmax(y, -1) == label).astype(jnp.float32)) for y in logits]

        single = jax.vmap(of_class)(alone, jnp.arange(CLASSES))
        return {"changed": jnp.stack(jax.lax.map(one, shown), 1), "single": jnp.stack([v.mean() for v in single])}

    found = _over_runs(accuracies)(params, states, jnp.stack(list(cases.values())), images[rows])
    by_case = {name: found["changed"][:, 0, at] for at, name in enumerate(cases)} | {"single": found["single"][:, 0]}
    return {name: {"running": v[:, 0], "batch": v[:, 1]} for name, v in by_case.items()}


def _companions(model: Model, size: int, params: Tree, states: Tree, test: Split) -> dict[str, Any]:
    """Return the largest change of outputs if half of the batch is replaced, or all but one row are gone."""
    rows = jnp.asarray(test.images[:size])
    half = len(rows) // 2
    others = rows.at[half:].set(jax.random.uniform(jax.random.key(0), rows[half:].shape))
    # Called twice, so that both times it is the same compiled program.
    run = {
        train: _over_runs(lambda p, s, x, train=train: model.apply(p, s, x, train, None)[0]) for train in (False, True)
    }
    before, after = ({train: f(params, states, x) for train, f in run.items()} for x in (rows, others))
    alone = run[False](params, states, rows[:1])

    def change(a: Array, b: Array) -> Array:
        return jnp.max(jnp.abs(a - b), (1, 2, 3))

    largest = {train: jnp.max(jnp.abs(y), (1, 2, 3)) for train, y in before.items()}
    return {
        "evaluation": change(before[False][:, :, :half], after[False][:, :, :half]),
        "alone": change(before[False][:, :, :1], alone) / largest[False],
        "batch": change(before[True][:, :, :half], after[True][:, :, :half]) / largest[True],
    }


def _over_runs(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f` of each run's parameters and states and the same further arguments, compiled."""

    @jax.jit
    def run(params: Tree, states: Tree, *shared: Any) -> Any:
        return jax.vmap(jax.vmap(lambda p, s: f(p, s, *shared)))(params, states)

    return run
