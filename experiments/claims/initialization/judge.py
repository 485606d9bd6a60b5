"""Claim 6: the estimates and the figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims._lib import plots
from experiments.claims._lib.intervals import at_edge, exact, extremes, mean
from experiments.claims._lib.search import at_best
from experiments.claims._lib.verdict import Estimates

LEARNS, SAME = 0.9, 1e-3
NAMES = {"batch": "batch norm", "none": "no norm"}


def spans(accuracy: Any, scales: Any) -> np.ndarray:
    """Return how many powers of ten of scales around 1, without a gap, each seed learns at; 0 if not at 1."""
    learned, log = np.array(accuracy)[:, : len(scales)] >= LEARNS, np.log10(scales)
    one = list(scales).index(1.0)
    # How many scales in a row from 1 on, this among them whether or not a seed learns there.
    sides = (learned[:, one::-1], learned[:, one:])
    smaller, larger = (np.maximum(np.cumprod(side, 1).sum(1), 1) for side in sides)
    return log[one + larger - 1] - log[one + 1 - smaller]


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
    train = {arm: of(found, arm, "train", tuned=True) for arm in NAMES}
    plain = np.asarray(found["runs"].get("3", found["runs"]["1"])["none"]["train"], float)
    same = np.concatenate([np.array(v) for v in found["same_training"].values()])
    # A smoke run has some scales only, and He's stands for the rest.
    last = {
        arm: spans(np.stack([found["last"][arm].get(f"{s:g}", found["last"][arm]["1"]) for s in scales], 1), scales)
        for arm in NAMES
    }
    batch, one, three, hundred = test["batch"], *(scales.index(scale) for scale in (1.0, 3.0, 100.0))
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
        "span_train": mean(spans(train["batch"], scales) - spans(train["none"], scales)),
        "three_test": mean(100 * test["none"][:, three], "%"),
        "three_train": mean(100 * train["none"][:, three], "%"),
        "three_most": mean(100 * plain[:, np.argmax(np.mean(plain, 0))], "%"),
        "hundred": mean(100 * train["batch"][:, hundred], "%"),
        "thousandth": mean(100 * of(found, "batch", "train", tuned=False)[:, 0], "%"),
        "thousandth_small_epsilon": mean(100 * np.array(found["small_epsilon"]), "%"),
        "same_training": extremes(same),
        "same_within": extremes(same[same <= max(SAME, np.min(same))]),
        "same_apart": exact(float(np.sum(same > SAME)), "counted"),
    }


def draw(found: dict[str, Any], figure: Figure) -> tuple[str, str]:
    """Draw test and training accuracy against the weights' scale, at the best rates and at that of He's weights."""
    scales, medians = found["scales"], {}
    shown = (
        ("test", True, "test, rate tuned"),
        ("train", True, "training, rate tuned"),
        ("train", False, "training, best rate at 1"),
    )
    panels = figure.subplots(1, len(shown), sharey=True)
    for panel, (what, tuned, title) in zip(panels, shown, strict=True):
        for arm, name in NAMES.items():
            accuracy = 100 * of(found, arm, what, tuned=tuned)[:, : len(scales)]
            medians[arm, what, tuned] = np.median(accuracy, 0)
            plots.points(panel, scales, accuracy, arm, name)
        panel.axhline(100 * LEARNS, color="0.4", lw=0.8, ls=":")
        plots.finish(panel, "scale of hidden weights over He's", "", title, "center left", xscale="log", ylim=(0, 103))
    panels[0].set_ylabel("accuracy, %")
    learned, trained = (
        {arm: int(np.sum(medians[arm, what, True] >= 100 * LEARNS)) for arm in NAMES} for what in ("test", "train")
    )
    n = len(found["small_epsilon"])
    least, peak = np.min(medians["batch", "test", True]), scales[int(np.argmax(medians["none", "test", True]))]
    alt = (
        f"Accuracy against the scale of the hidden weights: on test images at least {least:.0f}% with batch norm; "
        f"without norm a peak at {peak:g}."
    )
    return alt, (
        f"With batch norm the network tests at {LEARNS:.0%} or more at {learned['batch']} of {len(scales)} scales, "
        f"without at {learned['none']}; it trains to that at {trained['batch']} and {trained['none']}. "
        f"Medians and quartiles, n = {n} splits; dotted: what counts."
    )
