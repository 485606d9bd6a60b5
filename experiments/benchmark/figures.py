"""The figures: times beside ours, memory, and errors."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

from experiments import disk
from experiments.benchmark.bars import Results
from experiments.benchmark.sizes import CONTENDERS, OURS

# The palette of Okabe and Ito; the markers differ as well.
COLORS = ("#000000", "#0072B2", "#56B4E9", "#CC79A7", "#F0E442", "#E69F00")
STYLES = {name: (color, marker) for name, color, marker in zip(CONTENDERS, COLORS, "os^DP*", strict=True)}


def draw(folder: Path, results: Results) -> None:
    """Write `times.png`, `memory.png` and `errors.png`."""
    mpl.use("Agg")
    _times(folder / "times.png", results)
    _memory(folder / "memory.png", results)
    _errors(folder / "errors.png", results)


def _times(path: Path, results: Results) -> None:
    programs, dtypes = ("forward+backward", "evaluation"), results["plan"]["dtypes"]
    fig, panels = _panels(len(programs), len(dtypes), (5.2, 3.4))
    for i, program in enumerate(programs):
        for j, dtype in enumerate(dtypes):
            rows = [
                r for r in results["times"] if (r["program"], r["dtype"], r["epilogue"]) == (program, dtype, "relu")
            ]
            _ratios(panels[i, j], rows)
            panels[i, j].set(title=f"{program}, {dtype} + ReLU", ylabel="time / jaxbn's time", xlabel="size of x")
    _finish(fig, panels, path, "Median over the rounds, with quartiles; above 1 is slower than jaxbn")


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


def _memory(path: Path, results: Results) -> None:
    measures = {
        "kept": "kept for the backward pass of one layer",
        "temporary, scan": "temporary, layers under lax.scan",
        "temporary, scan, rematerialized": "the same, rematerialized",
    }
    dtypes = results["plan"]["dtypes"]
    fig, panels = _panels(1, len(measures), (5.2, 3.4))
    for panel, (measure, title) in zip(panels[0], measures.items(), strict=True):
        rows = [r for r in results["measures"] if r["measure"] == measure and r.get("epilogue", "relu") == "relu"]
        names = [n for n in STYLES if any(r["contender"] == n for r in rows)]
        for k, name in enumerate(names):
            values = [next(r["value"] for r in rows if (r["contender"], r["dtype"]) == (name, d)) for d in dtypes]
            at = np.arange(len(dtypes)) + 0.8 * ((k + 0.5) / len(names) - 0.5)
            panel.bar(at, values, 0.8 / len(names), color=STYLES[name][0], label=name, edgecolor="0.3", lw=0.5)
        panel.set(title=f"{title}, with ReLU", ylabel="bytes per element of x and layer", xlabel="dtype of x")
        panel.set_xticks(range(len(dtypes)), dtypes)
    _finish(fig, panels, path, "Memory")


def _errors(path: Path, results: Results) -> None:
    fig, panels = _panels(1, 1, (6.4, 3.8))
    rows = [r for r in results["measures"] if r["measure"] == "error"]
    for name in dict.fromkeys(r["contender"] for r in rows):
        own = [r for r in rows if r["contender"] == name and not isinstance(r["value"], str)]
        color, marker = STYLES[name]
        x, y = ([r[k] for r in own] for k in ("mean_to_std", "value"))
        panels[0, 0].plot(x, y, color=color, marker=marker, lw=1.2, ms=5, label=name)
    panels[0, 0].set_xscale("symlog", linthresh=10)
    panels[0, 0].set(
        yscale="log", xlabel="mean / standard deviation of x", ylabel="largest error of y (standard deviations)"
    )
    _finish(fig, panels, path, "Training output in float32, against float64")


def _panels(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    figsize = (size[0] * columns + 1.6, size[1] * rows)
    return plt.subplots(rows, columns, figsize=figsize, squeeze=False, layout="constrained")


def _finish(fig: Any, panels: Any, path: Path, title: str) -> None:
    for panel in panels.ravel():
        panel.grid(alpha=0.3, lw=0.5)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    entries = {
        label: handle for p in panels.ravel() for handle, label in zip(*p.get_legend_handles_labels(), strict=True)
    }
    fig.legend(entries.values(), entries.keys(), loc="outside right center", frameon=False, fontsize=8)
    fig.suptitle(title, fontsize=10)
    disk.write_figure(path, fig, dpi=150)
    plt.close(fig)
