"""Claim 8: the estimates and the figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims._lib import plots
from experiments.claims._lib.compare import Arm, better, edge, level, moved
from experiments.claims._lib.intervals import Estimate, exact, tuned
from experiments.claims._lib.verdict import Estimates

ROWS = {
    "none": ("no norm", "none"),
    "none_0.2": ("no norm, dropout 0.2", "none"),
    "none_0.5": ("no norm, dropout 0.5", "none"),
    "batch": ("batch norm", "batch"),
    "batch_0.2": ("batch norm, dropout 0.2", "batch"),
    "batch_0.5": ("batch norm, dropout 0.5", "batch"),
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
            f"train_{data}": better((run, "batch"), (run, "none"), "train"),
            f"train_plain_{data}": level((run, "none"), "train"),
            f"moved_{data}": moved((run, "none")),
            f"fitted_{data}": min((level((run, arm), "train") for arm in ROWS if arm in run), key=lambda e: e.value),
        }
    run = found["digits"]
    return made | {
        "noise_digits": better((run, "batch"), (found["still"], "whole")),
        "train_dropout_digits": better((run, "batch_0.2"), (run, "batch"), "train"),
        "dropout_plain_digits": _with_dropout(run, "none"),
        "steps": exact(float(run["steps"]), "counted"),
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
    panels, said = figure.subplots(1, 2, sharex=True, sharey=True), []
    for panel, (data, title) in zip(panels, (("digits", "200 digits"), ("mnist", "200 images of MNIST")), strict=True):
        run = found[data]
        of = {arm: (run, arm) for arm in ROWS if arm in run and arm != "batch"}
        of |= {"whole": (found["still"], "whole")} if data == "digits" else {}
        rows = {key: better(arm, (run, "batch")) for key, arm in of.items()}
        shown = {name: (arm, rows.get(key)) for key, (name, arm) in ROWS.items() if key != "batch"}
        plots.effects(panel, shown, 0.0)
        plots.finish(panel, "test accuracy minus that of batch norm, points", "", title)
        told = (key for key in ("none", "batch_0.2", "ghost_8", "whole") if key in rows)
        said.append(f"{title}: {', '.join(f'{ROWS[key][0]} {rows[key].value:+.2f}' for key in told)}")
    gains = {data: better((found[data], "batch"), (found[data], "none")).value for data in ("digits", "mnist")}
    n = [len(found[data]["batch"]["test"]) for data in ("digits", "mnist")]
    return f"Test accuracy minus that of batch norm: {'; '.join(said)}.", (
        f"With 200 training images, batch norm changes test accuracy by {gains['digits']:+.2f} points on digits and "
        f"{gains['mnist']:+.2f} on MNIST. Means with 95% intervals of {n[0]} and {n[1]} splits, at the best rates; "
        "empty rows were not measured."
    )
