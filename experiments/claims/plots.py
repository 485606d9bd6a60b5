"""How the figures of the claims look: colours that everyone can tell apart, and dashes beside them."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from experiments.training.summary import quartiles

# From the palette of Okabe and Ito.
STYLES = (
    ("#0072B2", "-"),
    ("#D55E00", "--"),
    ("#009E73", "-."),
    ("#CC79A7", ":"),
    ("#E69F00", (0, (5, 1))),
    ("#56B4E9", (0, (3, 1, 1, 1))),
    ("#000000", (0, (1, 1))),
    ("#8C6D1F", (0, (6, 2, 1, 2))),
)
MARKERS = "osD^vPX*"


def band(panel: Axes, x: Any, values: Any, at: int, label: str) -> None:
    """A line for the median of `values [n, len(x)]` and a band for the quartiles, in the style number `at`."""
    color, dashes = STYLES[at]
    median, low, high = quartiles(np.asarray(values, float))
    panel.plot(x, np.where(np.isfinite(median), median, np.nan), color=color, ls=dashes, lw=1.8, label=label)
    panel.fill_between(x, low, high, where=np.isfinite(high), color=color, alpha=0.18, lw=0)


def points(panel: Axes, x: Any, values: Any, at: int, label: str) -> None:
    """A marker for the median of `values [n, len(x)]` and a bar for the quartiles, in the style number `at`."""
    color, dashes = STYLES[at]
    median, low, high = quartiles(np.asarray(values, float))
    x, shown = np.asarray(x, float), np.isfinite(high)
    bars = np.stack([median - low, high - median])[:, shown]
    style = {"color": color, "ls": dashes, "marker": MARKERS[at], "ms": 5, "lw": 1.5, "capsize": 2}
    panel.errorbar(x[shown], median[shown], bars, label=label, **style)


def strip(panel: Axes, rows: dict[str, Any]) -> None:
    """A row for each name: every value a dot, their median a bar."""
    for at, values in enumerate(rows.values()):
        v = np.asarray(values, float).ravel()
        v = v[np.isfinite(v)]
        color, _ = STYLES[at % len(STYLES)]
        panel.plot(
            v, np.full(v.size, -at) + np.linspace(-0.18, 0.18, v.size), ls="", marker=".", color=color, alpha=0.6
        )
        if v.size:
            panel.plot([np.median(v)] * 2, [-at - 0.3, -at + 0.3], color=color, lw=2)
    panel.set_yticks(-np.arange(len(rows)), list(rows))


def finish(panel: Axes, x: str, y: str, title: str = "") -> None:
    """Axes with names and units."""
    panel.set(xlabel=x, ylabel=y)
    panel.set_title(title, fontsize=10)
    panel.grid(alpha=0.3, lw=0.5)
    panel.spines[["top", "right"]].set_visible(False)
