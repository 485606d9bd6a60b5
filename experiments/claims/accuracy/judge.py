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
    """Draw test accuracies of both arms, and the differences seed by seed where both learn."""
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    gains = {kind: 100 * (at_best((found[kind], "batch")) - at_best((found[kind], "none"))) for kind in KINDS}
    for at, kind in enumerate(KINDS):
        for arm, label in (("batch", "batch norm"), ("none", "no norm")):
            y = -at + (0.17 if arm == "batch" else -0.17)
            v, look = 100 * at_best((found[kind], arm)), plots.style(arm) | {"ls": "", "ms": 3, "alpha": 0.5}
            left.plot(v, y + np.linspace(-0.1, 0.1, v.size), label=None if at else label, **look)
            left.plot([np.mean(v)] * 2, [y - 0.16, y + 0.16], color=look["color"], lw=2)
    left.set_yticks(-np.arange(len(KINDS)), list(KINDS.values()))
    plots.finish(left, "test accuracy, %", "", "each arm at its best rate", "lower center", xlim=(None, 100))
    plots.strip(right, {KINDS[kind]: ("batch", gain) for kind, gain in gains.items() if kind != "deep"})
    right.axvline(0, color="black", lw=1)
    plots.finish(right, "gain, percentage points", "", "split by split")
    said = ", ".join(f"{np.mean(gain):+.1f} points with {KINDS[kind]}" for kind, gain in gains.items())
    alt = f"Dots of test accuracy for five networks with batch norm and without, and of the differences: {said}."
    counts = " or ".join(sorted({str(len(gain)) for gain in gains.values()}))
    return (
        alt,
        f"Mean gains by batch norm: {said}. Dots: splits, n = {counts}; bars: means, right medians.",
    )
