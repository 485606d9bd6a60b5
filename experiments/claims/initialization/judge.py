"""Claim 6: the estimates and the figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims._lib import plots
from experiments.claims._lib.intervals import at_edge, extremes, mean
from experiments.claims._lib.search import at_best
from experiments.claims._lib.verdict import Estimates

LEARNS = 0.9
NAMES = {"batch": "batch norm", "none": "no norm"}


def spans(accuracy: Any, scales: Any) -> np.ndarray:
    """Return how many powers of ten of scales around 1, without a gap, each seed learns at; 0 if not at 1."""
    learned, log = np.array(accuracy)[:, : len(scales)] >= LEARNS, np.log10(scales)
    one = list(scales).index(1.0)
    found = []
    for run in learned:
        low = high = one
        while low > 0 and run[low - 1]:
            low -= 1
        while high + 1 < len(run) and run[high + 1]:
            high += 1
        found.append(log[high] - log[low] if run[one] else 0.0)
    return np.array(found)


def of(found: dict[str, Any], arm: str, what: str, *, tuned: bool) -> np.ndarray:
    """Return `[seeds, starts]` at the rate of He's weights, or at the best rate of each start.

    A smoke run has some starts only, and the nearest stands for the rest.
    """
    runs, rows = found["runs"], []
    for start in (f"{scale:g}" for scale in found["scales"]):
        run = runs.get(start, runs["1"])
        rate = found["rate"][arm]
        at = at_best(run[arm])[0] if tuned or rate not in run["grid"] else run["grid"].index(rate)
        rows.append(np.asarray(run[arm][what], float)[:, at])
    return np.stack(rows, 1)


def estimates(found: dict[str, Any]) -> Estimates:
    """Return the estimates by the keys of the criteria."""
    scales = found["scales"]
    edge = at_edge(found["runs"]["1"]["grid"], no_norm=found["rate"]["none"], batch_norm=found["rate"]["batch"])
    kept = {arm: spans(of(found, arm, "train", tuned=False), scales) for arm in NAMES}
    test = {arm: of(found, arm, "test", tuned=True) for arm in NAMES}
    tuned = {arm: spans(values, scales) for arm, values in test.items()}
    # A smoke run has some scales only, and He's stands for the rest.
    last = {
        arm: spans(np.stack([found["last"][arm].get(f"{s:g}", found["last"][arm]["1"]) for s in scales], 1), scales)
        for arm in NAMES
    }
    batch, one, hundred = test["batch"], scales.index(1.0), scales.index(100.0)
    return {
        "span_test": mean(tuned["batch"] - tuned["none"]),
        "hundred_test": mean(100 * (batch[:, hundred] - batch[:, one]), "pp"),
        "ten_test": mean(100 * (batch[:, scales.index(10.0)] - batch[:, one]), "pp"),
        "zero": mean(100 * np.array(found["zero"]), "%"),
        "constant": mean(100 * np.array(found["equal"]), "%"),
        "span": mean(kept["batch"] - kept["none"]).with_caveat(edge),
        "span_batch": mean(tuned["batch"]),
        "span_plain": mean(tuned["none"]),
        "span_all": mean(last["batch"] - last["none"]),
        "hundred": mean(100 * of(found, "batch", "train", tuned=True)[:, hundred], "%"),
        "thousandth": mean(100 * of(found, "batch", "train", tuned=False)[:, 0], "%"),
        "thousandth_small_epsilon": mean(100 * np.array(found["small_epsilon"]), "%"),
        "same_training": extremes(np.concatenate([np.array(v) for v in found["same_training"].values()])),
    }


def draw(found: dict[str, Any], figure: Figure) -> tuple[str, str]:
    """Draw test accuracy, and training accuracy at the rate of He's weights, against the weights' scale."""
    left, right = figure.subplots(1, 2, sharey=True)
    scales = found["scales"]
    shown = ((left, "test", True, "test, rate tuned at each scale"), (right, "train", False, "training, one rate"))
    medians = {}
    for panel, what, tuned, title in shown:
        for arm, name in NAMES.items():
            accuracy = of(found, arm, what, tuned=tuned)[:, : len(scales)]
            medians[arm, what] = np.median(accuracy, 0)
            plots.points(panel, scales, accuracy, arm, name if tuned else f"{name}, rate {found['rate'][arm]:.2g}")
        panel.axhline(LEARNS, color="0.4", lw=0.8, ls=":")
        names = ("scale of the hidden weights over He's", "accuracy")
        plots.finish(panel, *names, title, "lower center", xscale="log", ylim=(0, 1))
    learned = {arm: int(np.sum(medians[arm, "test"] >= LEARNS)) for arm in NAMES}
    n = len(found["small_epsilon"])
    alt = (
        f"Accuracy against the scale of the hidden weights, from {scales[0]:g} to {scales[-1]:g}; on test images it is "
        f"at least {LEARNS} at {learned['batch']} of {len(scales)} with batch norm and at {learned['none']} without."
    )
    return alt, (
        f"With batch norm the network tests at {LEARNS:.0%} or more at {learned['batch']} of {len(scales)} scales, "
        f"without at {learned['none']}. Medians and quartiles, n = {n} splits of one seed; dotted: what counts."
    )
