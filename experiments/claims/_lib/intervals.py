"""Estimate with a 95% interval from the numbers of single seeds; comparisons are made seed by seed.

Means have Student's interval, medians that of Hettmansperger and Sheather (1986) between order statistics. Where a
learning rate was chosen from the same seeds, the choice is made again in every resample of a bootstrap, whose spread is
the standard error. A test shows the coverage of each at eight seeds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

RESAMPLES, LEVEL = 10_000, 0.95
NEVER = 1e9  # more steps than any budget
DUST = 1e-3  # accuracies are counts of at most 2,000 images, kept with six digits: less than this is rounding


def _outside(low: float, high: float) -> Callable[[float], float]:
    return lambda bound: float(not (high <= bound or low >= bound))


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        value, low, high: infinite where a target was never reached.
        n: of how many values.
        unit: follows the number in print; empty for a ratio or a plain number.
        how: the statistic and its interval.
        p: the two-sided p of the hypothesis that the number is a bound.
        caveat: why nothing follows from it, such as a learning rate at the edge of its grid.
    """

    value: float
    low: float
    high: float
    n: int
    unit: str = ""
    how: str = ""
    p: Callable[[float], float] = lambda bound: 1.0
    caveat: str = ""

    def with_caveat(self, caveat: str) -> "Estimate":
        """Return the same with a caveat; nothing follows from it unless that is empty."""
        return replace(self, caveat=caveat)


