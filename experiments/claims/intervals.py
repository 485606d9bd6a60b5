"""From numbers of single seeds to a number with its interval; comparisons are made seed by seed."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from experiments.training.summary import quartiles

RESAMPLES, LEVEL = 10_000, 0.95
# Accuracies are counts of at most 2,000 images and are kept with six digits: a thousandth of a percent is rounding.
COUNTED, DIGITS = ("pp", "%"), 3


class Estimate(NamedTuple):
    """A number with its interval.

    Attributes:
        value, low, high: infinite where what was waited for never came.
        n: of how many values.
        unit: what follows the number in print; empty for a ratio or a plain number.
        how: the statistic and what the interval is.
        quartiles: of the values, where each is of a pair that shares its seed.
        signs: of such pairs how many are above `against`, how many below, and the two-sided p of the sign test.
        against: 0 for differences and 1 for ratios.
    """

    value: float
    low: float
    high: float
    n: int
    unit: str = ""
    how: str = ""
    quartiles: tuple[float, float] | None = None
    signs: tuple[int, int, float] | None = None
    against: float = 0.0


def mean(values: Any, unit: str = "", *, against: float | None = None) -> Estimate:
    """The mean of `values [n]` with its bootstrap interval; of `[groups, n]`, groups are drawn first.

    `against` is for values of pairs: 0 if they are differences, 1 if they are ratios.
    """
    return _bootstrap(np.asarray(values, float), lambda v: np.mean(v, -1), unit, "mean", against)


def median(values: Any, unit: str = "", *, against: float | None = None) -> Estimate:
    """The median of `values` with its bootstrap interval; infinity is a value that is larger than all others."""
    return _bootstrap(np.asarray(values, float), _middle, unit, "median", against)


def extremes(values: Any, unit: str = "") -> Estimate:
    """The median of `values`, with the smallest and the largest in the place of an interval: for what is exact."""
    v = np.asarray(values, float).ravel()
    return Estimate(float(_middle(v)), float(v.min()), float(v.max()), v.size, unit, "median, smallest and largest")


def exact(value: float, how: str) -> Estimate:
    """A number without spread, `how` says of what: a rate that was chosen, a count."""
    return Estimate(float(value), float(value), float(value), 1, "", how)


def share(values: Any, above: float) -> Estimate:
    """Which part of the seeds is above a number: counted, so that there is no interval."""
    v = np.asarray(values, float).ravel()
    return exact(float(np.mean(v > above)), "counted")._replace(n=v.size)


def compared(estimate: Estimate, values: Any, against: float) -> Estimate:
    """`estimate` with the quartiles and the sign test of the pairs' `values` that it was made of."""
    v = np.asarray(values, float).ravel()
    q = quartiles(v)
    signs = int(np.sum(v > against)), int(np.sum(v < against)), sign_test(v - against)
    return estimate._replace(quartiles=(float(q.low), float(q.high)), signs=signs, against=against)


def sign_test(differences: Any) -> float:
    """The two-sided p of as many differences of one sign if both signs were equally likely; zeros are left out."""
    d = np.asarray(differences, float).ravel()
    up, moved = int(np.sum(d > 0)), int(np.sum(d != 0))
    return float(stats.binomtest(up, moved).pvalue) if moved else 1.0


def ratio(above: Any, below: Any) -> list[float]:
    """Pairs of numbers of steps, one over the other; a number that was never reached is infinite.

    If only `above` was never reached the ratio is infinite, if only `below`, it is 0: both on the side that is known.
    If neither was, nothing is known, and 1 favours nobody.
    """

    def one(a: float, b: float) -> float:
        if math.isinf(a) and math.isinf(b):
            return 1.0
        return a / b

    return [one(float(a), float(b)) for a, b in zip(above, below, strict=True)]


def first_step(steps: Any, curves: Any, target: Any) -> list[float]:
    """For each of `curves [n, logged]` the first of `steps` where it is at `target`, one or `[n]`; or infinity."""
    curves = np.asarray(curves, float)
    reached = curves >= np.broadcast_to(np.asarray(target, float), len(curves))[:, None]
    at = np.argmax(reached, axis=1)
    return [float(steps[i]) if reached[run, i] else math.inf for run, i in enumerate(at)]


def _middle(v: np.ndarray) -> np.ndarray:
    """The median along the last axis; between a number and infinity lies infinity."""
    ordered = np.sort(v, axis=-1)
    below, above = ordered[..., (v.shape[-1] - 1) // 2], ordered[..., v.shape[-1] // 2]
    with np.errstate(invalid="ignore"):
        return np.where(np.isinf(above), above, (below + above) / 2)


def _bootstrap(
    v: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], unit: str, name: str, against: float | None
) -> Estimate:
    """The percentile interval of `statistic`, and the sign test `against` a number if there is one."""
    if np.isnan(v).any() or not v.size:
        raise ValueError(f"an estimate needs numbers; got {v.tolist()}.")
    if unit in COUNTED:
        v = np.where(np.abs(v) < 10.0**-DIGITS, 0.0, v)
    rng, flat = np.random.default_rng(0), v.ravel()
    if v.ndim == 2:
        groups = rng.integers(len(v), size=(RESAMPLES, len(v)))
        members = rng.integers(v.shape[1], size=(RESAMPLES, *v.shape))
        drawn = v[groups[..., None], members].reshape(RESAMPLES, -1)
    else:
        drawn = flat[rng.integers(len(flat), size=(RESAMPLES, len(flat)))]
    spread = statistic(drawn)
    # Order statistics: interpolation between a number and infinity would be NaN.
    low, high = np.quantile(spread, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    how = f"{name}, {LEVEL:.0%} bootstrap interval"
    found = np.array([statistic(flat), low, high])
    if unit in COUNTED:
        found = np.round(found, DIGITS + 1) + 0.0  # no -0
    value, low, high = found.tolist()
    estimate = Estimate(value, low, high, flat.size, unit, how)
    return estimate if against is None else compared(estimate, flat, against)
