"""Training steps of whole networks: their time, their memory, and the time to compile them.

A layer measured alone says little about a network, in which the compiler fuses it with its neighbours. So whole steps
are compiled in one process with each norm, and timed by turns. A GPU tells the most memory that a process has ever held
there, so for this ResNet-50 is trained in a process of its own with each norm:

    python -m experiments.benchmark.training NORM
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmark.clock import Call, interleaved, quartiles
from experiments.benchmark.memory import temporary_bytes
from experiments.benchmark.networks import NORMS, Deep, ResNet
from experiments.benchmark.sizes import OURS, RESNET_50

Row = dict[str, Any]
PAIR = (OURS, "flax")


class Problem(NamedTuple):
    """A residual network (see `ResNet`), on `batch` square images of `size` pixels in `dtype`."""

    stages: tuple[int, ...]
    batch: int
    size: int
    dtype: str = "float32"
    width: int = 64
    small: bool = False


ON_GPU = Problem(RESNET_50, 128, 224, "bfloat16")
ON_CPU = Problem(RESNET_50, 8, 64)
RESNET_20 = Problem((3, 3, 3), 128, 32, width=16, small=True)
SMALLEST = Problem((1,), 4, 8, width=2, small=True)


class Compiled(NamedTuple):
    """A compiled program, and the seconds to trace and to compile it."""

    program: jax.stages.Compiled
    trace: float
    compile: float


def compile_timed(f: Any, *args: Any) -> Compiled:
    """Trace and compile a jitted function."""
    began = time.perf_counter()
    lowered = f.lower(*args)
    traced = time.perf_counter()
    program = lowered.compile()
    return Compiled(program, traced - began, time.perf_counter() - traced)


def compile_by_turns(programs: dict[str, Callable[[], Compiled]], rounds: int) -> dict[str, list[Compiled]]:
    """Compile each program in each round, nothing cached; what is loaded once is loaded before the rounds."""
    made: dict[str, list[Compiled]] = {name: [] for name in programs}
    for i in range(rounds + 1):
        for name in list(programs) if i % 2 else reversed(programs):
            jax.clear_caches()
            made[name].append(programs[name]())
    return {name: own[1:] for name, own in made.items()}


def compile_deep(norm: str, layers: int) -> Compiled:
    """Compile the training step of a deep network of small layers."""
    module, x = Deep(NORMS[norm], layers), jnp.ones((32, 16))

    def loss(params, state, x):
        y, new = module.apply({"params": params, "batch_stats": state}, x, mutable=["batch_stats"])
        return jnp.mean(jnp.square(y)), new

    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return compile_timed(step, variables["params"], variables["batch_stats"], x)


def compile_step(norm: str, problem: Problem) -> tuple[Compiled, Call]:
    """Compile a step of SGD with momentum on cross-entropy; return it, and its call for the clock."""
    module, optimizer = ResNet(NORMS[norm], problem.stages, problem.width, problem.small), optax.sgd(0.1, momentum=0.9)
    images = jnp.ones((problem.batch, problem.size, problem.size, 3), jnp.dtype(problem.dtype))
    labels = jnp.arange(problem.batch) % 10

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
    compiled = compile_timed(jax.jit(step, donate_argnums=0), shapes, images, labels)
    rng, carry = np.random.default_rng(0), []

    def run():
        if not carry:
            # Time and memory do not depend on the values; compiling the initializers would take as long as the rest.
            carry.append(jax.tree.map(lambda v: jnp.asarray(0.05 * rng.standard_normal(v.shape), v.dtype), shapes))
        carry[0] = compiled.program(carry[0], images, labels)
        return carry[0]

    return compiled, Call(run, jax.block_until_ready, jax.default_backend() != "cpu")


def compile_rows(measure: str, compiled: dict[str, list[Compiled]], labels: Row) -> Iterator[Row]:
    """Yield a row for each contender and part of the seconds to compile."""
    for name, own in compiled.items():
        trace, compile_ = (np.array([getattr(c, part) for c in own]) for part in ("trace", "compile"))
        for part, values in (("trace", trace), ("compile", compile_), ("trace + compile", trace + compile_)):
            found = quartiles(values)
            yield {"measure": measure, "contender": name, "part": part, **labels, "value": found["median"], **found}


def step_rows(measure: str, calls: dict[str, Call], rounds: int, labels: Row) -> Iterator[Row]:
    """Yield a row for the seconds of each contender's step, taken by turns; the ratio is that within each round."""
    sampled = interleaved(calls, rounds)
    for name, own in sampled.items():
        row = {"measure": measure, "contender": name, **labels, **quartiles(own)}
        yield row | {"value": row["median"], "ours_to_theirs": quartiles(sampled[OURS] / own)}


def deep_rows(layers: int, rounds: int) -> Iterator[Row]:
    """Yield the seconds to compile a deep network."""
    programs = {name: lambda name=name: compile_deep(name, layers) for name in PAIR}
    yield from compile_rows("compile time", compile_by_turns(programs, rounds), {"layers": layers})


def resnet_50_rows(stages: tuple[int, ...], rounds: int) -> Iterator[Row]:
    """Yield the temporary memory and the time of a step of ResNet-50, or of one of fewer `stages`."""
    problem = (ON_CPU if jax.default_backend() == "cpu" else ON_GPU)._replace(stages=stages)
    made = {name: compile_step(name, problem) for name in PAIR}
    for name, (compiled, _) in made.items():
        temporary = temporary_bytes(compiled.program)
        yield {"measure": "temporary, ResNet", "contender": name, **_labels(problem), "value": temporary}
    yield from step_rows("step time, ResNet", {n: call for n, (_, call) in made.items()}, rounds, _labels(problem))


def resnet_20_rows(problem: Problem, rounds: int, compilations: int) -> Iterator[Row]:
    """Yield the memory of a step of ResNet-20, arguments and temporary arrays, its time, and that to compile it."""
    calls: dict[str, Call] = {}

    def compile_one(name: str) -> Compiled:
        compiled, calls[name] = compile_step(name, problem)
        return compiled

    made = compile_by_turns({name: lambda name=name: compile_one(name) for name in NORMS}, compilations)
    for name, own in made.items():
        arguments: Any = own[-1].program.memory_analysis()
        peak = temporary_bytes(own[-1].program) + arguments.argument_size_in_bytes
        yield {"measure": "peak, ResNet-20", "contender": name, **_labels(problem), "value": peak}
    yield from compile_rows("compile time, ResNet-20", made, _labels(problem))
    yield from step_rows("step time, ResNet-20", calls, rounds, _labels(problem))


def _labels(problem: Problem) -> Row:
    return {"problem": problem._asdict() | {"stages": list(problem.stages)}}


def peak_bytes(norm: str, problem: Problem) -> int | None:
    """Return the peak of this process's device memory after some steps of training; None if it is not known."""
    device = jax.devices()[0]
    if device.memory_stats() is None:
        return None
    _, call = compile_step(norm, problem)
    for _ in range(3):
        call.wait(call.run())
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


if __name__ == "__main__":
    print(json.dumps(peak_bytes(sys.argv[1], ON_GPU)))
