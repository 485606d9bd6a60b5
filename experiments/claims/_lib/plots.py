"""The style of the figures: one colour, one dash and one marker for each arm, the same in all of them."""

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from experiments import figures
from experiments.claims._lib.intervals import Estimate
from experiments.training.summary import quartiles

# From the palette of Okabe and Ito, which everyone can tell apart.
BLUE, ORANGE, GREEN, PINK, YELLOW, SKY, BLACK, BROWN = (
    ("#0072B2", "-", "o"),
    ("#D55E00", "--", "s"),
    ("#009E73", "-.", "D"),
    ("#CC79A7", ":", "^"),
    ("#E69F00", (0, (5, 1)), "v"),
    ("#56B4E9", (0, (3, 1, 1, 1)), "P"),
    ("#000000", (0, (1, 1)), "X"),
    ("#8C6D1F", (0, (6, 2, 1, 2)), "*"),
)
# Running averages are purple, darker the longer they remember.
LIGHT, MIDDLE, DARK = (("#B79AE0", "-.", "D"), ("#7E4FBF", ":", "^"), ("#3F1A73", (0, (5, 1)), "v"))
# Blue is batch norm as it is, orange no norm; what replaces or changes batch norm has the others.
STYLES = {
    "batch": BLUE,
    "none": ORANGE,
    **dict.fromkeys(("after", "whiten_within", "group"), GREEN),
    "noise": PINK,
    "skip": YELLOW,
    **dict.fromkeys(("noisy", "whiten"), SKY),
    "pooled": BLACK,
    "other": BROWN,
    **{"0.9": LIGHT, "0.99": MIDDLE, "0.999": DARK, "0.999 debiased": (DARK[0], (0, (1, 1)), "P")},
}


def style(arm: str) -> dict[str, Any]:
    """Return the colour, the dashes and the marker of an arm."""
    return dict(zip(("color", "ls", "marker"), STYLES[arm], strict=True))


def band(panel: Axes, x: Any, values: Any, arm: str, label: str) -> None:
    """Draw a line for the median of `values [n, len(x)]` and a band for the quartiles."""
    color, dashes, _ = STYLES[arm]
    figures.band(panel, x, values, color, dashes, 0.18, label)


def points(panel: Axes, x: Any, values: Any, arm: str, label: str, **options: Any) -> None:
    """Draw a marker for the median of `values [n, len(x)]`, or a list of those of each x, and a bar for quartiles."""
    columns = values if isinstance(values, list) else np.asarray(values, float).T
    quarters = np.stack([quartiles(np.asarray(v, float)) for v in columns], 1)
    shown = np.isfinite(quarters[2])
    median, low, high = quarters[:, shown]
    look = style(arm) | {"ms": 5, "lw": 1.5, "capsize": 2} | options
    panel.errorbar(np.asarray(x, float)[shown], median, np.stack([median - low, high - median]), label=label, **look)


def strip(panel: Axes, rows: dict[str, tuple[str, Any]]) -> None:
    """Draw a row for each name, from `(arm, values)`: every value a dot, their median a bar."""
    for at, (arm, values) in enumerate(rows.values()):
        v = np.asarray(values, float).ravel()
        v = v[np.isfinite(v)]
        color = STYLES[arm][0]
        panel.plot(v, np.linspace(-0.18, 0.18, v.size) - at, ls="", marker=".", color=color, alpha=0.6)
        if v.size:
            panel.plot([np.median(v)] * 2, [-at - 0.3, -at + 0.3], color=color, lw=2)
    panel.set_yticks(-np.arange(len(rows)), list(rows))


def interval(panel: Axes, e: Estimate, y: int | float, arm: str, label: str | None = None, **look: Any) -> None:
    """Draw a number at the height `y`, with its interval."""
    bars = [[e.value - e.low], [e.high - e.value]]
    panel.errorbar([e.value], [y], xerr=bars, label=label, **style(arm) | {"ls": "", "ms": 5, "capsize": 3} | look)


def effects(panel: Axes, rows: dict[str, tuple[str, Estimate | None]], bound: float) -> None:
    """Draw a row for each name, from `(arm, estimate)`: the number with its interval; dashed the criterion `bound`."""
    for at, (arm, e) in enumerate(rows.values()):
        if e:
            interval(panel, e, -at, arm)
    panel.axvline(bound, color="black", lw=1, ls="--")
    panel.set_yticks(-np.arange(len(rows)), list(rows))


def published(panel: Axes, text: str, theirs: tuple[str, float], e: Estimate, ours: str) -> str:
    """Draw a number with its interval beside that of a paper, or a criterion; return both in words."""
    by, value = theirs
    ends = [v for v in (e.low, e.high, e.value, value) if math.isfinite(v)]
    room, own = 0.1 * (max(ends) - min(ends) or 1.0), min(e.value, max(ends))
    bars = [[max(own - max(e.low, min(ends)), 0)], [max(min(e.high, max(ends)) - own, 0)]]
    panel.errorbar([own], [0], xerr=bars, label="ours", color=STYLES["batch"][0], marker="o", capsize=3)
    panel.plot([value], [0], ls="", marker="d", ms=8, mfc="none", color="black", label=by)
    panel.set(yticks=[], xlim=(min(ends) - room, max(ends) + room))
    panel.set_title(text, fontsize=8, loc="left")
    panel.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    panel.grid(visible=False)
    panel.spines["left"].set_visible(False)
    panel.tick_params(labelsize=8)
    return f"{text}: {ours}; {by}: {value:g}"


def finish(panel: Axes, x: str, y: str, title: str = "", legend: Any = None, **axes: Any) -> None:
    """Name the axes with their units; `axes` go to `Axes.set`, `legend` is its place."""
    panel.set(xlabel=x, ylabel=y, **axes)
    panel.set_title(title, fontsize=10)
    if legend and panel.get_legend_handles_labels()[0]:
        panel.legend(loc=legend)
