"""Other ways to evaluate a trained network: statistics recalibrated or adapted, or folded into the layers.

All in one pass, as `jaxbn.statistics.pool_batches` and `jaxbn.statistics.adapt` do it for a stream: with `momentum=0`
the states that a batch leaves are its moments.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

import jaxbn
from experiments.training import layers, networks
from experiments.training.config import Settings
from experiments.training.data import Data, Split
from experiments.training.shapes import Tree
from experiments.training.train import Arm, Carry, compile_arm

BATCHES = 3  # in which the training images are seen; they divide 1,149
SOURCE = 64  # examples that the source's statistics count for, where the target's are mixed in
NAMES = {
    "running": "running statistics",
    "recalibrated": "recalibrated",
    "shifted": "darker and noisy images",
    "adapted": "the same, adapted",
    "shrunk": f"the same, mixed with {SOURCE} of the source",
    "own": f"each image with {layers.OWN:.0%} of its own",
    "weighed": f"the same, each image with {layers.OWN:.0%} of its own",
    "folded": "folded into the layers, no norm left",
    "ill": "layers that the health report finds fault with",
    "cured": "layers after recalibration that it does",
}


def accuracies(settings: Settings, arm: Arm, carry: Carry, digits: Data) -> dict[str, list[float]]:
    """Return each seed's test accuracy, or a share of its layers, by evaluation; of runs at their only rate."""
    far = shifted(digits.test)
    train = digits.train.images.reshape(BATCHES, -1, digits.train.images.shape[-1])

    def moved(*given: Any) -> Carry:
        change = jax.jit(jax.vmap(jax.vmap(partial(_adapted, settings, *given))))
        return carry._replace(state=change(carry.params, carry.state))

    def tested(by: Arm, carry: Carry, split: Split) -> list[float]:
        return by.evaluate(carry, split)[1][:, 0].tolist()

    def weighing() -> Arm:
        return compile_arm(settings, networks.build(settings, "weighed"))

    def folded() -> Carry:
        params = jax.jit(jax.vmap(jax.vmap(_folded)))(carry.params, carry.state)
        return Carry(params, [None] * len(carry.state), None)

    ways: dict[str, Callable[[], list[float]]] = {
        "running": lambda: tested(arm, carry, digits.test),
        "recalibrated": lambda: tested(arm, moved(train, 0.0), digits.test),
        "shifted": lambda: tested(arm, carry, far),
        "adapted": lambda: tested(arm, moved(far.images[None], 0.0), far),
        "shrunk": lambda: tested(arm, moved(far.images[None], SOURCE), far),
        "own": lambda: tested(weighing(), carry, digits.test),
        "weighed": lambda: tested(weighing(), carry, far),
        "folded": lambda: tested(compile_arm(settings, networks.build(settings, "none")), folded(), digits.test),
        "ill": lambda: _ill(settings, carry, digits.train),
        "cured": lambda: _ill(settings, moved(train, 0.0), digits.train),
    }
    return {name: ways[name]() for name in settings.evaluations}


def shifted(split: Split) -> Split:
    """Return images of half the contrast, with noise, as no training has seen them."""
    noise = 0.3 * jax.random.normal(jax.random.key(0), split.images.shape)
    return split._replace(images=0.5 * jnp.asarray(split.images) + noise)


def _folded(params: Tree, state: Tree) -> Tree:
    """Return the parameters of a network without a norm that computes what this one does in evaluation."""
    *kernels, last = params["kernels"]
    pairs = [jaxbn.inference.fold(p, s, k) for p, s, k in zip(params["shifts"], state, kernels, strict=True)]
    return {"kernels": [k for k, _ in pairs] + [last], "shifts": [b for _, b in pairs], "last": params["last"]}


def _adapted(settings: Settings, batches: Any, source_weight: float | int, params: Tree, state: Tree) -> Tree:
    """Return the states of all layers, from the moments of `batches`."""
    model = networks.build(dataclasses.replace(settings, bn_momentum=0.0), "batch")

    def moments_of(images: Array) -> list[jaxbn.Moments]:
        _, new = model.apply(params, state, images, True, None)
        return [jaxbn.Moments(jnp.full_like(s.var, len(images)), s.mean, s.var, jnp.zeros_like(s.var)) for s in new]

    pooled = [jaxbn.pool(m) for m in jax.lax.map(moments_of, jnp.asarray(batches))]
    return [jaxbn.statistics.adapt(s, m, source_weight=source_weight) for s, m in zip(state, pooled, strict=True)]


def _ill(settings: Settings, carry: Carry, split: Split) -> list[float]:
    """Return the share of each seed's layers that the health report finds fault with, given the training images."""
    model = networks.build(settings, "batch")
    assert model.hidden is not None
    shares = []
    for seed in range(settings.seeds):
        params, state = jax.tree.map(lambda v, at=seed: v[at, 0], (carry.params, carry.state))
        seen = model.hidden(params, state, jnp.asarray(split.images), layers.Pass(train=False))
        reports = [
            jaxbn.diagnostics.health(p, s, entering)
            for p, s, (entering, _) in zip(params["shifts"], state, seen, strict=True)
        ]
        shares.append(sum(bool(r.problems) for (r,) in reports) / len(reports))
    return shares
