"""ResNet-20's training step on small images: its time, its memory, and the time to compile it.

A layer measured alone says little about a network, in which the compiler fuses it with its neighbours. So the whole
step is compiled in one process with ours, with flax's default layer and with flax's stable one, and timed by turns.

    python -m experiments.benchmark.whole_networks
"""

import json
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmark.clock import Call, interleaved, quartiles
from experiments.benchmark.networks import NORMS, Norm
from experiments.benchmark.sizes import OURS

Row = dict[str, Any]


class Problem(NamedTuple):
    """The network's `stages`, each with a first width of `width`, on `batch` square images of `size` pixels."""

    stages: tuple[int, ...] = (3, 3, 3)
    width: int = 16
    batch: int = 128
    size: int = 32
    dtype: str = "float32"


RESNET_20 = Problem()
SMALLEST = Problem((1,), 2, 4, 8)


def apply_stable(x: jax.Array, residual: jax.Array | None, relu: bool) -> jax.Array:
    """Apply flax's layer with its two-pass variance, and what follows it."""
    y = nn.BatchNorm(use_running_average=False, dtype=x.dtype, use_fast_variance=False)(x)
    y = y if residual is None else y + residual
    return nn.relu(y) if relu else y


CONTENDERS: dict[str, Norm] = {**NORMS, "flax, stable": apply_stable}


class ResNet(nn.Module):
    """A residual network for small images, of blocks of two convolutions (He et al. 2016, section 4.2)."""

    norm: Norm
    problem: Problem

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the logits `[batch, 10]`, float32, in training."""
        conv = partial(nn.Conv, use_bias=False, dtype=x.dtype)
        x = self.norm(conv(self.problem.width, (3, 3))(x), None, True)
        for i, blocks in enumerate(self.problem.stages):
            width = self.problem.width * 2**i
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                y = self.norm(conv(width, (3, 3), stride)(x), None, True)
                y = conv(width, (3, 3))(y)
                skip = x if x.shape == y.shape else self.norm(conv(width, (1, 1), stride)(x), None, False)
                x = self.norm(y, skip, True)
        return nn.Dense(10)(jnp.mean(x.astype(jnp.float32), (1, 2)))


class Step(NamedTuple):
    """A compiled training step, `run(start) -> start`, which may overwrite its argument; the cost of making it."""

    run: Any
    start: Any
    trace: float
    compile: float
    peak_bytes: int


def rows(problem: Problem = RESNET_20, rounds: int = 15, compilations: int = 3) -> Iterator[Row]:
    """Yield a row for each measure and contender.

    Measures are "step time, ResNet-20" (seconds; "ours_to_theirs" is the ratio within each round), "peak, ResNet-20"
    (bytes of arguments and temporary arrays, as the compiler says) and "compile time, ResNet-20" (seconds; `part` is
    trace, compile, or both together).
    """
    labels = {"problem": problem._asdict() | {"stages": list(problem.stages)}}
    made: dict[str, list[Step]] = {name: [] for name in CONTENDERS}
    for i in range(compilations + 1):  # the first round loads what is loaded once, and does not count
        for name in list(CONTENDERS) if i % 2 else reversed(CONTENDERS):
            made[name].append(compile_step(CONTENDERS[name], problem))
    for name, steps in made.items():
        yield {"measure": "peak, ResNet-20", "contender": name, **labels, "value": steps[-1].peak_bytes}
        trace, compile_ = (np.array([getattr(step, part) for step in steps[1:]]) for part in ("trace", "compile"))
        for part, values in (("trace", trace), ("compile", compile_), ("trace + compile", trace + compile_)):
            found = quartiles(values)
            row = {"measure": "compile time, ResNet-20", "contender": name, "part": part, **labels}
            yield row | {"value": found["median"], **found}
    sampled = interleaved({name: _call(steps[-1]) for name, steps in made.items()}, rounds)
    for name, own in sampled.items():
        row = {"measure": "step time, ResNet-20", "contender": name, **labels, **quartiles(own.seconds)}
        yield row | {"value": row["median"], "ours_to_theirs": quartiles(sampled[OURS].seconds / own.seconds)}


def compile_step(norm: Norm, problem: Problem) -> Step:
    """Trace and compile a step of SGD with momentum on cross-entropy, with nothing cached."""
    jax.clear_caches()
    module, optimizer = ResNet(norm, problem), optax.sgd(0.1, momentum=0.9)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((problem.batch, problem.size, problem.size, 3)), problem.dtype)
    labels = jnp.arange(problem.batch) % 10

    def start():
        variables = module.init(jax.random.key(0), images)
        return variables["params"], variables["batch_stats"], optimizer.init(variables["params"])

    def step(params, state, moments, images, labels):
        def loss(params):
            logits, new = module.apply({"params": params, "batch_stats": state}, images, mutable=["batch_stats"])
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels)), new["batch_stats"]

        gradients, new = jax.grad(loss, has_aux=True)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), new, moments

    shapes = jax.eval_shape(start)
    began = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*shapes, images, labels)
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    analysis: Any = compiled.memory_analysis()
    peak = analysis.temp_size_in_bytes + analysis.argument_size_in_bytes
    # Time and memory do not depend on the values; compiling the initializers would take as long as the rest.
    values = jax.tree.map(lambda v: jnp.asarray(0.05 * rng.standard_normal(v.shape), v.dtype), shapes)
    return Step(lambda carry: compiled(*carry, images, labels), values, traced - began, done - traced, peak)


def _call(step: Step) -> Call:
    """Return one step after the other, for the clock."""
    carry = [step.start]

    def run():
        carry[0] = step.run(carry[0])
        return carry[0]

    return Call(run, jax.block_until_ready, jax.default_backend() != "cpu")


if __name__ == "__main__":
    for row in rows():
        print(json.dumps(row))
