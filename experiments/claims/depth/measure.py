"""Claim 7: gradients of deep stacks before training, and how deep a stack still learns."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims._lib.networks import stack
from experiments.claims._lib.search import at_best, search
from experiments.claims._lib.study import Study
from experiments.training import layers
from experiments.training.config import Settings
from experiments.training.layers import ACTIVATIONS, Layer, Pass
from experiments.training.models import Model, gaussian

WIDE, GAINS = 128, (0.1, 1.0, 2**0.5, 3.0)  # for ReLU the third is that of He et al. 2015
BATCHES = (8, 32, 64, 256)
TRAINED = (5, 10, 20, 30, 40, 60, 100)
ARMS: tuple[str, ...] = ("none", "batch", "residual")
FAILS = 2  # so many depths in a row at which no run learns end the series
LEARNS = 0.9


def linear(v: jax.Array) -> jax.Array:
    """No activation."""
    return v


def layer_of(norm: str, activation: str) -> Layer:
    """Return the activation with batch norm before it, or alone."""
    act = ACTIVATIONS.get(activation, linear)
    return layers.batch_norm(activation=act) if norm == "batch" else layers.plain(act)


def measure(study: Study, given: Settings) -> dict[str, Any]:
    """Norms of gradients in each layer before training, and training accuracy for each depth, of each seed."""
    seeds = study.seeds(given.seeds)
    found: dict[str, Any] = {"gains": GAINS, "gradients": {}, "growth": {}, "trained": {}}
    for depth in (30,) if study.smoke else (30, 50):
        for activation in study.few(("sigmoid", "tanh", "relu")):
            for norm in ("none", "batch"):
                asked = {"depth": depth, "activation": activation, "norm": norm, "seeds": seeds, "batch": 64}
                name = f"{activation}-{norm}-{depth}"
                found["gradients"][name] = study.part(f"depth-gradients-{name}", asked, partial(_of, study, **asked))
    for activation in ("relu", "linear"):
        for batch in study.few(BATCHES[:3]) if study.smoke else BATCHES:
            asked = {"depth": 30, "activation": activation, "norm": "batch", "seeds": seeds, "batch": batch}
            name = f"{activation}-{batch}"
            found["growth"][name] = study.part(f"depth-growth-{name}", asked, partial(_of, study, **asked))
    for activation in ("sigmoid", "relu"):
        if study.smoke and found["trained"]:  # the first stands for the second
            found["trained"] |= {name.replace("sigmoid", "relu"): part for name, part in found["trained"].items()}
            break
        s = study.settings(given, activation=activation)
        fails, arms = dict.fromkeys([*ARMS], 0), ARMS
        for depth in TRAINED[:1] if study.smoke else TRAINED:
            arms = tuple(arm for arm in arms if fails[arm] < FAILS)
            if not arms:
                break
            make = partial(_model, study, depth)
            run = search(study, f"depth-trained-{activation}-{depth}", s, arms, make, asked={"depth": depth})
            for arm in arms:
                best, train = at_best(run[arm], "train")
                made = {"rate": run["grid"][best], "grid": run["grid"], "steps": run["steps"], "moved": run["moved"]}
                made |= {"train_accuracy": train, "test_accuracy": at_best(run[arm])[1]}
                found["trained"].setdefault(f"{activation}-{arm}", {})[str(depth)] = made
                fails[arm] = 0 if np.max(train) >= LEARNS else fails[arm] + 1
    return found


def _of(study: Study, depth: int, activation: str, norm: str, seeds: int, batch: int) -> dict[str, Any]:
    """Return the logarithm of the norm of the gradient by what enters each layer's norm, `[seeds, gains, layers]`.

    From Gaussian inputs, as the theory has them: images are so alike that their small variance in the first layer would
    be counted as growth.
    """
    layer = layer_of(norm, activation)

    def one(seed: Any, gain: Any) -> jax.Array:
        keys = jax.random.split(jax.random.key(seed), 3)
        inputs = jax.random.normal(keys[0], (batch, WIDE))
        kernels = jax.random.normal(keys[1], (depth, WIDE, WIDE)) * WIDE**-0.5
        params, state = layer.init(WIDE)

        def loss(added: jax.Array) -> jax.Array:
            def step(x: jax.Array, now: Any) -> tuple[jax.Array, None]:
                kernel, more = now
                return layer.apply(params, state, gain * (x @ kernel) + more, Pass(train=True))[0], None

            out, _ = jax.lax.scan(step, inputs, (kernels, added))
            return jnp.sum(out * jax.random.normal(keys[2], out.shape))

        gradient = jax.grad(loss)(jnp.zeros((depth, batch, WIDE)))
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


def _model(study: Study, depth: int, s: Settings, arm: str) -> Model:
    layer = layer_of("none" if arm == "none" else "batch", s.activation)
    return stack(layer, depth, s.widths[0], gaussian(1.0, he=True), study.pixels, residual=arm == "residual")
