"""The figures: times beside ours, memory, and errors."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

from experiments.benchmark.bars import Results
from experiments.benchmark.sizes import CONTENDERS, OURS
from experiments.figures import BLACK, BLUE, ORANGE, PURPLE, SKY, YELLOW, open_figure

# The markers differ as well.
COLORS = (BLACK, BLUE, SKY, PURPLE, YELLOW, ORANGE)
STYLES = {name: (color, marker) for name, color, marker in zip(CONTENDERS, COLORS, "os^DP*", strict=True)}


def draw(folder: Path, results: Results) -> None:
    """Write `times.png`, `memory.png` and `errors.png`."""
    programs, dtypes = ("forward+backward", "evaluation"), results["plan"]["dtypes"]
    with open_figure(folder / "times.png", len(programs), len(dtypes), (5.2 * len(dtypes) + 1.6, 6.8)) as (fig, panels):
        for i, program in enumerate(programs):
            for j, dtype in enumerate(dtypes):
                wanted = (program, dtype, "relu")
                rows = [r for r in results["times"] if (r["program"], r["dtype"], r["epilogue"]) == wanted]
                _ratios(panels[i, j], rows)
                panels[i, j].set(title=f"{program}, {dtype} + ReLU", ylabel="time / jaxbn's time", xlabel="size of x")
        _finish(fig, panels, "Median over the rounds, with quartiles; above 1 is slower than jaxbn")
    with open_figure(folder / "memory.png", 1, 3, (17.2, 3.4)) as (fig, panels):
        _memory(panels[0], results)
        _finish(fig, panels, "Memory")
    with open_figure(folder / "errors.png", 1, 1, (8.0, 3.8)) as (fig, panels):
        _errors(panels[0, 0], results)
        _finish(fig, panels, "Training output in float32, against float64")


def _ratios(panel: Any, rows: list[dict[str, Any]]) -> None:
    sizes = list(dict.fromkeys(r["size"] for r in rows))
    peers = [n for n in STYLES if n != OURS and any(r["contender"] == n for r in rows)]
    panel.axhline(1, color=STYLES[OURS][0], lw=1)
    for k, name in enumerate(peers):
        own = [r for r in rows if r["contender"] == name]
        at = np.array([sizes.index(r["size"]) for r in own]) + 0.08 * (k - (len(peers) - 1) / 2)
        middle, low, high = (1 / np.array([r["ours_to_theirs"][q] for r in own]) for q in ("median", "high", "low"))
        color, marker = STYLES[name]
        panel.errorbar(at, middle, (middle - low, high - middle), color=color, marker=marker, ls="", label=name, ms=5)
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    panel.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.set_xticks(range(len(sizes)), sizes, rotation=30, ha="right", fontsize=8)


def _memory(panels: Any, results: Results) -> None:
    measures = {
        "kept": "kept for the backward pass of one layer",
        "temporary, scan": "temporary, layers under lax.scan",
        "temporary, scan, rematerialized": "the same, rematerialized",
    }
    dtypes = results["plan"]["dtypes"]
    for panel, (measure, title) in zip(panels, measures.items(), strict=True):
        rows = [r for r in results["measures"] if r["measure"] == measure and r.get("epilogue", "relu") == "relu"]
        names = [n for n in STYLES if any(r["contender"] == n for r in rows)]
        for k, name in enumerate(names):
            values = [next(r["value"] for r in rows if (r["contender"], r["dtype"]) == (name, d)) for d in dtypes]
            at = np.arange(len(dtypes)) + 0.8 * ((k + 0.5) / len(names) - 0.5)
            panel.bar(at, values, 0.8 / len(names), color=STYLES[name][0], label=name, edgecolor="0.3", lw=0.5)
        panel.set(title=f"{title}, with ReLU", ylabel="bytes per element of x and layer", xlabel="dtype of x")
        panel.set_xticks(range(len(dtypes)), dtypes)


def _errors(panel: Any, results: Results) -> None:
    rows = [r for r in results["measures"] if r["measure"] == "error" and not isinstance(r["value"], str)]
    for name in dict.fromkeys(r["contender"] for r in rows):
        x, y = ([r[k] for r in rows if r["contender"] == name] for k in ("mean_to_std", "value"))
        color, marker = STYLES[name]
        panel.plot(x, y, color=color, marker=marker, lw=1.2, ms=5, label=name)
    panel.set_xscale("symlog", linthresh=10)
    panel.set(yscale="log", xlabel="mean / standard deviation of x", ylabel="largest error of y (standard deviations)")


def _finish(fig: Any, panels: Any, title: str) -> None:
    entries = {
        label: handle for p in panels.ravel() for handle, label in zip(*p.get_legend_handles_labels(), strict=True)
    }
    fig.legend(entries.values(), entries.keys(), loc="outside right center")
    fig.suptitle(title)
