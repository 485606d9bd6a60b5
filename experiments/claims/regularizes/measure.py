"""Claim 8: overfitting with and without batch norm, dropout and the noise of batch statistics, on few images."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.claims._lib.networks import leave_out, whole
from experiments.claims._lib.search import widened
from experiments.claims._lib.study import Log, Study, chosen
from experiments.training import layers, networks
from experiments.training.config import Settings
from experiments.training.data import Data, Split
from experiments.training.layers import ACTIVATIONS, Layer, Pass
from experiments.training.models import Model, mlp
from experiments.training.shapes import Images, Tree
from experiments.training.train import Carry

ROWS, DRAWS = 200, 64  # images to learn from, and draws of dropout to measure variances with
UNITS = 64  # of each layer that are drawn in the figure
# Arms of one program: all that tells them apart is the rate of dropout, which is a part of the state.
FAMILIES = {
    "plain": (0.0, 0.2, 0.5),
    "batch": (0.0, 0.2, 0.5),
    "before": (0.2, 0.5),
    "whole": (0.0,),
    "ghost_8": (0.0,),
    "ghost_16": (0.0,),
}


def measure(study: Study, given: Settings) -> dict[str, Any]:
    """Measure accuracies of each arm at its best rate, and the variances before batch norm with and without dropout."""
    s = study.settings(given)
    images, labels = study.data.train
    data = study.data._replace(train=Split(images[:ROWS], labels[:ROWS]))
    families = ("batch",) if study.smoke else ("plain", "batch", "whole")
    run = widened(study, "regularizes-rate", s, families, partial(_plain_model, study, data), asked={}, data=data)
    s = dataclasses.replace(s, learning_rates=tuple(run["grid"]))
    found: dict[str, Any] = {"grid": run["grid"]}
    # A smoke run measures the three that differ most, and lets them stand for the rest.
    stand_in = {"plain": "batch", "ghost_8": "whole", "ghost_16": "whole"} if study.smoke else {}
    for family, drops in FAMILIES.items():
        if family in stand_in:
            continue
        asked = {"settings": s, "family": family, "drops": drops, "rows": ROWS, "draws": DRAWS}
        found[family] = study.part(f"regularizes-{family}", asked, partial(_trained, study, s, data, family, drops))
    return found | {family: found[other] for family, other in stand_in.items()}


def adjustable(layer: Layer, *, before: bool = False) -> Layer:
    """`layer` with dropout at the rate that stands in its state beside the layer's own."""

    def init(features: int) -> tuple[Tree, Tree]:
        params, state = layer.init(features)
        return params, (state, jnp.zeros(()))

    def dropped(x: Array, rate: Array, run: Pass) -> Array:
        if not run.train or run.key is None:
            return x
        return jnp.where(jax.random.bernoulli(run.key, 1 - rate, x.shape), x / (1 - rate), 0.0)

    def apply(params: Tree, state: Tree, x: Array, run: Pass) -> tuple[Array, Tree]:
        own, rate = state
        y, own = layer.apply(params, own, dropped(x, rate, run) if before else x, run)
        return y if before else dropped(y, rate, run), (own, rate)

    return Layer(init, apply)


def _model(study: Study, s: Settings, data: Data, family: str, momentum: float) -> Model:
    """Return the network of a family; `plain` drops after each layer, `batch` after the last, `before` before both."""
    options: dict[str, Any] = {"momentum": momentum, "activation": ACTIVATIONS[s.activation]}
    make = partial(mlp, widths=s.widths, kernel=networks.weights(s), inputs=study.pixels)
    norm = layers.batch_norm(**options)
    match family:
        case "plain":
            return make([adjustable(layers.of(s, "none"))] * 2)
        case "batch":
            return make([norm, adjustable(norm)])
        case "before":
            return make([adjustable(norm, before=True)] * 2)
        case "whole":
            return whole(
                make([norm] * 2),
                jnp.asarray(data.train.images),
                lambda front: leave_out(front, **options),
                lambda layer: make([layer] * 2),
            )
        case _:
            parts = s.batch_size // int(family.removeprefix("ghost_"))
            return make([layers.batch_norm(ghost_batches=parts, **options)] * 2)


def _plain_model(study: Study, data: Data, s: Settings, family: str) -> Model:
    return _model(study, s, data, family, s.bn_momentum)


