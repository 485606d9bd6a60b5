"""The times of one layer: every contender at every size, with its errors beside them and the floor below."""

from collections.abc import Iterator
from typing import Any

from experiments.benchmark import accuracy, floor
from experiments.benchmark.clock import interleaved, quartiles
from experiments.benchmark.contenders import contender, copying
from experiments.benchmark.errors import errors
from experiments.benchmark.layers import PROGRAMS, present
from experiments.benchmark.sizes import OURS, Case, Plan

Row = dict[str, Any]


def rows(plan: Plan) -> Iterator[Row]:
    """Return a row for each case, program and contender."""
    for case in plan.cases():
        yield from _rows_of(case, present(plan.contenders), plan.rounds)


def _rows_of(case: Case, names: list[str], rounds: int) -> Iterator[Row]:
    # Features are last in two dimensions anyway: there PyTorch has one layout.
    names = [n for n in names if len(case.shape) > 2 or n != "torch"]
    far = accuracy.inputs(case, accuracy.FAR)
    errors_far = {n: errors(n, case, far) for n in names}
    del far
    host = accuracy.inputs(case, accuracy.NEAR)
    errors_near = {n: errors(n, case, host) for n in names}
    built, copy = {n: contender(n, case, host) for n in names}, copying(host)
    for kind in PROGRAMS:
        sampled = interleaved({n: built[n].calls[kind] for n in names} | {"copy": copy}, rounds)
        ours, least = sampled[OURS].seconds, floor.accesses(case, kind) / 2 * sampled["copy"].seconds
        for n in names:
            seconds = sampled[n].seconds
            yield {
                "size": case.size,
                "dtype": case.dtype,
                "epilogue": case.epilogue,
                "program": kind,
                "contender": n,
                "seconds": quartiles(seconds),
                "ours_to_theirs": quartiles(ours / seconds),
                "floor_seconds": quartiles(least),
                "floor_to_time": quartiles(least / seconds),
                "page_faults": quartiles(sampled[n].faults),
                "errors": errors_near[n][kind],
                "errors_far": errors_far[n][kind],
            }
