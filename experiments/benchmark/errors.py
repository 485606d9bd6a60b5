"""The errors of each library's results."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np

import jaxbn.linen
from experiments.benchmark import accuracy
from experiments.benchmark.contenders import contender
from experiments.benchmark.layers import PROGRAMS
from experiments.benchmark.sizes import Case

MEMBERS = 8  # that share statistics
MASKED: dict[str, Callable[..., nn.Module]] = {
    "jaxbn": jaxbn.linen.BatchNorm,
    "flax": nn.BatchNorm,
    "flax, stable": partial(nn.BatchNorm, use_fast_variance=False),
}


def errors(name: str, case: Case, host: accuracy.Inputs) -> dict[str, dict[str, float | str]]:
    """Return by program the largest error of y, and the relative one of dx."""
    it, wanted, found = contender(name, case, host), accuracy.exact(case, host), {}
    for kind in PROGRAMS:
        out = it.calls[kind].run()
        y = it.read(out["y"], accuracy.FEATURES)
        found[kind] = {"y": accuracy.largest(y, wanted.evaluation if kind == "evaluation" else wanted.y)}
        if "dx" in out:
            found[kind]["dx"] = accuracy.relative(it.read(out["dx"], accuracy.FEATURES), wanted.dx)
    return found


def by_offset(names: list[str], rows: int) -> Iterator[dict[str, Any]]:
    """Return the largest error of the training output in float32, against mean/std of the input."""
    case = Case((rows, accuracy.FEATURES), "float32", "none")
    for offset in (0.0, 1e2, 1e4, 1e6):
        host = accuracy.inputs(case, offset)
        wanted = accuracy.exact(case, host).y
        for name in names:
            it = contender(name, case, host)
            error = accuracy.largest(it.read(it.calls["forward"].run()["y"], accuracy.FEATURES), wanted)
            yield {"measure": "error", "contender": name, "mean_to_std": offset, "value": error}


def masked() -> Iterator[dict[str, Any]]:
    """Return the largest error of the shared mean when eight members hold 1 to 8 unmasked rows each."""
    x = np.random.default_rng(0).standard_normal((MEMBERS, 8, 4)) + np.arange(MEMBERS)[:, None, None]
    mask = np.arange(8)[None, :, None] <= np.arange(MEMBERS)[:, None, None]
    x = x.astype(np.float32)
    exact = np.mean(x.astype(np.float64), axis=(0, 1), where=mask)
    for name, make in MASKED.items():
        layer = make(use_running_average=False, axis_name="members", momentum=0.0)
        variables = layer.init(jax.random.key(0), x[0])

        def statistics(x, mask, layer=layer, variables=variables):
            return layer.apply(variables, x, mask=mask, mutable=["batch_stats"])[1]["batch_stats"]

        mean = np.asarray(jax.vmap(statistics, axis_name="members")(x, mask)["mean"][0])
        yield {"measure": "masked error", "contender": name, "value": accuracy.largest(mean, exact)}
