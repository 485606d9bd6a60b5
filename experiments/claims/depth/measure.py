"""Claim 7: gradients of deep stacks before training, and what stacks and residual CNNs learn at each depth."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims._lib.networks import residual_cnn, stack
from experiments.claims._lib.search import WITH_HALVES, checked, kept, search
from experiments.claims._lib.study import Study
from experiments.training import layers
from experiments.training.config import Settings
from experiments.training.layers import ACTIVATIONS, Pass
from experiments.training.models import Model, gaussian

LAYERS, WIDE, GAINS = 30, 128, (0.1, 1.0, 2**0.5, 3.0)  # for ReLU the third is that of He et al. 2015
# Activations, norms and batches of the stacks before training.
BEFORE = (
    ("sigmoid", "none", 32),
    ("sigmoid", "batch", 32),
    ("relu", "none", 32),
    ("relu", "batch", 32),
    ("relu", "batch", 8),
    ("relu", "batch", 64),
)
SIGMOID = {"activation": "sigmoid", "learning_rates": (0.03, 0.1, 0.3, 1.0, 3.0)}
RELU = {"activation": "relu"}
CNN = {
    "activation": "relu",
    "widths": (8,),
    "seeds": 5,
    "steps": 300,
    "log_every": 50,
    "learning_rates": (0.003, 0.01, 0.03, 0.1, 0.3),
}
PLAIN = ("none", "batch")
INSTEAD = (*PLAIN, "group", "skip")
# What is trained: kinds and depths, arms, changes of the config. Five sigmoid layers without a norm stay at chance for
# thousands of steps before they learn, some seeds longer than others. The budget of the CNNs is not doubled: the plain
# ones, at the small rates that they bear, would take hours.
STACKS: dict[tuple[str, int], tuple[tuple[str, ...], dict[str, Any]]] = {
    ("sigmoid", 5): (PLAIN, SIGMOID | {"seeds": 18, "steps": 8000}),
    ("sigmoid", 20): (PLAIN, SIGMOID),
    ("relu", 20): (PLAIN, RELU | {"seeds": 12}),
    ("relu", 40): (PLAIN, RELU | {"steps": 2000, "learning_rates": (0.001, 0.003, 0.01, 0.03, 0.1)}),
    ("cnn", 20): (INSTEAD, CNN | {"seeds": 12}),
    ("cnn", 56): (INSTEAD, CNN),
}


def measure(study: Study, given: Settings) -> dict[str, Any]:
    """Measure norms of gradients in each layer before training, and accuracies for each depth, rate and seed."""
    found: dict[str, Any] = {"gains": GAINS, "gradients": {}, "trained": {}}
    for activation, norm, batch in BEFORE[:2] if study.smoke else BEFORE:
        asked = {"activation": activation, "norm": norm, "batch": batch, "seeds": study.settings(given).seeds}
        name = f"{activation}-{norm}-{batch}"
        found["gradients"][name] = study.part(f"depth-gradients-{name}", asked, partial(_of, **asked))
    if study.smoke:  # the one stands for the other
        found["gradients"] |= {k.replace("sigmoid", "relu"): v for k, v in found["gradients"].items()}
    for (kind, depth), (arms, changes) in STACKS.items():
        same = [k for k in found["trained"] if k.startswith(f"{kind}-")]
        if study.smoke and same:  # one depth stands for all
            found["trained"][f"{kind}-{depth}"] = found["trained"][same[0]]
            continue
        s, make = study.settings(given, **changes), partial(_model, study, kind, depth)
        run = (checked if kind == "cnn" else search)(
            study, f"depth-{kind}-{depth}", s, arms, make, asked={"depth": depth}
        )
        found["trained"][f"{kind}-{depth}"] = kept(run, arms, WITH_HALVES)
    return found


def _of(activation: str, norm: str, seeds: int, batch: int) -> dict[str, Any]:
    """Return the logarithm of the norm of the gradient by what enters each layer's norm, `[seeds, gains, layers]`.

    From Gaussian inputs, as the theory has them: images are so alike that their small variance in the first layer would
    be counted as growth.
    """
    act = ACTIVATIONS[activation]
    layer = layers.batch_norm(activation=act) if norm == "batch" else layers.plain(act)

    def one(seed: Any, gain: Any) -> jax.Array:
        keys = jax.random.split(jax.random.key(seed), 3)
        inputs = jax.random.normal(keys[0], (batch, WIDE))
        kernels = jax.random.normal(keys[1], (LAYERS, WIDE, WIDE)) * WIDE**-0.5
        params, state = layer.init(WIDE)

        def loss(added: jax.Array) -> jax.Array:
            def step(x: jax.Array, now: Any) -> tuple[jax.Array, None]:
                kernel, more = now
                return layer.apply(params, state, gain * (x @ kernel) + more, Pass(train=True))[0], None

            out, _ = jax.lax.scan(step, inputs, (kernels, added))
            return jnp.sum(out * jax.random.normal(keys[2], out.shape))

        gradient = jax.grad(loss)(jnp.zeros((LAYERS, batch, WIDE)))
        # Far below the least float32 where nothing is left: the norm of the scaled array, scaled back in logarithms.
        largest = jnp.max(jnp.abs(gradient), (1, 2))
        scaled = gradient / jnp.where(largest > 0, largest, 1)[:, None, None]
        return jnp.log(largest) + 0.5 * jnp.log(jnp.sum(scaled**2, (1, 2)))

    gains = jnp.asarray(GAINS, jnp.float32)
    each = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))
    # Sigmoid's vanish below float32's range within 50 layers.
    with jax.enable_x64(True):
        logs = each(jnp.arange(seeds), gains.astype(jnp.float64))
    return {"log_norm": np.asarray(logs)}


def _model(study: Study, kind: str, depth: int, s: Settings, arm: str) -> Model:
    width, kernel = s.widths[0], gaussian(1.0, he=True)
    if kind == "cnn":
        layer = layers.of(s, "none" if arm == "skip" else arm)
        return residual_cnn(layer, depth // 2 - 1, width, kernel, study.data.pixels, skip=arm == "skip")
    return stack(layers.of(s, arm), depth, width, kernel, study.data.pixels)
