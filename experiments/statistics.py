"""Other ways to evaluate a trained network: statistics recalibrated or adapted, or folded into the layers.

All in one pass, as `jaxbn.pool_batches` and `jaxbn.adapt` do it for a stream: with `momentum=0` the states that a batch
leaves are its moments.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

import jaxbn
from experiments import networks
from experiments.config import Settings
from experiments.data import Data, Split
from experiments.shapes import Tree
from experiments.train import Arm, Carry, compile_arm

BATCHES = 3  # in which the training images are seen; they divide 1,149
SOURCE = 64  # examples that the source's statistics count for, where the target's are mixed in
NAMES = {
    "running": "running statistics",
    "recalibrated": "recalibrated",
    "shifted": "darker and noisy images",
    "adapted": "the same, adapted",
    "shrunk": f"the same, mixed with {SOURCE} of the source",
    "folded": "folded into the layers, no norm left",
}


def accuracies(settings: Settings, arm: Arm, carry: Carry, digits: Data) -> dict[str, list[float]]:
    """Test accuracy of each seed by `NAMES`, of the runs in `carry` at their only learning rate."""
    far = shifted(digits.test)
    train = digits.train.images.reshape(BATCHES, -1, digits.train.images.shape[-1])
    cases: dict[str, tuple[Split, Callable[[Tree, Tree], Tree]]] = {
        "running": (digits.test, lambda params, state: state),
        "recalibrated": (digits.test, partial(_adapted, settings, train, 0.0)),
        "shifted": (far, lambda params, state: state),
        "adapted": (far, partial(_adapted, settings, far.images[None], 0.0)),
        "shrunk": (far, partial(_adapted, settings, far.images[None], SOURCE)),
    }
    found = {}
    for name in settings.evaluations:
        if name == "folded":
            plain = compile_arm(settings, networks.build(settings, "none"))
            changed = jax.jit(jax.vmap(jax.vmap(_folded)))
            params = changed(carry.params, carry.state)
            found[name] = plain.evaluate(Carry(params, [None] * len(carry.state), None), digits.test)[1][:, 0].tolist()
            continue
        split, change = cases[name]
        state = jax.jit(jax.vmap(jax.vmap(change)))(carry.params, carry.state)
        found[name] = arm.evaluate(carry._replace(state=state), split)[1][:, 0].tolist()
    return found


def shifted(split: Split) -> Split:
    """Half the contrast, and noise: images that no training has seen."""
    noise = 0.3 * jax.random.normal(jax.random.key(0), split.images.shape)
    return split._replace(images=0.5 * jnp.asarray(split.images) + noise)


def _folded(params: Tree, state: Tree) -> Tree:
    """Parameters of the network without a norm that computes what this one does in evaluation."""
    *kernels, last = params["kernels"]
    pairs = [jaxbn.fold(p, s, k) for p, s, k in zip(params["shifts"], state, kernels, strict=True)]
    return {"kernels": [k for k, _ in pairs] + [last], "shifts": [b for _, b in pairs], "last": params["last"]}


def _adapted(settings: Settings, batches: Any, source_weight: float | int, params: Tree, state: Tree) -> Tree:
    """The states of all layers, from what they get when `batches` pass."""
    model = networks.build(dataclasses.replace(settings, bn_momentum=0.0), "batch")

    def moments_of(images: Array) -> list[jaxbn.Moments]:
        _, new = model.apply(params, state, images, True, None)
        return [jaxbn.Moments(jnp.full_like(s.var, len(images)), s.mean, s.var, jnp.zeros_like(s.var)) for s in new]

    pooled = [jaxbn.pool(m) for m in jax.lax.map(moments_of, jnp.asarray(batches))]
    return [jaxbn.adapt(s, m, source_weight=source_weight) for s, m in zip(state, pooled, strict=True)]
