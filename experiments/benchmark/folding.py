"""A convolution in evaluation: alone, with the normalization after it, and with that folded into it."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxbn
from experiments.benchmark import passes
from experiments.benchmark.clock import Call, interleaved, quartiles
from experiments.benchmark.sizes import OURS

SHAPE = (8, 28, 28, 64)


def rows(dtype: str, rounds: int) -> Iterator[dict[str, Any]]:
    """Seconds, and arrays moved, of each; the two compiled without a normalization are one program."""
    rng, features = np.random.default_rng(0), SHAPE[-1]
    params, state = jaxbn.bn_init(features, mean=rng.normal(size=features), var=rng.uniform(0.5, 2, features))
    kernel = jnp.asarray(rng.normal(size=(3, 3, features, features)) / 24, dtype)
    x, bias = jnp.asarray(rng.normal(size=SHAPE), dtype), jnp.zeros(features, dtype)

    def convolution(x, kernel, bias):
        names = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=names) + bias

    def normalized(x, kernel, bias):
        return jaxbn.bn_apply(params, state, convolution(x, kernel, bias), False)[0]

    found = {
        "alone": (convolution, (x, kernel, bias)),
        "normalized": (normalized, (x, kernel, bias)),
        "folded": (convolution, (x, *jaxbn.inference.fold(params, state, kernel, bias))),
    }
    compiled = {name: jax.jit(f).lower(*args).compile() for name, (f, args) in found.items()}
    queued = jax.default_backend() != "cpu"
    calls = {name: Call(partial(compiled[name], *found[name][1]), jax.block_until_ready, queued) for name in found}
    for name, sampled in interleaved(calls, rounds).items():
        labels = {"contender": OURS, "convolution": name, "dtype": dtype}
        seconds = quartiles(sampled.seconds)
        moved = passes.moved(compiled[name].as_text() or "", math.prod(SHAPE))
        yield {"measure": "folding, seconds", **labels, "value": seconds["median"], **seconds}
        yield {"measure": "folding, arrays moved", **labels, "value": moved}
