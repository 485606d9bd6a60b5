"""What a run amounts to: each arm at its best learning rate, with its spread over seeds."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

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
    """The values of `measure` against steps, seed by seed."""
    mine = [r for r in rows if r["arm"] == arm and r["learning_rate"] == rate]
    steps, seeds = sorted({r["step"] for r in mine}), sorted({r["seed"] for r in mine})
    at = {(r["seed"], r["step"]): math.nan if r[measure] is None else r[measure] for r in mine}
    return Curves(np.array(steps, float), np.array([[at[seed, step] for step in steps] for seed in seeds], float))


def quartiles(values: Values) -> Quartiles:
    """Of `values` along the first axis. Infinity and NaN are censored values, larger than all others."""
    ordered = np.sort(np.nan_to_num(values, nan=np.inf, posinf=np.inf), axis=0)

    def quantile(q: float) -> np.ndarray:
        at = q * (len(ordered) - 1)
        below, above = ordered[math.floor(at)], ordered[math.ceil(at)]
        # Between a number and infinity lies infinity; NumPy's own quantile makes NaN of it.
        finite = np.isfinite(above)
        step = np.subtract(above, below, out=np.zeros_like(above), where=finite)
        return np.where(finite | (at % 1 == 0), below + at % 1 * step, above)

    return Quartiles(quantile(0.5), quantile(0.25), quantile(0.75))


def best_rate(rows: Sequence[Row], arm: str) -> float:
    """The learning rate with the highest final validation accuracy, the median over seeds; ties to the lower loss."""

    def merit(rate: float) -> tuple[float, float]:
        accuracy, loss = (curves(rows, arm, rate, m).values[:, -1] for m in ("val_accuracy", "val_loss"))
        return float(np.median(accuracy)), -float(np.median(np.nan_to_num(loss, nan=np.inf)))

    return max(sorted({r["learning_rate"] for r in rows if r["arm"] == arm}), key=merit)


def steps_to(rows: Sequence[Row], arm: str, rate: float, target: float) -> list[int | None]:
    """For each seed the first logged step with validation accuracy `target`; None if it was never reached."""
    c = curves(rows, arm, rate, "val_accuracy")
    return [next((int(s) for s, v in zip(c.steps, run, strict=True) if v >= target), None) for run in c.values]


def summarize(
    rows: Sequence[Row],
    target: float,
    finished: dict[str, Any],
    chunk: int,
) -> list[dict[str, Any]]:
    """One record for each arm that has been logged.

    Args:
        rows: of the log.
        target: validation accuracy to reach.
        finished: of each arm `test_accuracy` of each seed on the test images at the best rate; `seconds` of each chunk
            since the run began or was resumed, of which the first compiles; and `evaluations` if there are others.
        chunk: steps in a chunk.
    """
    records = []
    for arm, found in finished.items():
        rate, seconds = best_rate(rows, arm), found["seconds"]
        timed = seconds[1:]
        records.append(
            {
                "arm": arm,
                "learning_rate": rate,
                "steps": int(curves(rows, arm, rate, "val_loss").steps[-1]),
                "target_accuracy": target,
                "steps_to_target": steps_to(rows, arm, rate, target),
                "test_accuracy": found["test_accuracy"],
                "seconds_per_step": float(np.median(timed)) / chunk if timed else None,
                "seconds_to_compile": seconds[0] - float(np.median(timed)) if timed else None,
            }
        )
        if "evaluations" in found:
            records[-1]["evaluations"] = found["evaluations"]
    return records


def table(records: Sequence[dict[str, Any]], caption: str) -> Table:
    """The summary for the terminal."""
    target = records[0]["target_accuracy"] if records else 0
    out = Table(caption=caption, caption_justify="left")
    out.add_column("arm")
    for heading in ("rate", "n", "test accuracy, %", f"steps to {target:.0%}", "ms/step"):
        out.add_column(heading, justify="right")
    for r in records:
        accuracy = quartiles(np.array(r["test_accuracy"], float))
        reached = quartiles(np.array([math.inf if s is None else s for s in r["steps_to_target"]], float))
        time = "-" if r["seconds_per_step"] is None else f"{1000 * r['seconds_per_step']:.2f}"
        out.add_row(
            NAMES[r["arm"]],
            f"{r['learning_rate']:g}",
            str(len(r["test_accuracy"])),
            spread(accuracy, lambda v: f"{100 * v:.1f}"),
            spread(reached, partial(count, limit=r["steps"])),
            time,
        )
    return out


def evaluations(records: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each other way to evaluate."""
    return [
        f"{name}: {spread(quartiles(np.array(accuracy, float)), lambda v: f'{100 * v:.1f}')} %"
        for r in records
        for name, accuracy in r.get("evaluations", {}).items()
    ]


def count(steps: float, limit: int) -> str:
    """A number of steps; beyond `limit` all that is known is that it is larger."""
    return f"{steps:.0f}" if math.isfinite(steps) else f">{limit}"


def spread(q: Quartiles, shown: Callable[[float], str]) -> str:
    """`median (low to high)`."""
    return f"{shown(float(q.median))} ({shown(float(q.low))} to {shown(float(q.high))})"
