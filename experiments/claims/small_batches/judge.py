"""Claim 11: the estimates and the figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims._lib import plots
from experiments.claims._lib.compare import at_best, better, level, moved
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
            f"{net}_pair": level((run, PAIR)),
            f"{net}_pooled": mean(100 * (np.array(run["pooled"]["pooled"]) - np.array(run["pooled"]["running"])), "pp"),
        }
    mlp, cnn, residual = found["mlp"], found["cnn"], found["residual"]
    return made | {
        "renorm": better((mlp, "renorm_2"), (mlp, PAIR)),
        "group": better((cnn, "group"), (cnn, PAIR)),
        "group_usual": better((cnn, USUAL), (cnn, "group")),
        "residual_group": better((residual, "group"), (residual, PAIR)),
    }


def draw(found: dict[str, Any], figure: Figure) -> tuple[str, str]:
    """Draw test error against the images that are normalized together, beside that of Wu and He."""
    left, right = figure.subplots(1, 2)
    said = []
    for (net, title), arm in zip(NETS.items(), ("sigmoid_batch", "noise", "batch", "whiten"), strict=True):
        run = found[net]
        sizes = sorted(int(a.split("_")[1]) for a in run if a.startswith("batch_"))
        errors = np.stack([100 * (1 - at_best((run, f"batch_{size}"))) for size in sizes], 1)
        plots.points(left if net.startswith("mlp") else right, sizes, errors, arm, title)
        said.append(f"{np.mean(errors[:, 0]):.1f}% over 2 and {np.mean(errors[:, -1]):.1f}% over 32, {title}")
    group = np.repeat(100 * (1 - at_best((found["cnn"], "group")))[:, None], 2, 1)
    plots.band(right, [2, 32], group, "group", "CNN, group norm")
    plots.points(
        right, list(PUBLISHED), [[error] for error in PUBLISHED.values()], "layer", "ResNet-50, Wu and He 2018"
    )
    for panel in (left, right):
        plots.finish(panel, "images normalized together", "test error, %", "", "best", xscale="log", ylim=(0, None))
        panel.set_xticks([2, 4, 8, 16, 32], ["2", "4", "8", "16", "32"])
        panel.minorticks_off()
    counts = " or ".join(sorted({str(len(found[net][PAIR]["test"])) for net in NETS}))
    errors = "; ".join(said)
    return f"Test error against the images normalized together; {errors}; beside them the ResNet-50 of Wu and He.", (
        f"Error with batch norm: {errors}. Medians and quartiles of n = {counts} splits, at the best rates."
    )
