"""ResNet-50's training step: its memory, and its time.

A GPU tells the most memory that a process has ever held there, so each network is measured in a process of its own:

    python -m experiments.benchmark.training LAYER
"""

import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmark.clock import Call
from experiments.benchmark.networks import NORMS, ResNet
from experiments.benchmark.sizes import RESNET_50


class Problem(NamedTuple):
    """The trained network: `stages` of blocks, on `batch` square images of `size` pixels in `dtype`."""

    stages: tuple[int, ...]
    batch: int
    size: int
    dtype: str


ON_GPU = Problem(RESNET_50, 128, 224, "bfloat16")
ON_CPU = Problem(RESNET_50, 8, 64, "float32")


class Step(NamedTuple):
    """A compiled training step: `run` takes what `start` made, or `run` returned, and may overwrite it."""

    start: Callable[[], Any]
    run: Callable[[Any], Any]
    temporary_bytes: int


def training_step(norm: str, problem: Problem) -> Step:
    """SGD with momentum on cross-entropy, compiled."""
    module, optimizer = ResNet(NORMS[norm], problem.stages), optax.sgd(0.1, momentum=0.9)
    images = jnp.ones((problem.batch, problem.size, problem.size, 3), jnp.dtype(problem.dtype))
    labels = jnp.arange(problem.batch) % 1000

    def start():
        variables = module.init(jax.random.key(0), images)
        return variables["params"], variables["batch_stats"], optimizer.init(variables["params"])

    def step(carry, images, labels):
        params, state, moments = carry

        def loss(params):
            logits, new = module.apply({"params": params, "batch_stats": state}, images, mutable=["batch_stats"])
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels)), new["batch_stats"]

        gradients, new = jax.grad(loss, has_aux=True)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), new, moments

    shapes = jax.eval_shape(start)
    compiled = jax.jit(step, donate_argnums=0).lower(shapes, images, labels).compile()
    analysis: Any = compiled.memory_analysis()
    rng = np.random.default_rng(0)

    def some() -> Any:
        # Time and memory do not depend on the values; compiling the initializers would take as long as the rest.
        return jax.tree.map(lambda v: jnp.asarray(0.05 * rng.standard_normal(v.shape), v.dtype), shapes)

    return Step(some, lambda carry: compiled(carry, images, labels), analysis.temp_size_in_bytes)


def call(step: Step) -> Call:
    """One step after the other, for the clock."""
    carry = [step.start()]

    def run():
        carry[0] = step.run(carry[0])
        return carry[0]

    return Call(run, jax.block_until_ready, jax.default_backend() != "cpu")


def peak_bytes(norm: str, problem: Problem) -> int | None:
    """Return the peak of this process's device memory after some steps of training; None if it is not known."""
    device = jax.devices()[0]
    if device.memory_stats() is None:
        return None
    step = call(training_step(norm, problem))
    for _ in range(3):
        step.wait(step.run())
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


if __name__ == "__main__":
    print(json.dumps(peak_bytes(sys.argv[1], ON_GPU)))
