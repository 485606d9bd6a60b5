"""Comparisons of two arms of a search, each at its best learning rate, which is chosen again in every resample."""

from typing import Any

import numpy as np

from experiments.claims._lib.intervals import Estimate, at_edge, best, mean, ratio, tuned
from experiments.claims._lib.search import CHANCE

Arm = tuple[dict[str, Any], str]  # a search, and the name of the arm


def better(one: Arm, other: Arm, what: str = "test") -> Estimate:
    """Return the points by which one arm's accuracy exceeds the other's, each at its best rate by validation."""
    scores, values = ([run[arm][kind] for run, arm in (one, other)] for kind in ("validation", what))
    return tuned(scores, values, lambda a, b: 100 * (a - b), "pp").with_caveat(edge((one, other), scores))


def sooner(slow: Arm, fast: Arm, *, cost: float = 1.0, rate_of: Arm | None = None) -> Estimate:
    """Return the steps of one arm over those of the other, each at its fastest rate or at that of `rate_of`.

    Divided by `cost`, that of a step of the other in steps of the one, it is a ratio of times.
    """
    steps = [np.array(run[arm]["steps"], float) for run, arm in (slow, fast)]
    scores = [np.array(run[arm]["sooner"], float) for run, arm in ((rate_of, rate_of) if rate_of else (slow, fast))]
    made = tuned(scores, steps, lambda a, b: ratio(a, b) / cost, log=True)
    return made.with_caveat(edge((rate_of,) if rate_of else (slow, fast), scores))


def level(arm: Arm, what: str = "test") -> Estimate:
    """Return an accuracy of one arm at its best rate, in percent."""
    return mean(100 * at_best(arm, what), "%")


def moved(arm: Arm) -> Estimate:
    """Return the points that the second half of the steps added to the test accuracy of an arm, at its best rates."""
    run, name = arm
    half = np.asarray(run[name]["test_half"], float)[:, best(run[name]["validation_half"])]
    return mean(100 * (at_best(arm) - half), "pp")


def at_best(arm: Arm, what: str = "test") -> np.ndarray:
    """Return the results `[seeds, ...]` of an arm at its best rate by validation."""
    run, name = arm
    return np.asarray(run[name][what], float)[:, best(run[name]["validation"])]


def edge(arms: tuple[Arm, ...], scores: list[Any]) -> str:
    """Say which arm's best rate is at the end of its grid; an arm that learns at no rate has none."""
    found = [
        at_edge(run["grid"], **{arm: run["grid"][best(score)]})
        for (run, arm), score in zip(arms, scores, strict=False)
        if np.nanmax(np.mean(run[arm]["validation"], 0)) >= CHANCE
    ]
    return max(found, key=len, default="")
