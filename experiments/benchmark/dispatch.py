"""The cost of a call before any arithmetic: the training forward pass of a tiny layer, compiled and eager."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax

from experiments.benchmark import accuracy
from experiments.benchmark.clock import Call, interleaved, quartiles
from experiments.benchmark.contenders import contender
from experiments.benchmark.layers import LAYERS, arguments
from experiments.benchmark.sizes import TORCH, Case

TINY = Case((8, 4), "float32", "relu")


def rows(names: list[str], rounds: int) -> Iterator[dict[str, Any]]:
    """Return the seconds of a call of each library."""
    host = accuracy.inputs(TINY, accuracy.NEAR)
    jitted = {n: contender(n, TINY, host).calls["forward"] for n in names}
    eager = {n: _eager(n, host) for n in (*jitted, "jaxbn.linen")}
    for kind, calls in (("jitted", jitted), ("eager", eager)):
        for name, sampled in interleaved(calls, rounds).items():
            seconds = quartiles(sampled)
            yield {"measure": "dispatch", "contender": name, "call": kind, "value": seconds["median"], **seconds}


def _eager(name: str, host: accuracy.Inputs) -> Call:
    if name == TORCH:
        return contender(name, TINY, host).calls["forward"]
    layer = LAYERS[name](TINY.shape[-1])
    params, state, x, residual, _ = arguments(layer, host)
    return Call(partial(layer.apply, params, state, x, residual, True, TINY.relu), jax.block_until_ready)
