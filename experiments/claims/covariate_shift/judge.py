"""Claim 2: the estimates and the figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims._lib import plots
from experiments.claims._lib.intervals import Estimate, at_edge, mean, median, tuned
from experiments.claims._lib.verdict import Estimates

EVERY = 50  # steps between two observations of the ReLU network
LEARNS = 0.5  # validation accuracy of both arms at a rate that counts as common
EACH = ("cosine_relu_batch", "cosine_relu_none", "cosine_linear_batch", "cosine_linear_none")
NAMES = {"batch": "batch norm", "none": "no norm", "noisy": "noisy batch norm", "noise": "no norm, same noise"}


def estimates(found: dict[str, Any]) -> Estimates:
    """Return the estimates by the keys of the criteria."""

    def drifts(name: str, best: bool) -> Estimate:
        batch, none = (found[f"drift_{arm}"] for arm in ("batch", "none"))
        at = [part["best"] if best else found["rates"].index(0.1) for part in (batch, none)]
        e = median(np.array(batch[name])[:, at[0]] / np.array(none[name])[:, at[1]])
        rates = found["rates"]
        edge = at_edge(rates, batch_norm=rates[at[0]], no_norm=rates[at[1]]) if best else ""
        return e.with_caveat(edge)

    def pair(kind: str, name: str, at: int | None = None) -> list[np.ndarray]:
        parts = [found[f"{kind}_{arm}"] for arm in ("batch", "none")]
        return [np.array(p[name])[:, p["best"] if at is None else at] for p in parts]

    def cosine(kind: str) -> Estimate:
        parts = [found[f"{kind}_{arm}"] for arm in ("batch", "none")]
        scores, values = ([p[name] for p in parts] for name in ("val_accuracy", "cosine"))
        e = tuned(scores, values, lambda a, b: a - b)
        if kind == "linear":  # no classes: the rate is chosen by the loss, of which only the mean over seeds is kept
            e = mean(np.subtract(*pair(kind, "cosine")))
        best = [found[f"{kind}_rates"][p["best"]] for p in parts]
        return e.with_caveat(at_edge(found[f"{kind}_rates"], batch_norm=best[0], no_norm=best[1]))

    test = {arm: 100 * np.array(found[f"relu_{arm}"]["test"]) for arm in NAMES}
    each = [mean(pair(kind, "cosine")[at]) for kind in ("relu", "linear") for at in (0, 1)]
    return {
        "drift": drifts("inputs", False),
        "drift_scaled": drifts("inputs_scaled", False),
        "drift_tuned": drifts("inputs", True),
        "drift_tuned_scaled": drifts("inputs_scaled", True),
        "drift_normalized": drifts("normalized_scaled", False),
        "cosine_common": mean(np.mean([np.subtract(*pair("relu", "cosine", at)) for at in common(found)], 0)),
        "cosine": cosine("relu"),
        "cosine_linear": cosine("linear"),
        "change": median(np.divide(*pair("relu", "relative"))),
        "change_linear": median(np.divide(*pair("linear", "relative"))),
        "cosine_small_rate": mean(np.subtract(*pair("linear", "cosine", 0))),
        **dict(zip(EACH, each, strict=True)),
        "noisy": mean(test["batch"] - test["noisy"], "pp"),
        "noisy_and_plain": mean(test["noisy"] - test["none"], "pp"),
        "noise_alone": mean(test["none"] - test["noise"], "pp"),
    }


def common(found: dict[str, Any]) -> list[int]:
    """Return the rates at which both ReLU networks learn and have gradients to compare; the first if there is none."""
    good = [
        (np.mean(found[f"relu_{arm}"]["val_accuracy"], 0) >= LEARNS)
        & np.isfinite(found[f"relu_{arm}"]["cosine"]).all(0)
        for arm in ("batch", "none")
    ]
    return [int(at) for at in np.flatnonzero(good[0] & good[1])] or [0]


def draw(found: dict[str, Any], figure: Figure) -> tuple[str, str]:
    """Draw one unit's quantiles, the gradients' cosine by rate, and learning with noise."""
    left, middle, right = figure.subplots(1, 3)
    for arm in ("batch", "none"):
        part = found[f"drift_{arm}"]
        unit, look = np.array(part["inputs_unit"])[:, found["rates"].index(0.1)], plots.style(arm) | {"marker": ""}
        for quantile in range(3):
            more = {"lw": 2, "label": NAMES[arm]} if quantile == 1 else {"lw": 1}
            left.plot(np.linspace(0, found["steps"], len(unit)), unit[:, quantile], **look, **more)
        rates = np.array(found["relu_rates"])[common(found)]
        cosines = np.array(found[f"relu_{arm}"]["cosine"])[:, common(found)]
        plots.points(middle, rates, cosines, arm, NAMES[arm])
    for arm, name in NAMES.items():
        curve = found[f"relu_{arm}"]["val_curve"]
        plots.band(right, EVERY * np.arange(1, len(curve[0]) + 1), curve, arm, name)
    title = "quantiles 15, 50 and 85%,\nrate 0.1"
    plots.finish(left, "training step", "input of one sigmoid", title, "upper left")
    title = "a layer's gradient before and after\nthe earlier layers' step"
    plots.finish(middle, "learning rate", "cosine", title, "lower left", xscale="log", ylim=(0, 1))
    middle.set_xticks(rates, [f"{rate:.2g}" for rate in rates])
    middle.minorticks_off()
    title = "with noise that restores the shift"
    plots.finish(right, "training step", "validation accuracy", title, "lower right", ylim=(0, 1))
    low, high = left.get_ylim()
    left.set_ylim(low, high + 0.2 * (high - low))  # room for the legend above the lines
    means = [np.mean(np.array(found[f"relu_{arm}"]["cosine"])[:, common(found)]) for arm in ("batch", "none")]
    alt = (
        "Quantiles of one unit's input over training; the cosine between gradients before and after the earlier "
        f"layers' step by learning rate, {means[0]:.2f} with batch norm and {means[1]:.2f} without; and validation "
        "accuracy of four networks with and without noise."
    )
    n = len(found["relu_batch"]["test"])
    return alt, (
        f"Left: one unit of the last hidden layer, first seed. Middle: ReLU network, rates that both learn at. "
        f"Right: each network at its best rate. Middle and right: median of n = {n} seeds, bars and bands quartiles."
    )
