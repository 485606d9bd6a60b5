"""Claim 8: the estimates and the figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims._lib import plots
from experiments.claims._lib.compare import Arm, at_best, better, edge, level, moved
from experiments.claims._lib.intervals import Estimate, tuned
from experiments.claims._lib.verdict import Estimates

ROWS = {
    "none": ("no norm", "none"),
    "none_0.2": ("dropout 0.2", "none"),
    "none_0.5": ("dropout 0.5", "none"),
    "batch": ("batch norm", "batch"),
    "batch_0.2": ("and dropout 0.2 after", "batch"),
    "batch_0.5": ("and dropout 0.5 after", "batch"),
    "whole": ("statistics of all images", "pooled"),
    "ghost_8": ("ghost batches of 8", "noise"),
}


def estimates(found: dict[str, Any]) -> Estimates:
    """Return the estimates by the keys of the criteria."""
    made: Estimates = {}
    for data in ("digits", "mnist"):
        run = found[data]
        made |= {
            f"dropout_{data}": _with_dropout(run, "batch"),
            f"overfitting_{data}": better((run, "batch"), (run, "none")),
            f"plain_{data}": level((run, "none")),
            f"batch_{data}": level((run, "batch")),
            f"moved_{data}": moved((run, "none")),
            f"fitted_{data}": min((level((run, arm), "train") for arm in ROWS if arm in run), key=lambda e: e.value),
        }
    run = found["digits"]
    return made | {
        "noise_digits": better((run, "batch"), (found["still"], "whole")),
        "dropout_plain_digits": _with_dropout(run, "none"),
        "ghost_8": better((run, "ghost_8"), (run, "batch")),
    }


def _with_dropout(run: dict[str, Any], norm: str) -> Estimate:
    """Return what dropout adds at the better of the rates it had, which validation chooses with the learning rate."""
    kinds = tuple(arm for arm in (f"{norm}_0.2", f"{norm}_0.5") if arm in run)
    scores, values = (np.concatenate([run[arm][what] for arm in kinds], 1) for what in ("validation", "test"))
    made = tuned([scores, run[norm]["validation"]], [values, run[norm]["test"]], lambda a, b: 100 * (a - b), "pp")
    arms: tuple[Arm, ...] = ((run, norm), *((run, arm) for arm in kinds))
    return made.with_caveat(edge(arms, [run[arm]["validation"] for _, arm in arms]))


def draw(found: dict[str, Any], figure: Figure) -> tuple[str, str]:
    """Draw the test accuracy of all arms on both sets of images, less that of batch norm."""
    panels = figure.subplots(1, 2)
    for panel, (data, title) in zip(panels, (("digits", "200 digits"), ("mnist", "200 images of MNIST")), strict=True):
        run = found[data]
        of = {arm: (run, arm) for arm in ROWS if arm in run}
        of |= {"whole": (found["still"], "whole")} if data == "digits" else {}
        base = 100 * at_best(of["batch"])
        shown = {ROWS[key][0]: (ROWS[key][1], 100 * at_best(arm) - base) for key, arm in of.items()}
        plots.strip(panel, shown)
        panel.axvline(0, color="black", lw=0.8, ls=":")
        plots.finish(panel, "test accuracy less that of batch norm, points", "", title)
    run = found["digits"]
    gains = [f"{100 * np.mean(at_best((run, arm))):.1f}% {ROWS[arm][0]}" for arm in ("none", "none_0.2", "batch")]
    means = f"Mean test accuracy after 200 digits: {', '.join(gains)}"
    n = [len(found[data]["batch"]["test"]) for data in ("digits", "mnist")]
    return "Dots of test accuracy less that of batch norm, for each arm on digits and on MNIST.", (
        f"{means}. Dots: splits, n = {n[0]} and {n[1]}; bars: medians; each arm at its best rate."
    )
