"""The times of one layer: every contender at every size, with its errors beside them."""

from collections.abc import Iterator
from typing import Any

from experiments.benchmark import accuracy
from experiments.benchmark.clock import interleaved, quartiles
from experiments.benchmark.contenders import contender
from experiments.benchmark.errors import errors
from experiments.benchmark.layers import PROGRAMS, present
from experiments.benchmark.sizes import OURS, Case, Plan

Row = dict[str, Any]


def rows(plan: Plan) -> Iterator[Row]:
    """Return a row for each case, program and contender."""
    for case in plan.cases():
        yield from _rows_of(case, present(plan.contenders), plan.rounds)


def _rows_of(case: Case, names: list[str], rounds: int) -> Iterator[Row]:
    far = accuracy.inputs(case, accuracy.FAR)
    errors_far = {n: errors(n, case, far) for n in names}
    del far
    host = accuracy.inputs(case, accuracy.NEAR)
    errors_near = {n: errors(n, case, host) for n in names}
    built = {n: contender(n, case, host) for n in names}
    for kind in PROGRAMS:
        sampled = interleaved({n: built[n].calls[kind] for n in names}, rounds)
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
