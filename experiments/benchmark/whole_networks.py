"""ResNet-20's training step on small images: its time, its memory, and the time to compile it.

A layer measured alone says little about a network, in which the compiler fuses it with its neighbours. So the whole
step is compiled in one process with ours, with flax's default layer and with flax's stable one, and timed by turns.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark.networks import NORMS, Norm
from experiments.benchmark.training import Step, compile_rows, compile_step, step_rows

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


def training_step(norm: Norm, problem: Problem) -> Step:
    """Compile the training step of a problem."""
    return compile_step(ResNet(norm, problem), problem.batch, problem.size, problem.dtype, classes=10)


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
            jax.clear_caches()
            made[name].append(training_step(CONTENDERS[name], problem))
    for name, steps in made.items():
        peak = steps[-1].temporary_bytes + steps[-1].argument_bytes
        yield {"measure": "peak, ResNet-20", "contender": name, **labels, "value": peak}
        trace, compile_ = (np.array([getattr(step, part) for step in steps[1:]]) for part in ("trace", "compile"))
        yield from compile_rows("compile time, ResNet-20", name, trace, compile_, labels)
    yield from step_rows("step time, ResNet-20", {name: steps[-1] for name, steps in made.items()}, rounds, labels)