def mean(values: Any, unit: str = "") -> Estimate:
    """Return the mean of `values [n]`; of `[groups, n]` with the interval over the means of the groups.

    Values in percent are shares of a whole: their interval ends where these do.
    """
    v = _clean(values, unit)
    groups = v.mean(1) if v.ndim == 2 and len(v) > 1 else v.ravel()
    n = len(groups)
    error = float(groups.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    how = "mean, t interval" + (f" over {n} splits" if n < v.size else "")
    e = replace(_student(float(groups.mean()), error, n, unit, how), n=v.size)
    return replace(e, low=max(e.low, 0.0), high=min(e.high, 100.0)) if unit == "%" else e


def _student(value: float, error: float, n: int, unit: str, how: str) -> Estimate:
    """Return a mean of `n` values with this standard error."""
    width = float(stats.t.ppf((1 + LEVEL) / 2, max(n - 1, 1))) * error

    def p(bound: float) -> float:
        if error:
            return 2 * float(stats.t.sf(abs(value - bound) / error, n - 1))
        # Equal values, by the sign test: that they do not vary is no proof that they never would.
        return 1.0 if value == bound else 2 * 0.5**n

    return Estimate(value, value - width, value + width, n, unit, how, p)


def geometric(ratios: Any) -> Estimate:
    """Return the geometric mean of `ratios [n]`, or their median if one of them is 0 or infinite."""
    v = np.asarray(ratios, float)
    if not np.all(np.isfinite(v) & (v > 0)):
        return median(v)
    return _exponential(mean(np.log(v)))


def _exponential(e: Estimate) -> Estimate:
    """Return the geometric mean, from the mean of logarithms."""

    def p(bound: float) -> float:
        return e.p(math.log(bound) if bound > 0 else -math.inf)

    value, low, high = (math.exp(x) for x in (e.value, e.low, e.high))
    return Estimate(value, low, high, e.n, e.unit, f"geometric {e.how}", p)


def median(values: Any, unit: str = "") -> Estimate:
    """Return the median of `values`; infinity is a value that is larger than all others. The p is the sign test's."""
    v = np.sort(_clean(values, unit).ravel())
    n = len(v)
    covered = 1 - 2 * stats.binom.cdf(np.arange(n // 2), n, 0.5)  # by the interval from the k-th value, k = 1, 2, ...
    k = max(int(np.sum(covered >= LEVEL)), 1)
    low, high, how = float(v[k - 1]), float(v[n - k]), "median, interval between order statistics"
    if covered[:1] >= LEVEL and k < len(covered):
        part = (covered[k - 1] - LEVEL) / (covered[k - 1] - covered[k])
        inwards = (n - k) * part / (k + (n - 2 * k) * part)
        low += inwards * (v[k] - low) if math.isfinite(v[k]) else 0.0
        high -= inwards * (high - v[n - k - 1]) if math.isfinite(high) else 0.0
    elif covered[:1] < LEVEL:
        how = "median, smallest and largest"

    def p(bound: float) -> float:
        above, below = int(np.sum(v > bound)), int(np.sum(v < bound))
        return float(stats.binomtest(above, above + below).pvalue) if above + below else 1.0

    return Estimate(_middle(v), low, high, n, unit, how, p)


def tuned(
    scores: Sequence[Any], values: Sequence[Any], combine: Callable[..., Any], unit: str = "", *, log: bool = False
) -> Estimate:
    """Return the mean of `combine` of each arm's `values` at its best rate, the rate chosen again in each resample.

    Its standard error is that of the resamples, so that the choice is in it, and its interval Student's.

    Args:
        scores: of each arm what chooses, `[seeds, rates]`, the largest mean: validation accuracy, or steps below 0.
        values: of each arm what is compared, `[seeds, rates]`.
        combine: from one array for each arm, `[resamples, seeds]`, to one.
        unit: of the result.
        log: whether to average ratios as a geometric mean; where one is 0 or infinite, as a median.
    """
    n = len(scores[0])

    def combined(drawn: np.ndarray) -> np.ndarray:
        rates = [best(np.asarray(s, float)[drawn]) for s in scores]
        at = [np.asarray(v, float)[drawn, rate[:, None]] for v, rate in zip(values, rates, strict=True)]
        return np.asarray(combine(*at), float)

    first = combined(np.arange(n)[None])[0]
    if not np.all(np.isfinite(first) & ((first > 0) | (not log))):
        e = median(first, unit)
        return replace(e, how=f"{e.how}, rates chosen once")

    def statistic(drawn: np.ndarray) -> np.ndarray:
        made = combined(drawn)
        with np.errstate(divide="ignore", invalid="ignore"):  # a ratio of 0 and one of infinity in the same resample
            return np.mean(np.log(made) if log else made, -1)

    spread = statistic(np.random.default_rng(0).integers(n, size=(RESAMPLES, n)))
    spread = spread[np.isfinite(spread)]
    value = float(np.mean(np.log(first) if log else first))
    error = float(np.std(spread)) * math.sqrt(n / (n - 1))
    e = _student(value, error, n, unit, "mean, t interval, rates chosen in each resample")
    return _exponential(e) if log else e


def extremes(values: Any, unit: str = "") -> Estimate:
    """Return the median of `values`, with the smallest and the largest as its interval: for what is exact."""
    v = np.asarray(values, float).ravel()
    low, high = float(v.min()), float(v.max())
    return Estimate(_middle(np.sort(v)), low, high, v.size, unit, "median, smallest and largest", _outside(low, high))


def exact(value: float, how: str, unit: str = "") -> Estimate:
    """Return a number without spread; `how` says of what: a rate that was chosen, a count."""
    value = float(value)
    return Estimate(value, value, value, 1, unit, how, _outside(value, value))


def ratio(above: Any, below: Any) -> np.ndarray:
    """Divide numbers of steps; a number that was never reached is infinite.

    If only `above` was never reached the ratio is infinite, if only `below`, it is 0: both on the side that is known.
    If neither was, nothing is known, and 1 favours neither.
    """
    a, b = np.asarray(above, float), np.asarray(below, float)
    neither = np.isinf(a) & np.isinf(b)
    return np.where(neither, 1.0, a / np.where(neither, 1.0, b))


def best(scores: Any) -> Any:
    """Return the index of the rate with the largest mean of `scores [..., seeds, rates]`, which may be NaN or -inf."""
    return np.argmax(np.nan_to_num(np.asarray(scores, float), nan=-1.0, neginf=-NEVER).mean(-2), -1)


def first_step(steps: Any, curves: Any, target: Any) -> list[Any]:
    """Find for each of `curves [..., logged]` the first of `steps` at `target`, one or `[...]`; or infinity."""
    reached = np.asarray(curves, float) >= np.asarray(target, float)[..., None]
    return np.where(reached.any(-1), np.asarray(steps, float)[np.argmax(reached, -1)], math.inf).tolist()


def at_edge(grid: Sequence[float], **chosen: float) -> str:
    """Say which of the rates `chosen`, by arm, are the lowest or the largest of `grid`; nothing if all are interior."""
    low, high = min(grid), max(grid)
    found = [f"{rate:g} {arm}" for arm, rate in chosen.items() if rate in (low, high) and len(grid) > 1]
    return f"a best rate is at the edge of its grid: {', '.join(found).replace('_', ' ')}" if found else ""


def _clean(values: Any, unit: str) -> np.ndarray:
    v = np.asarray(values, float)
    if np.isnan(v).any() or not v.size:
        raise ValueError(f"an estimate must be of numbers; got {v.tolist()}.")
    return np.where(np.abs(v) < DUST, 0.0, v) if unit in ("pp", "%") else v


def _middle(ordered: np.ndarray) -> float:
    """Return the median; between a number and infinity lies infinity."""
    below, above = float(ordered[(len(ordered) - 1) // 2]), float(ordered[len(ordered) // 2])
    return above if math.isinf(above) else (below + above) / 2
