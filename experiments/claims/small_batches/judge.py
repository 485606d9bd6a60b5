"""Claim 11: the estimates and the figure."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.claims._lib import plots
from experiments.claims._lib.compare import better, level, moved
from experiments.claims._lib.intervals import mean
from experiments.claims._lib.verdict import Estimates

USUAL, PAIR = "batch_32", "batch_2"
NETS = {"mlp": "MLP, digits", "mlp_mnist": "MLP, MNIST", "cnn": "CNN, digits", "residual": "residual CNN, digits"}
PUBLISHED = {32: 23.6, 16: 23.7, 8: 24.8, 4: 27.3, 2: 34.7}  # Wu and He 2018, table 2


def estimates(found: dict[str, Any]) -> Estimates:
    """Return the estimates by the keys of the criteria."""
    made: Estimates = {"dense_gradient": mean(found["exact"]["median_gradient"])}
    for net, run in ((net, found[net]) for net in NETS):
        usual = (run, USUAL)
        for arm in (a for a in run if a.startswith("batch_") and a != USUAL):
            made[f"{net}_{arm.removeprefix('batch_')}"] = better(usual, (run, arm))
        made |= {
            f"{net}_usual": level(usual),
            f"{net}_moved": moved(usual),
            f"{net}_train": better(usual, (run, PAIR), "train"),
            f"{net}_pair": level((run, PAIR)),
            f"{net}_pooled": mean(100 * (np.array(run["pooled"]["pooled"]) - np.array(run["pooled"]["running"])), "pp"),
        }
    mlp, cnn, residual = found["mlp"], found["cnn"], found["residual"]
    return made | {
        "renorm": better((mlp, "renorm_2"), (mlp, PAIR)),
        "group": better((cnn, "group"), (cnn, PAIR)),
        "group_usual": better((cnn, USUAL), (cnn, "group")),
        "residual_group_usual": better((residual, USUAL), (residual, "group")),
        "residual_group": better((residual, "group"), (residual, PAIR)),
    }


def draw(found: dict[str, Any], figure: Figure) -> tuple[str, str]:
    """Draw test error against the images that are normalized together, beside that of Wu and He."""
    left, right = figure.subplots(1, 2)
    errors, rises = [], []
    for net, title in NETS.items():
        run, look = found[net], {} if net in ("mlp", "cnn") else {"ls": "--", "marker": "s", "mfc": "white"}
        first, last = _errors(left if net.startswith("mlp") else right, run, title, look)
        errors.append(f"{title}, {last:.1f} and {first:.1f}%")
        rises.append(f"{better((run, USUAL), (run, PAIR)).value:+.1f} ({title})")
    e = level((found["cnn"], "group"))
    color, dashes, _ = plots.STYLES["group"]
    right.axhline(100 - e.value, color=color, ls=dashes, lw=1.8, label="group norm, CNN")
    right.axhspan(max(100 - e.high, 0), 100 - e.low, color=color, alpha=0.18, lw=0)
    theirs = {"color": "black", "ls": ":", "marker": "d", "mfc": "none", "ms": 7}
    right.plot(list(PUBLISHED), list(PUBLISHED.values()), label="ResNet-50, Wu and He 2018", **theirs)
    for panel, top in ((left, 65), (right, 45)):
        names = ("images normalized together", "test error, %")
        plots.finish(panel, *names, legend="upper right", xscale="log", ylim=(0, top))
        panel.set_xticks([2, 4, 8, 16, 32], ["2", "4", "8", "16", "32"])
        panel.minorticks_off()
    counts = " or ".join(sorted({str(len(found[net][PAIR]["test"])) for net in NETS}))
    return f"Test error over 32 and over 2 images: {'; '.join(errors)}; beside them a ResNet-50's.", (
        f"From 32 images to 2, the error with batch norm changes, in points, by {', '.join(rises)}. Means with 95% "
        f"intervals of {counts} splits, at the best rates."
    )


def _errors(panel: Axes, run: dict[str, Any], title: str, look: dict[str, Any]) -> tuple[float, float]:
    """Draw the error of a network by images that are normalized together; return that over the fewest and the most."""
    sizes = sorted(int(a.split("_")[1]) for a in run if a.startswith("batch_"))
    found = [level((run, f"batch_{size}")) for size in sizes]
    value = np.array([100 - e.value for e in found])
    bars = [[min(e.high, 100) - e.value for e in found], [e.value - e.low for e in found]]
    look = plots.style("batch") | {"capsize": 2} | look
    panel.errorbar(sizes, value, bars, label=f"batch norm, {title}", **look)
    return float(value[0]), float(value[-1])
