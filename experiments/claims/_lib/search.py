"""The protocol of a comparison: splits of the data, rates on a log grid that widens itself, and budgets that double.

All arms get the same rates; each seed has initial weights and a split of the data of its own. The grid is widened until
the best rate of each arm is interior. The number of steps is doubled, `DOUBLINGS` times at most, until the plain arm
has learned something and the second half of them moves its test accuracy by less than half the width of its interval.
The best rate is that with the best validation accuracy at the end; the test accuracy, that of the step with the best.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.claims._lib import intervals
from experiments.claims._lib.study import WIDER, Study
from experiments.claims._lib.trained import Trained, tested
from experiments.training import train
from experiments.training.config import Settings
from experiments.training.data import Data
from experiments.training.models import Model
from experiments.training.train import Arm

FACTOR, LOWEST, LARGEST = 10**0.5, 1e-4, 1e3
DOUBLINGS = 2
CHANCE = 0.2  # validation accuracy up to which an arm has learned nothing: further rates are not tried for it
HALVES = (("test_half", "validation_half"), ("test", "validation"))
ACCURACIES = ("validation", "test", "train")
WITH_HALVES = (*ACCURACIES, "validation_half", "test_half")
Make = Callable[[Settings, str], Model | Arm]
Results = dict[str, Any]
Watch = Callable[[int, train.Carry], None]
Observe = Callable[[Settings, Any, list[Data]], tuple[Watch, Callable[[Trained], Results]]]


def search(
    study: Study,
    name: str,
    s: Settings,
    arms: tuple[str, ...],
    make: Make,
    *,
    asked: dict[str, Any] | None = None,
    **fit: Any,
) -> Results:
    """Train `arms` at every rate; of each arm the results `[seeds, rates]`, and `grid`, `steps` and `moved`.

    Args:
        study: its parts keep the results.
        name: of the parts.
        s: where the grid and the budget start.
        arms: the plain one first.
        make: the network of an arm.
        asked: all that the results depend on beside the settings and the arm.
        fit: further arguments of `results`.
    """
    moved: list[float] = []
    while True:
        found = widened(study, name, s, arms, make, asked=asked, **fit)
        half, end = (intervals.mean(100 * at_best(found[arms[0]], *of)[1]) for of in HALVES)
        moved.append(end.value - half.value)
        learned = at_best(found[arms[0]], "validation")[1].mean() >= CHANCE
        if study.smoke or len(moved) > DOUBLINGS or (learned and abs(moved[-1]) <= end.high - end.value):
            break
        s = dataclasses.replace(s, steps=2 * s.steps)
    if study.vary:
        found = checked(study, name, s, arms, make, asked=asked, **fit)
    return found | {"moved": moved}


def checked(study: Study, name: str, s: Settings, arms: tuple[str, ...], *args: Any, **more: Any) -> Results:
    """Train as `widened`; in a check also at rates beyond the grid that was searched, or for twice the steps.

    For twice the steps it starts from the best rates for the steps of `s` and their neighbors.
    """
    found = widened(study, name, s, arms, *args, **more)
    grid = found["grid"]
    if study.vary == "grid" and len(grid) > 1:
        return widened(study, name, s, arms, *args, beyond=(grid[0] / WIDER, grid[-1] * WIDER), **more)
    if study.vary == "steps":
        best = [int(intervals.best(found[arm][more.get("by", "validation")])) for arm in arms]
        near = tuple(grid[max(min(best) - 1, 0) : max(best) + 2])
        return widened(study, name, dataclasses.replace(s, steps=2 * s.steps, learning_rates=near), arms, *args, **more)
    return found


def widened(
    study: Study,
    name: str,
    s: Settings,
    arms: tuple[str, ...],
    make: Make,
    *,
    asked: dict[str, Any] | None = None,
    by: str = "validation",
    beyond: tuple[float, ...] = (),
    **fit: Any,
) -> Results:
    """Train `arms` for the steps of `s`, at its rates and at more of them until the best of each arm is interior.

    The best is that with the largest mean of the results `by`. Then also at the rates `beyond`.
    """
    columns: dict[str, dict[float, Results]] = {arm: {} for arm in arms}
    todo = s.learning_rates
    while todo:
        now = dataclasses.replace(s, learning_rates=todo)
        for arm in arms:
            part = study.part(
                f"{name}-{arm}-{s.steps}-{todo[0]:.3g}",
                {"settings": now, "arm": arm, **(asked or {})},
                lambda arm=arm, now=now: results(study, now, lambda one, arm=arm: make(one, arm), **fit),
            )
            columns[arm] |= {r: {k: np.asarray(v)[:, i] for k, v in part.items()} for i, r in enumerate(todo)}
        todo = () if study.smoke else _further(columns, by)
        if not todo:
            todo, beyond = beyond, ()
    grid = sorted(columns[arms[0]])
    stacked = {arm: {k: np.stack([at[r][k] for r in grid], 1) for k in at[grid[0]]} for arm, at in columns.items()}
    return {"grid": grid, "steps": s.steps, **stacked}


def at_best(arm: Results, what: str = "test", by: str = "validation") -> tuple[int, np.ndarray]:
    """Return the index of the rate with the best mean validation accuracy, and the results of each seed there."""
    at = int(intervals.best(arm[by]))
    return at, np.asarray(arm[what], float)[:, at]


def kept(run: Results, arms: Sequence[str], names: Sequence[str] = ACCURACIES) -> Results:
    """Return a search with the results `names` of its arms alone: all of them would make the record long."""
    return {k: {n: v[n] for n in names} if k in arms else v for k, v in run.items()}


def results(
    study: Study,
    s: Settings,
    make: Callable[[Settings], Model | Arm],
    *,
    change: Callable[[Data], Data] = lambda data: data,
    read: Callable[[Trained], Results] = lambda done: {},
    observe: Observe | None = None,
    **fit: Any,
) -> Results:
    """Return accuracies `[seeds, rates]` at half of the steps and at all of them, of each seed on a split of its own.

    Args:
        study: with the splits.
        s: the seeds, rates and steps.
        make: the network of given settings.
        change: of each split, before training: fewer images, or other values of them.
        read: further results of a training, `[seeds, rates, ...]`.
        observe: of settings, network and the data of each seed, what watches a training and what reads it then.
        fit: further arguments of `Study.fit`.
    """
    data = [change(study.on(seed).data) for seed in range(s.seeds)] if study.split else change(study.data)
    model = make(s)
    look, more = observe(s, model, data if isinstance(data, list) else [data] * s.seeds) if observe else (None, None)
    halfway = max(s.steps // (2 * s.log_every), 1) * s.log_every
    kept: list[Any] = []

    def watch(step: int, carry: train.Carry) -> None:
        if look:
            look(step, carry)
        if step == halfway:
            kept.append(carry)

    done = study.fit(s, model, data=data, watch=watch, **fit)
    log, half = done.log, done.log.steps <= halfway
    found = {"train": study.learned(done, data), "train_half": study.learned(done._replace(carry=kept[0]), data)}
    for name, part in (("", np.full_like(half, True)), ("_half", half)):
        short = log._replace(val_accuracy=log.val_accuracy[..., part], test_accuracy=log.test_accuracy[..., part])
        found[f"validation{name}"] = short.val_accuracy[..., -1]
        found[f"test{name}"] = np.stack([tested(short, at) for at in range(short.val_accuracy.shape[1])], 1)
    return found | read(done) | (more(done) if more else {})


def _further(columns: dict[str, dict[float, Results]], score: str) -> tuple[float, ...]:
    """Return the rates that are needed next; none if the best of each arm is interior or the ends are reached."""
    wanted = set()
    for by in columns.values():
        grid = sorted(by)
        if max(float(np.nanmean(by[r]["validation"])) for r in grid) < CHANCE:
            continue
        best = grid[int(intervals.best(np.stack([by[r][score] for r in grid], -1)))]
        if best == grid[0] and best / FACTOR >= LOWEST:
            wanted.add(best / FACTOR)
        if best == grid[-1] and best * FACTOR <= LARGEST:
            wanted.add(best * FACTOR)
    return tuple(sorted(wanted))
