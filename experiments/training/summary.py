"""The summary of a run: each arm at its best learning rate, with its spread over seeds."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.training.record import Row
from experiments.training.shapes import Logged, LoggedBySeed, Values

NAMES = {
    "batch": "batch norm",
    "none": "no norm",
    "ghost": "ghost batches",
    "renorm": "batch renorm",
    "group": "group norm",
    "domains": "norm by domain",
    "conditional": "conditional norm",
    "whiten": "whitening",
}


class Curves(NamedTuple):
    """One measure of one arm at one learning rate; NaN where it was not finite."""

    steps: Logged
    values: LoggedBySeed


class Quartiles(NamedTuple):
    """Median and the ends of the interquartile range."""

    median: np.ndarray
    low: np.ndarray
    high: np.ndarray


def curves(rows: Sequence[Row], arm: str, rate: float, measure: str) -> Curves:
    """Return the values of `measure` against steps, seed by seed."""
    mine = [r for r in rows if r["arm"] == arm and r["learning_rate"] == rate]
    steps, seeds = sorted({r["step"] for r in mine}), sorted({r["seed"] for r in mine})
    at = {(r["seed"], r["step"]): math.nan if r[measure] is None else r[measure] for r in mine}
    return Curves(np.array(steps, float), np.array([[at[seed, step] for step in steps] for seed in seeds], float))


def quartiles(values: Values) -> Quartiles:
    """Return the quartiles along the first axis. Infinity and NaN are censored values, larger than all others."""
    # Between a number and infinity lies infinity; NumPy's quantile makes NaN of it, and so sees a large number instead.
    large = 1e300
    found = np.quantile(np.nan_to_num(np.asarray(values, float), nan=large, posinf=large), [0.5, 0.25, 0.75], axis=0)
    return Quartiles(*np.where(found > large / 1e9, np.inf, found))


def best_rate(rows: Sequence[Row], arm: str) -> float:
    """Return the rate with the highest final validation accuracy, the median over seeds; ties to the lower loss."""

    def merit(rate: float) -> tuple[float, float]:
        accuracy, loss = (curves(rows, arm, rate, m).values[:, -1] for m in ("val_accuracy", "val_loss"))
        return float(np.median(accuracy)), -float(np.median(np.nan_to_num(loss, nan=np.inf)))

    return max(sorted({r["learning_rate"] for r in rows if r["arm"] == arm}), key=merit)


def summarize(rows: Sequence[Row], target: float, finished: dict[str, Any], chunk: int) -> list[dict[str, Any]]:
    """Return one record for each arm that has been logged.

    Args:
        rows: of the log.
        target: validation accuracy to reach.
        finished: of each arm `test_accuracy` of each seed on the test images at the best rate; `seconds` of each chunk
            since the run began or was resumed, of which the first compiles; and `evaluations` if there are others.
        chunk: steps in a chunk.
    """
    records = []
    for arm, found in finished.items():
        rate, (first, *timed) = best_rate(rows, arm), found["seconds"]
        typical = float(np.median(timed)) if timed else None
        steps, accuracy = curves(rows, arm, rate, "val_accuracy")
        reached = [next((int(s) for s, v in zip(steps, run, strict=True) if v >= target), None) for run in accuracy]
        record = {
            "arm": arm,
            "learning_rate": rate,
            "steps": int(steps[-1]),
            "target_accuracy": target,
            "steps_to_target": reached,  # of each seed; None if it was never
            "test_accuracy": found["test_accuracy"],
            "seconds_per_step": None if typical is None else typical / chunk,
            "seconds_to_compile": None if typical is None else first - typical,
        }
        records.append(record | {k: v for k, v in found.items() if k == "evaluations"})
    return records


def evaluations(record: dict[str, Any]) -> list[str]:
    """Return a line for each other way to evaluate an arm."""
    return [f"{name}: {percent(accuracy)} %" for name, accuracy in record.get("evaluations", {}).items()]


def results(record: dict[str, Any]) -> list[str]:
    """Format the results of an arm: test accuracy in percent, steps to the target, milliseconds of a step."""
    reached = [math.inf if s is None else s for s in record["steps_to_target"]]
    steps, seconds = spread(reached, lambda v: count(v, record["steps"])), record["seconds_per_step"]
    return [percent(record["test_accuracy"]), steps, "-" if seconds is None else f"{1000 * seconds:.2f}"]


def count(steps: float, limit: int) -> str:
    """Format a number of steps; beyond `limit` all that is known is that it is larger."""
    return f"{steps:.0f}" if math.isfinite(steps) else f">{limit}"


def percent(shares: Any) -> str:
    """Format the median and the quartiles of shares in percent."""
    return spread(shares, lambda v: f"{100 * v:.1f}")


def spread(values: Any, shown: Callable[[float], str]) -> str:
    """Format values as `median (low to high)`."""
    q = quartiles(np.array(values, float))
    return f"{shown(float(q.median))} ({shown(float(q.low))} to {shown(float(q.high))})"
