"""The protocol of a comparison: rates on a log grid that the run widens itself, and budgets that it doubles.

Both arms get the same rates. The grid is widened until the best rate of each arm is interior, and the number of steps
is doubled until the test accuracy of the plain arm moves by less than its interval.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.claims._lib import intervals
from experiments.claims._lib.study import Study, tested
from experiments.training.config import Settings
from experiments.training.data import Data
from experiments.training.models import Model
from experiments.training.train import Arm

FACTOR, LOWEST, LARGEST = 10**0.5, 1e-4, 1e3
DOUBLINGS = 3
Make = Callable[[Settings, str], Model | Arm]


def search(
    study: Study, name: str, s: Settings, arms: tuple[str, ...], make: Make, *, asked: dict[str, Any], **fit: Any
) -> dict[str, Any]:
    """Train `arms` at every rate; of each arm the results `[seeds, rates]`, and `grid`, `steps` and `moved`.

    Args:
        study: its parts keep the results.
        name: of the parts.
        s: where the grid and the budget start.
        arms: the plain one first.
        make: the network of an arm.
        asked: all that the results depend on beside the settings and the arm.
        fit: further arguments of `Study.fit`.
    """
    moved: list[float] = []
    found = widened(study, name, s, arms, make, asked=asked, **fit)
    while not study.smoke and len(moved) < DOUBLINGS:
        s, former = dataclasses.replace(s, steps=2 * s.steps), found
        found = widened(study, name, s, arms, make, asked=asked, **fit)
        before, after = (intervals.mean(at_best(f[arms[0]])[1]) for f in (former, found))
        moved.append(100 * (after.value - before.value))
        if abs(after.value - before.value) <= before.high - before.value:
            break
    return found | {"moved": moved}


def widened(
    study: Study,
    name: str,
    s: Settings,
    arms: tuple[str, ...],
    make: Make,
    *,
    asked: dict[str, Any],
    data: Data | None = None,
    **fit: Any,
) -> dict[str, Any]:
    """Train `arms` for the steps of `s`, at its rates and at more of them until the best of each arm is interior."""
    columns: dict[str, dict[float, dict[str, Any]]] = {arm: {} for arm in arms}
    todo = s.learning_rates
    while todo:
        now = dataclasses.replace(s, learning_rates=todo)
        for arm in arms:
            part = study.part(
                f"{name}-{arm}-{s.steps}-{todo[0]:.3g}",
                {"settings": now, "arm": arm, **asked},
                lambda arm=arm, now=now: _results(study, now, make(now, arm), data, fit),
            )
            columns[arm] |= {r: {k: np.asarray(v)[:, i] for k, v in part.items()} for i, r in enumerate(todo)}
        todo = () if study.smoke else _further(columns)
    grid = sorted(columns[arms[0]])
    results = {arm: {k: np.stack([by[r][k] for r in grid], 1) for k in by[grid[0]]} for arm, by in columns.items()}
    return {"grid": grid, "steps": s.steps, **results}


def at_best(arm: dict[str, Any], what: str = "test") -> tuple[int, np.ndarray]:
    """Return the index of the rate with the best mean validation accuracy, and the results of each seed there."""
    best = int(np.argmax(np.nan_to_num(np.asarray(arm["validation"], float), nan=-1.0).mean(0)))
    return best, np.asarray(arm[what], float)[:, best]


def _results(study: Study, s: Settings, model: Model | Arm, data: Data | None, fit: dict[str, Any]) -> dict[str, Any]:
    done = study.fit(s, model, data=data, **fit)
    test = np.stack([tested(done.log, at) for at in range(len(s.learning_rates))], 1)
    last = done.log.val_accuracy
    late = last[:, :, -1] - last[:, :, -1 - last.shape[-1] // 4]  # the gain of the last quarter of the steps
    return {"validation": last[:, :, -1], "test": test, "train": study.learned(done, data), "late": late}


def _further(columns: dict[str, dict[float, dict[str, Any]]]) -> tuple[float, ...]:
    """Return the rates that are needed next; none if the best of each arm is interior or the ends are reached."""
    wanted = set()
    for by in columns.values():
        grid = sorted(by)
        best = grid[int(np.argmax([np.nan_to_num(by[r]["validation"], nan=-1.0).mean() for r in grid]))]
        if best == grid[0] and best / FACTOR >= LOWEST:
            wanted.add(best / FACTOR)
        if best == grid[-1] and best * FACTOR <= LARGEST:
            wanted.add(best * FACTOR)
    return tuple(sorted(wanted))
