"""Times that can be compared: all contenders in turn, round after round, in one process.

What disturbs a machine for a while disturbs all contenders of a round alike; so a ratio is taken within each round, and
the median over the rounds is the result. Before each sample comes an untimed call, so that no contender finds the
caches, or the cores, as the one before left them.
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

SAMPLE = 2e-3  # seconds that a sample takes at least, of as many calls as that needs
MOST_CALLS = 1000
WARM_UP = 2  # rounds, one in each direction, in which the heap grows to what all of them need


class Call(NamedTuple):
    """Timed programs and their arrays.

    Attributes:
        run: does it once; on an accelerator it may return before the work is done.
        wait: given what `run` returned, returns when the work is done.
        queued: whether calls are lined up and awaited together, as on an accelerator, where each alone would measure
            the way there.
    """

    run: Callable[[], Any]
    wait: Callable[[Any], Any]
    queued: bool = False


def quartiles(values: np.ndarray) -> dict[str, float]:
    """Return the median and the quartiles, for a record."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return {"median": float(median), "low": float(low), "high": float(high)}


def interleaved(calls: Mapping[str, Call], rounds: int) -> dict[str, np.ndarray]:
    """Time all `calls` by turns; return the seconds of a call in each round. Every other round goes backwards."""
    names = list(calls)
    times = {name: _times(calls[name]) for name in names}
    seconds = {name: np.zeros(rounds) for name in names}
    for i in range(-WARM_UP, rounds):
        for name in names if i % 2 else reversed(names):
            _many(calls[name], 1)
            began = time.perf_counter()
            _many(calls[name], times[name])
            if i >= 0:
                seconds[name][i] = (time.perf_counter() - began) / times[name]
    return seconds


def _times(call: Call) -> int:
    """Return the number of calls in a sample."""
    _many(call, 1)
    began = time.perf_counter()
    _many(call, 1)
    return min(MOST_CALLS, math.ceil(SAMPLE / (time.perf_counter() - began)))


def _many(call: Call, times: int) -> None:
    out = None
    for _ in range(times):
        out = call.run()
        if not call.queued:
            call.wait(out)
    call.wait(out)
