"""Figures as PNG, in one style: the palette of Okabe and Ito, a light grid, no box."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

from experiments import disk
from experiments.training.summary import quartiles

BLACK, BLUE, SKY, PURPLE, YELLOW, ORANGE = "#000000", "#0072B2", "#56B4E9", "#CC79A7", "#F0E442", "#E69F00"
VERMILION, GREEN = "#D55E00", "#009E73"
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.titlesize": 10,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "legend.fontsize": 8,
    "legend.frameon": False,
}


@contextlib.contextmanager
def open_figure(path: Path, rows: int, columns: int, size: tuple[float, float]) -> Iterator[tuple[Any, Any]]:
    """Open a figure of `size` inches with its panels `[rows, columns]`, and write it when they are drawn."""
    mpl.use("Agg")
    with mpl.rc_context(STYLE):
        fig, panels = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        yield fig, panels
        disk.write_figure(path, fig, dpi=150)
        plt.close(fig)


def band(panel: Any, x: Any, values: Any, color: str, dashes: Any, alpha: float, label: str) -> None:
    """Draw a line for the median of `values [n, len(x)]` and a band for the quartiles.

    A run that diverged is above every scale; where half of them have, the line ends.
    """
    median, low, high = quartiles(np.asarray(values, float))
    panel.plot(x, np.where(np.isfinite(median), median, np.nan), color=color, ls=dashes, lw=1.8, label=label)
    panel.fill_between(x, low, high, where=np.isfinite(high), color=color, alpha=alpha, lw=0)
