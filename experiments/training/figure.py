"""The figure of a run: training loss and validation accuracy against steps, one line for each arm."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.layout_engine import ConstrainedLayoutEngine

from experiments import disk
from experiments.training.record import Row
from experiments.training.summary import NAMES, best_rate, curves, quartiles

# From the palette of Okabe and Ito; the lines differ in dashes as well.
STYLES = {
    "batch": ("#0072B2", "-"),
    "none": ("#D55E00", "--"),
    "ghost": ("#009E73", "-."),
    "renorm": ("#CC79A7", "-."),
    "group": ("#D55E00", ":"),
    "domains": ("#E69F00", ":"),
    "conditional": ("#56B4E9", "-."),
    "whiten": ("#000000", "-."),
}
PANELS = (("train_loss", "training loss (cross-entropy)"), ("val_accuracy", "validation accuracy"))


class Line(NamedTuple):
    """A line of the figure: an arm at a learning rate.

    Attributes:
        label: in the legend.
        rows: of the log that it is drawn from.
        arm, rate: which of them.
        color, dashes: how it looks.
    """

    label: str
    rows: Sequence[Row]
    arm: str
    rate: float
    color: str
    dashes: str


def lines(rows: Sequence[Row]) -> list[Line]:
    """Each arm of a log at its best learning rate by validation."""
    arms = [(arm, best_rate(rows, arm)) for arm in dict.fromkeys(r["arm"] for r in rows)]
    return [Line(f"{NAMES[arm]}, learning rate {rate:g}", rows, arm, rate, *STYLES[arm]) for arm, rate in arms]


def draw(path: Path, drawn: Sequence[Line], title: str, target: float | None) -> None:
    """Draw the medians over seeds, and their quartiles, to a PNG at `path`."""
    mpl.use("Agg")
    fig, panels = plt.subplots(1, 2, figsize=(9.6, 4.0), layout=ConstrainedLayoutEngine(w_pad=0.1))
    for line in drawn:
        for panel, (measure, _) in zip(panels, PANELS, strict=True):
            c = curves(line.rows, line.arm, line.rate, measure)
            median, low, high = quartiles(c.values)
            # A run that diverged is above every scale; where half of them have, the line ends.
            shown = np.where(np.isfinite(median), median, np.nan)
            panel.plot(c.steps, shown, color=line.color, ls=line.dashes, lw=1.8, label=line.label)
            panel.fill_between(c.steps, low, high, where=np.isfinite(high), color=line.color, alpha=0.2, lw=0)
    for panel, (_, label) in zip(panels, PANELS, strict=True):
        panel.set(xlabel="training step", ylabel=label, xlim=(0, None))
        panel.grid(alpha=0.3, lw=0.5)
        panel.spines[["top", "right"]].set_visible(False)
    loss, accuracy = panels
    loss.set_yscale("log")
    accuracy.set_ylim(0, 1)
    if target is not None:
        accuracy.axhline(target, color="0.4", lw=0.8, ls=":", label=f"target {target:g}")
    accuracy.legend(loc="lower right", frameon=False, fontsize=8)
    fig.suptitle(title, fontsize=10)
    disk.write_figure(path, fig, dpi=150)
    plt.close(fig)
