"""Every library on the same arrays: its programs ready to run, and its results as NumPy arrays."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark import torch_layers
from experiments.benchmark.accuracy import Inputs
from experiments.benchmark.clock import Call
from experiments.benchmark.layers import LAYERS, PROGRAMS, arguments, program
from experiments.benchmark.sizes import TORCH, Case


class Contender(NamedTuple):
    """One library on the arrays of a case.

    Attributes:
        calls: by the name of the program.
        read: one of a call's arrays, float64, features last, the first `n` of them.
    """

    calls: dict[str, Call]
    read: Callable[[Any, int], np.ndarray]


def contender(name: str, case: Case, host: Inputs) -> Contender:
    """Return the library `name` on the arrays `host`."""
    if name == TORCH:
        return _torch(case, host)
    layer = LAYERS[name](case.shape[-1])
    args = arguments(layer, host)
    queued = jax.default_backend() != "cpu"

    def read(v, n):
        v = np.asarray((jnp.moveaxis(v, 1, -1) if layer.channels_first and v.ndim > 1 else v)[..., :n])
        return v.astype(np.float64)

    def call(kind):
        run = partial(compiled(name, case.shape[-1], kind, case.relu), *args)
        return Call(run, jax.block_until_ready, queued)

    return Contender({kind: call(kind) for kind in PROGRAMS}, read)


@cache
def compiled(name: str, features: int, kind: str, relu: bool) -> Any:
    """Return the program, compiled once for all arrays of a shape."""
    return jax.jit(program(LAYERS[name](features), kind, relu))


def _torch(case: Case, host: Inputs) -> Contender:
    programs = torch_layers.programs(host, case.dtype, case.relu)
    queued = torch_layers.on_gpu()
    wait = torch_layers.wait if queued else (lambda out: None)
    return Contender(
        {kind: Call(run, wait, queued) for kind, run in programs.items()}, lambda v, n: torch_layers.array(v)[..., :n]
    )
