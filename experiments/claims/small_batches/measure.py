"""Claim 11: the same training with norms over ever fewer images; the batch that the gradient is taken of stays."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

import jaxbn
from experiments.claims._lib.networks import pooled_cnn, residual_cnn
from experiments.claims._lib.search import WITH_HALVES, at_best, kept, search
from experiments.claims._lib.splits import mnist, on
from experiments.claims._lib.study import Study, stacked
from experiments.training import layers, networks
from experiments.training.config import Settings
from experiments.training.layers import ACTIVATIONS, Pass
from experiments.training.models import Model, mlp
from experiments.training.shapes import Tree
from experiments.training.train import accuracy_of

USUAL, PAIR = "batch_32", "batch_2"
SIZES = (USUAL, "batch_16", "batch_8", "batch_4", PAIR)  # those of Wu and He 2018
BLOCKS, DEPTH = 3, 4  # of the residual CNN of 8 layers, and of that without shortcuts
WARM = 0.2  # the share of training before batch renormalization is at its limits
# The images, the arms, and what differs from the config.
NETS: dict[str, Any] = {
    "mlp": ("digits", (*SIZES, "renorm_2"), {"seeds": 24}),
    "mlp_mnist": ("mnist", (USUAL, "batch_4", PAIR), {}),
    "cnn": ("digits", (*SIZES, "group"), {"widths": (16,)}),
    "residual": ("digits", (USUAL, "batch_4", PAIR, "group"), {"widths": (8,)}),
}


def measure(study: Study, given: Settings) -> dict[str, Any]:
    """Measure accuracies `[seeds, rates]` by network, norm and size, and by pooled statistics; and what is exact."""
    s = study.settings(given)
    found: dict[str, Any] = {"exact": study.part("small_batches-exact", {"settings": s}, lambda: _exact(study, s))}
    for net, (data, arms, changes) in NETS.items():
        here = on(study, mnist) if data == "mnist" else study
        s = study.settings(given, **changes)
        trained = (PAIR,) if study.smoke else arms
        run = search(here, f"small_batches-{net}", s, trained, partial(_model, here, net), asked={"net": net})
        best = dataclasses.replace(s, learning_rates=(run["grid"][at_best(run[PAIR])[0]],), steps=run["steps"])
        pooled = study.part(
            f"small_batches-pooled-{net}", {"settings": best, "net": net}, partial(_pooled, here, best, net)
        )
        run |= {arm: run[arm if arm in trained else PAIR] for arm in arms}
        found[net] = kept(run, arms, WITH_HALVES) | {"pooled": pooled}
    return found


def _model(study: Study, net: str, s: Settings, arm: str, momentum: float | None = None) -> Model:
    """Return the network with a norm over as many images as the name of the arm says."""
    if arm == "group":
        layer = layers.of(s, arm)
    else:
        full = max(2, int(WARM * s.steps))
        renorm = jaxbn.renorm_warmup(s.r_max, s.d_max, start=full // 4, r_end=full, d_end=full)
        norm, size = arm.split("_")
        layer = layers.batch_norm(
            momentum=s.bn_momentum if momentum is None else momentum,
            activation=ACTIVATIONS[s.activation],
            ghost_batches=s.batch_size // int(size),
            **({"renorm": renorm} if norm == "renorm" else {}),
        )
    if net == "cnn":
        return pooled_cnn(layer, DEPTH, s.widths[0], networks.weights(s), study.data.pixels)
    if net == "residual":
        return residual_cnn(layer, BLOCKS, s.widths[0], networks.weights(s), study.data.pixels)
    return mlp([layer] * len(s.widths), s.widths, networks.weights(s), study.data.pixels)


def _pooled(study: Study, s: Settings, net: str) -> dict[str, Any]:
    """Train over pairs at one rate; return the test accuracy after it, `[seeds]`, by running and by pooled statistics.

    The network with a momentum of 0 leaves the statistics of the last batch as its state.
    """
    splits = [study.on(seed).data for seed in range(s.seeds)]
    model, still = _model(study, net, s, PAIR), _model(study, net, s, PAIR, 0.0)
    done = study.fit(s, model, data=splits if study.split else study.data)
    images, test = stacked(splits).train.images, stacked(splits).test
    batches = images[:, : images.shape[1] // s.batch_size * s.batch_size].reshape(
        s.seeds, -1, s.batch_size, study.data.pixels
    )

    def one(params: Tree, state: Tree, train: Array, test: Any) -> Array:
        def is_state(node: Any) -> bool:
            return isinstance(node, jaxbn.BatchNormState)

        def moments(n: jaxbn.BatchNormState) -> jaxbn.Moments:
            return jaxbn.Moments(jnp.ones_like(n.var), n.mean, n.var, jnp.zeros_like(n.var))

        def moments_of(batch: Array) -> Tree:
            new = still.apply(params, state, batch, True, None)[1]
            return jax.tree.map(moments, new, is_leaf=is_state)

        seen = jax.lax.map(moments_of, train)

        def adapted(n: jaxbn.BatchNormState, m: jaxbn.Moments) -> jaxbn.BatchNormState:
            m = jaxbn.pool(m)
            return n._replace(mean=m.mean, var=m.var)

        found = jax.tree.map(adapted, state, seen, is_leaf=is_state)
        return accuracy_of(model.apply(params, found, test.images, False, None)[0], test.labels)

    only = jax.tree.map(lambda v: v[:, 0], (done.carry.params, done.carry.state))
    pooled = jax.jit(jax.vmap(one))(*only, jnp.asarray(batches), jax.tree.map(jnp.asarray, test))
    return {"running": done.log.test_accuracy[:, 0, -1], "pooled": pooled}


def _exact(study: Study, s: Settings) -> dict[str, Any]:
    """Return how much of a gradient passes the first norm of the MLP over 2 images before training, over that at 64."""
    images, width = jnp.asarray(study.data.train.images[: s.batch_size]), s.widths[0]

    def one(seed: Array) -> dict[str, Array]:
        keys = jax.random.split(jax.random.key(seed), 2)
        x = images @ networks.weights(s)(keys[0], (study.data.pixels, width))
        dy = jax.random.normal(keys[1], x.shape)
        few, many = (
            jax.vjp(lambda v, norm=norm: norm.apply(*norm.init(width), v, Pass(True))[0], x)[1](dy)[0]
            for norm in (layers.batch_norm(ghost_batches=s.batch_size // size) for size in (2, s.batch_size))
        )
        return {"median_gradient": jnp.median(jnp.abs(few)) / jnp.median(jnp.abs(many))}

    return jax.jit(jax.vmap(one))(jnp.arange(s.seeds))
