"""Claim 4: the estimates and the figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims._lib import plots
from experiments.claims._lib.compare import at_best, better, level, moved
from experiments.claims._lib.verdict import Estimates

KINDS = {
    "relu": "3 x 100 ReLU",
    "relu_mnist": "3 x 100 ReLU, MNIST",
    "sigmoid": "3 x 100 sigmoid",
    "few": "8 x 64 ReLU, 300 images",
    "deep": "20 x 64 sigmoid",
}


def estimates(found: dict[str, Any]) -> Estimates:
    """Return the estimates by the keys of the criteria."""
    made: Estimates = {}
    for kind in KINDS:
        none, batch = ((found[kind], arm) for arm in ("none", "batch"))
        made |= {
            kind: better(batch, none),
            f"{kind}_none": level(none),
            f"{kind}_batch": level(batch),
            f"{kind}_train": better(batch, none, "train"),
            f"{kind}_moved": moved(none),
        }
    return made


def draw(found: dict[str, Any], figure: Figure) -> tuple[str, str]:
    """Draw test accuracies of both arms, and the differences split by split where both learn."""
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    gains, made = {}, estimates(found)
    for at, kind in enumerate(KINDS):
        tests = {arm: 100 * at_best((found[kind], arm)) for arm in ("batch", "none")}
        gains[kind] = tests["batch"] - tests["none"]
        for (arm, v), label, y in zip(tests.items(), ("batch norm", "no norm"), (0.17 - at, -0.17 - at), strict=True):
            look = plots.style(arm) | {"ls": "", "ms": 3, "alpha": 0.5}
            left.plot(v, y + np.linspace(-0.1, 0.1, v.size), label=None if at else label, **look)
            left.plot([np.mean(v)] * 2, [y - 0.16, y + 0.16], color=look["color"], lw=2)
    left.set_yticks(-np.arange(len(KINDS)), list(KINDS.values()))
    plots.finish(left, "test accuracy, %", "", "each arm at its best rate", "lower center", xlim=(None, 100))
    shown = [kind for kind in KINDS if kind != "deep"]
    for at, e in enumerate(e for kind in shown if (e := made[kind])):
        v, look = gains[shown[at]], plots.style("batch") | {"ls": "", "ms": 3, "alpha": 0.4}
        right.plot(v, -at - 0.1 - np.linspace(0, 0.2, v.size), **look)
        plots.interval(right, e, -at + 0.1, "batch", ms=6, lw=1.5)
    right.set_yticks(-np.arange(len(shown)), [KINDS[kind] for kind in shown])
    right.axvline(0, color="black", lw=1)
    plots.finish(right, "gain, percentage points", "", "gain and its 95% interval")
    said = ", ".join(f"{np.mean(gain):+.1f} ({KINDS[kind]})" for kind, gain in gains.items())
    counts = [len(gain) for gain in gains.values()]
    apart = sum(bool(e and e.low > 0) for e in (made[kind] for kind in shown))
    alt = (
        f"Dots of test accuracy with batch norm and without, {np.mean(gains['deep']):.0f} points apart for "
        f"{KINDS['deep']}; gains, with an interval above 0 in {apart} of {len(shown)} other networks."
    )
    return alt, (
        f"Mean gains by batch norm, in points: {said}. Dots: n = {min(counts)} to {max(counts)} splits. Inception's "
        "rates were equal, ours are tuned."
    )
