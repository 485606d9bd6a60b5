"""Time for JAX to trace, and for XLA to compile, the training step of a deep network of small layers."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark.networks import NORMS, Deep


def seconds(layers: int, rounds: int) -> dict[str, dict[str, np.ndarray]]:
    """Seconds to trace and to compile `layers` layers with each norm, by turns in each round, nothing cached."""
    found = {name: {part: np.zeros(rounds) for part in ("trace", "compile")} for name in NORMS}
    x = jnp.ones((32, 16))
    variables = {name: jax.eval_shape(Deep(norm, layers).init, jax.random.key(0), x) for name, norm in NORMS.items()}
    for i in range(-1, rounds):  # the first is for what is loaded only once, and does not count
        for name in list(NORMS) if i % 2 else reversed(NORMS):
            jax.clear_caches()
            step = jax.jit(jax.value_and_grad(_loss, argnums=1, has_aux=True), static_argnums=0)
            own = variables[name]
            began = time.perf_counter()
            lowered = step.lower(Deep(NORMS[name], layers), own["params"], own["batch_stats"], x)
            traced = time.perf_counter()
            lowered.compile()
            compiled = time.perf_counter()
            if i >= 0:
                found[name]["trace"][i], found[name]["compile"][i] = traced - began, compiled - traced
    return found


def _loss(module: Deep, params: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    y, new = module.apply({"params": params, "batch_stats": state}, x, mutable=["batch_stats"])
    return jnp.mean(jnp.square(y)), new
