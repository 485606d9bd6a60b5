"""Claim 2: the estimates and the figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims._lib import plots
from experiments.claims._lib.compare import at_best, better, level
from experiments.claims._lib.intervals import Estimate, at_edge, best, geometric, mean, tuned
from experiments.claims._lib.verdict import Estimates, listed

LEARNS = 0.5  # validation accuracy, or the share that is explained, of both arms at a rate that counts as common
NAMES = {"batch": "batch norm", "none": "no norm", "noisy": "noisy batch norm", "noise": "no norm, same noise"}
ARMS, ALL = ("batch", "none"), slice(None)


def estimates(found: dict[str, Any]) -> Estimates:
    """Return the estimates by the keys of the criteria."""
    drift, relu, linear, noise = (found[name] for name in ("drift", "relu", "linear", "noise"))
    return {
        "drift_common": _ratio(drift, "inputs"),
        "drift_common_scaled": _ratio(drift, "inputs_scaled"),
        "drift_normalized": _ratio(drift, "normalized_scaled"),
        "drift_tuned": _tuned(drift, "inputs", log=True),
        "drift_tuned_scaled": _tuned(drift, "inputs_scaled", log=True),
        "cosine_common": _difference(relu, "cosine"),
        "cosine_linear": _difference(linear, "cosine"),
        "cosine_linear_low": _difference(linear, "cosine", slice(1)),
        "cosine_linear_high": _difference(linear, "cosine", slice(-1, None)),
        "cosine": _tuned(relu, "cosine"),
        "cosine_batch": _mean(relu, "batch", "cosine"),
        "cosine_none": _mean(relu, "none", "cosine"),
        "cosine_linear_none": _mean(linear, "none", "cosine"),
        "change": _ratio(relu, "relative"),
        "change_linear": _ratio(linear, "relative"),
        "unpredicted": _ratio(relu, "unpredicted"),
        "smoothness": _ratio(relu, "smoothness"),
        "loss_range": _ratio(relu, "loss_range"),
        "noisy": better((noise, "batch"), (noise, "noisy")),
        "noisy_and_plain": better((noise, "noisy"), (noise, "none")),
        "noise_alone": better((noise, "none"), (noise, "noise")),
        "noise_level": level((noise, "noise")),
        "noisy_train": better((noise, "batch"), (noise, "noisy"), "train"),
        "noise_train": better((noise, "none"), (noise, "noise"), "train"),
        "noisy_and_noise": better((noise, "noisy"), (noise, "noise")),
    }


def common(run: dict[str, Any], name: str) -> list[int]:
    """Return the rates at which both arms learn and have the numbers `name`; the first if there is none."""
    good = [
        (np.mean(np.nan_to_num(np.asarray(run[arm]["validation"], float)), 0) >= LEARNS)
        & np.isfinite(np.asarray(run[arm][name], float)).all(0)
        for arm in ARMS
    ]
    return [int(at) for at in np.flatnonzero(good[0] & good[1])] or [0]


def _pair(run: dict[str, Any], name: str) -> list[np.ndarray]:
    return [np.asarray(run[arm][name], float)[:, common(run, name)] for arm in ARMS]


def _ratio(run: dict[str, Any], name: str) -> Estimate:
    """Return batch norm over no norm, the geometric mean over the rates that both learn at."""
    batch, none = _pair(run, name)
    return geometric(np.exp(np.mean(np.log(batch / none), 1)))


def _difference(run: dict[str, Any], name: str, some: slice = ALL) -> Estimate:
    """Return batch norm minus no norm, the mean over the rates that both learn at, or `some` of these."""
    return mean(np.mean(np.subtract(*_pair(run, name))[:, some], 1))


def _mean(run: dict[str, Any], arm: str, name: str) -> Estimate:
    return mean(np.mean(_pair(run, name)[ARMS.index(arm)], 1))


def _tuned(run: dict[str, Any], name: str, *, log: bool = False) -> Estimate:
    """Return the comparison of both arms, each at its best rate by validation."""
    scores, values = ([run[arm][kind] for arm in ARMS] for kind in ("validation", name))
    edge = at_edge(run["grid"], **{a: run["grid"][best(s)] for a, s in zip(ARMS, scores, strict=True)})
    return tuned(scores, values, np.divide if log else np.subtract, log=log).with_caveat(edge)


def draw(found: dict[str, Any], figure: Figure) -> tuple[str, str]:
    """Draw one unit's quantiles, the gradients' cosine by rate, and test accuracy with noise."""
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.2))
    drift, relu, noise = found["drift"], found["relu"], found["noise"]
    rate, rates = common(drift, "inputs")[0], np.array(relu["grid"])[common(relu, "cosine")]
    for arm in ARMS:
        unit, look = np.array(found["units"][arm])[rate], plots.style(arm) | {"marker": ""}
        for quantile in range(3):
            more = {"lw": 2, "label": NAMES[arm]} if quantile == 1 else {"lw": 1}
            left.plot(np.linspace(0, drift["steps"], len(unit)), unit[:, quantile], **look, **more)
        plots.points(middle, rates, _pair(relu, "cosine")[ARMS.index(arm)], arm, NAMES[arm])
    title = f"quantiles 15, 50 and 85%,\nrate {drift['grid'][rate]:.2g}"
    plots.finish(left, "training step", "input of one sigmoid", title, "upper left")
    title = "a layer's gradient before and after\nthe earlier layers' step"
    plots.finish(middle, "learning rate", "cosine", title, "lower left", xscale="log", ylim=(0, 1))
    middle.set_xticks(rates, [f"{r:.2g}" for r in rates])
    middle.minorticks_off()
    rows = {label: (arm, 100 * at_best((noise, arm))) for arm, label in NAMES.items()}
    plots.strip(right, rows)
    plots.finish(
        right, "test accuracy, %", "", "10 ReLU layers, with noise\nmeant to restore the shift", xlim=(None, 100)
    )
    low, high = left.get_ylim()
    left.set_ylim(low, high + 0.2 * (high - low))  # room for the legend above the lines
    means, n = [f"{np.mean(v):.2f}" for v in _pair(relu, "cosine")], len(relu["batch"]["test"])
    wander = [f"{np.ptp(np.array(found['units'][arm])[rate, :, 1]):.1f}" for arm in ARMS]
    tests = listed([f"{np.median(v):.1f}% with {k.replace(', ', ' and the ')}" for k, (_, v) in rows.items()])
    alt = (
        f"The median input of a unit, which wanders over a range of {wander[0]} with batch norm and {wander[1]} "
        "without; cosines by learning rate; test accuracies with and without noise."
    )
    return alt, (
        f"At equal rates the cosine of a layer's gradients is {means[0]} with batch norm and {means[1]} without "
        f"(middle: medians and quartiles); test accuracy is {tests} (right: medians, best rates). "
        f"Left: one unit. n = {n} splits."
    )
