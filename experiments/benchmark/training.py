"""Training steps of whole networks; of ResNet-50 the memory and the time.

A GPU tells the most memory that a process has ever held there, so each network is measured in a process of its own:

    python -m experiments.benchmark.training LAYER
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmark.clock import Call, interleaved, quartiles
from experiments.benchmark.networks import NORMS, ResNet
from experiments.benchmark.sizes import OURS, RESNET_50


class Problem(NamedTuple):
    """The trained network: `stages` of blocks, on `batch` square images of `size` pixels in `dtype`."""

    stages: tuple[int, ...]
    batch: int
    size: int
    dtype: str


ON_GPU = Problem(RESNET_50, 128, 224, "bfloat16")
ON_CPU = Problem(RESNET_50, 8, 64, "float32")


class Step(NamedTuple):
    """A compiled training step.

    Attributes:
        start: makes what the first step takes.
        run: takes what `start` made, or `run` returned, and may overwrite it.
        trace, compile: seconds.
        temporary_bytes, argument_bytes: as the compiler says.
    """

    start: Callable[[], Any]
    run: Callable[[Any], Any]
    trace: float
    compile: float
    temporary_bytes: int
    argument_bytes: int


def compile_step(module: nn.Module, batch: int, size: int, dtype: str, classes: int) -> Step:
    """Compile a step of SGD with momentum on cross-entropy, of a classifier of square images."""
    optimizer = optax.sgd(0.1, momentum=0.9)
    images = jnp.ones((batch, size, size, 3), jnp.dtype(dtype))
    labels = jnp.arange(batch) % classes

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
    began = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=0).lower(shapes, images, labels)
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    analysis: Any = compiled.memory_analysis()
    rng = np.random.default_rng(0)

    def some() -> Any:
        # Time and memory do not depend on the values; compiling the initializers would take as long as the rest.
        return jax.tree.map(lambda v: jnp.asarray(0.05 * rng.standard_normal(v.shape), v.dtype), shapes)

    found = (traced - began, done - traced, analysis.temp_size_in_bytes, analysis.argument_size_in_bytes)
    return Step(some, lambda carry: compiled(carry, images, labels), *found)


def training_step(norm: str, problem: Problem) -> Step:
    """Compile the training step of a problem."""
    module = ResNet(NORMS[norm], problem.stages)
    return compile_step(module, problem.batch, problem.size, problem.dtype, classes=1000)


def call(step: Step) -> Call:
    """Return one step after the other, for the clock."""
    carry = [step.start()]

    def run():
        carry[0] = step.run(carry[0])
        return carry[0]

    return Call(run, jax.block_until_ready, jax.default_backend() != "cpu")


def compile_rows(
    measure: str, name: str, trace: np.ndarray, compile_: np.ndarray, labels: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield a row for each part of the seconds to compile."""
    for part, values in (("trace", trace), ("compile", compile_), ("trace + compile", trace + compile_)):
        found = quartiles(values)
        yield {"measure": measure, "contender": name, "part": part, **labels, "value": found["median"], **found}


def step_rows(measure: str, steps: dict[str, Step], rounds: int, labels: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a row for the seconds of each contender's step, taken by turns."""
    sampled = interleaved({name: call(step) for name, step in steps.items()}, rounds)
    for name, own in sampled.items():
        row = {"measure": measure, "contender": name, **labels, **quartiles(own)}
        yield row | {"value": row["median"], "ours_to_theirs": quartiles(sampled[OURS] / own)}


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
