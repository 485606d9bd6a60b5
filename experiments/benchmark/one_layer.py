"""One layer: every contender's times at every size with the errors beside them, and what a call costs by itself."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

from experiments.benchmark import accuracy
from experiments.benchmark.clock import Call, interleaved, quartiles
from experiments.benchmark.layers import LAYERS, MODULES, PROGRAMS, arguments, contender, present
from experiments.benchmark.sizes import OURS, TORCH, Case, Plan

Row = dict[str, Any]
ROWS = 65536  # of the inputs whose errors are measured
MEMBERS = 8  # that share statistics
TINY = Case((8, 4), "float32", "relu")


def time_rows(plan: Plan) -> Iterator[Row]:
    """Yield the times and errors of each case, program and contender."""
    names = present(plan.contenders)
    for case in plan.cases():
        far = accuracy.inputs(case, accuracy.FAR)
        errors_far = {n: _errors(n, case, far) for n in names}
        del far
        host = accuracy.inputs(case, accuracy.NEAR)
        errors_near = {n: _errors(n, case, host) for n in names}
        built = {n: contender(n, case, host) for n in names}
        for kind in PROGRAMS:
            sampled = interleaved({n: built[n].calls[kind] for n in names}, plan.rounds)
            for n in names:
                yield {
                    "size": case.size,
                    "dtype": case.dtype,
                    "epilogue": case.epilogue,
                    "program": kind,
                    "contender": n,
                    "seconds": quartiles(sampled[n]),
                    "ours_to_theirs": quartiles(sampled[OURS] / sampled[n]),
                    "errors": errors_near[n][kind],
                    "errors_far": errors_far[n][kind],
                }


def _errors(name: str, case: Case, host: accuracy.Inputs) -> dict[str, dict[str, float | str]]:
    """Return by program the largest error of y, and the relative one of dx."""
    it, wanted, found = contender(name, case, host), accuracy.exact(case, host), {}
    for kind in PROGRAMS:
        out = it.calls[kind].run()
        y = it.read(out["y"], accuracy.FEATURES)
        found[kind] = {"y": accuracy.largest(y, wanted.evaluation if kind == "evaluation" else wanted.y)}
        if "dx" in out:
            found[kind]["dx"] = accuracy.relative(it.read(out["dx"], accuracy.FEATURES), wanted.dx)
    return found


def error_rows(names: list[str]) -> Iterator[Row]:
    """Yield the largest error of the training output in float32, against mean/std of the input."""
    case = Case((ROWS, accuracy.FEATURES), "float32", "none")
    for offset in (0.0, 1e2, 1e4, 1e6):
        host = accuracy.inputs(case, offset)
        wanted = accuracy.exact(case, host).y
        for name in names:
            it = contender(name, case, host)
            error = accuracy.largest(it.read(it.calls["forward"].run()["y"], accuracy.FEATURES), wanted)
            yield {"measure": "error", "contender": name, "mean_to_std": offset, "value": error}


def masked_rows() -> Iterator[Row]:
    """Yield the largest error of the shared mean when eight members hold 1 to 8 unmasked rows each."""
    x = np.random.default_rng(0).standard_normal((MEMBERS, 8, 4)) + np.arange(MEMBERS)[:, None, None]
    mask = np.arange(8)[None, :, None] <= np.arange(MEMBERS)[:, None, None]
    x = x.astype(np.float32)
    exact = np.mean(x.astype(np.float64), axis=(0, 1), where=mask)
    for name, make in MODULES.items():
        layer = make(use_running_average=False, axis_name="members", momentum=0.0)
        variables = layer.init(jax.random.key(0), x[0])

        def statistics(x, mask, layer=layer, variables=variables):
            return layer.apply(variables, x, mask=mask, mutable=["batch_stats"])[1]["batch_stats"]

        mean = np.asarray(jax.vmap(statistics, axis_name="members")(x, mask)["mean"][0])
        yield {"measure": "masked error", "contender": name, "value": accuracy.largest(mean, exact)}


def dispatch_rows(names: list[str], rounds: int) -> Iterator[Row]:
    """Yield the cost of a call before any arithmetic: the training forward pass of a tiny layer, compiled and eager."""
    host = accuracy.inputs(TINY, accuracy.NEAR)
    jitted = {n: contender(n, TINY, host).calls["forward"] for n in names}
    eager = {n: jitted[n] if n == TORCH else _eager(n, host) for n in (*names, "jaxbn.linen")}
    for kind, calls in (("jitted", jitted), ("eager", eager)):
        for name, sampled in interleaved(calls, rounds).items():
            seconds = quartiles(sampled)
            yield {"measure": "dispatch", "contender": name, "call": kind, "value": seconds["median"], **seconds}


def _eager(name: str, host: accuracy.Inputs) -> Call:
    layer = LAYERS[name](TINY.shape[-1])
    params, state, x, residual, _ = arguments(layer, host)
    return Call(partial(layer.apply, params, state, x, residual, True, TINY.relu), jax.block_until_ready)