def _trained(study: Study, s: Settings, data: Data, family: str, drops: tuple[float, ...]) -> dict[str, Any]:
    """All arms of a family at all rates in one training."""
    rates = s.learning_rates
    # A column for each pair of dropout and learning rate.
    wide = dataclasses.replace(s, learning_rates=rates * len(drops))
    column_drops = jnp.repeat(jnp.asarray(drops), len(rates))

    def start(carry: Carry) -> Carry:
        return carry._replace(state=_dropping(carry.state, column_drops))

    trained = study.fit(wide, _model(study, s, data, family, s.bn_momentum), data=data, start=start)
    accuracies = {
        "train": trained.arm.evaluate(trained.carry, data.train)[1],
        "test": trained.log.test_accuracy[:, :, -1],
    }
    if family in ("batch", "whole"):
        exact = _population(_model(study, s, data, family, 0.0), data.train.images)
        carry = trained.carry._replace(state=exact(trained.carry))
        accuracies["population"] = trained.arm.evaluate(carry, data.test)[1]
    found = {}
    for at, drop in enumerate(drops):
        columns = slice(at * len(rates), (at + 1) * len(rates))
        log = Log(trained.log.steps, *(curve[:, columns] for curve in trained.log[1:]))
        rate = int(chosen(log))
        found[f"{drop:g}"] = {
            "rate": rates[rate],
            "validation": log.val_accuracy[:, rate, -1],
            "test_by_rate": {f"{r:g}": log.test_accuracy[:, i, -1] for i, r in enumerate(rates)},
            **{name: np.asarray(v)[:, columns][:, rate] for name, v in accuracies.items()},
        }
        if family == "before":
            one = jax.tree.map(lambda v, c=columns.start + rate: v[:, c], trained.carry)
            found[f"{drop:g}"]["shift"] = _shifts(study, s, data, one)
    return found


def _dropping(state: Tree, drops: Array) -> Tree:
    """Put the rates of dropout `[columns]` where the layers of `adjustable` look for them."""

    def placed(layer: Any) -> Any:
        adjusted = type(layer) is tuple and len(layer) == 2
        return (layer[0], jnp.broadcast_to(drops[None], layer[1].shape)) if adjusted else layer

    return [placed(layer) for layer in state]


def _population(model: Model, images: Images) -> Callable[[Carry], Tree]:
    """Return the statistics of all images under the weights where training stands, of a `model` that keeps nothing."""

    def one(params: Tree, state: Tree) -> Tree:
        return model.apply(params, state, images, True, None)[1]

    over_runs = jax.jit(jax.vmap(jax.vmap(one)))
    return lambda carry: over_runs(carry.params, carry.state)


def _shifts(study: Study, s: Settings, data: Data, carry: Carry) -> dict[str, Any]:
    """Variance of what enters each batch norm in evaluation over that in training, and what the closed form says.

    Both on the training images, so that dropout is all that changes. Medians of units are `[seeds, layers]`; of the
    first seed some units are there one by one.
    """
    model = _model(study, s, data, "before", s.bn_momentum)
    kept = _model(study, s, data, "before", 0.0)
    hidden = model.hidden
    assert hidden is not None
    images = jnp.asarray(data.train.images)
    keys = jax.random.split(jax.random.key(0), DRAWS)

    def one(params: Tree, state: Tree) -> list[tuple[Array, Array]]:
        drawn = jax.lax.map(lambda key: kept.apply(params, state, images, True, None, key)[1], keys)
        ratios = []
        entered = hidden(params, state, images, Pass(False))
        for (entering, _), (own, _), (_, drop) in zip(entered, drawn, state, strict=True):
            in_training = jnp.mean(own.var + own.mean**2, 0) - jnp.mean(own.mean, 0) ** 2
            mean, var = jnp.mean(entering, 0), jnp.var(entering, 0)
            ratios.append((var / in_training, shift(mean, var, 1 - drop)))
        return ratios

    ratios = jax.device_get(jax.jit(jax.vmap(one))(carry.params, carry.state))
    return {
        "measured": np.stack([np.median(measured, -1) for measured, _ in ratios], -1),
        "over_law": np.stack([np.median(measured / law, -1) for measured, law in ratios], -1),
        "units": [[pair[0][:UNITS] for pair in layer] for layer in ratios],
    }


def shift(mean: Array, var: Array, keep: Array) -> Array:
    """Variance without dropout over that with inverted dropout (Li et al. 2019, section 3)."""
    return var / ((mean**2 + var) / keep - mean**2)
