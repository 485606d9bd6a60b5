"""Claim 11: the estimates and the figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims import plots
from experiments.claims.intervals import Estimate, extremes, mean

USUAL = "32"  # the size that small ones are compared with
LEAST = 0.1  # percent


def estimates(found: dict[str, Any]) -> dict[str, Estimate]:
    """By the keys of the criteria."""

    def more(net: str, one: tuple[str, str], other: tuple[str, str], kind: str = "running") -> Estimate:
        errors = [np.asarray(found[net][arm][size][kind]) for arm, size in (one, other)]
        return mean(errors[0] - errors[1], "pp", against=0.0)

    pair, usual = ("batch", "2"), ("batch", USUAL)
    exact = found["exact"]
    return {
        "cnn": more("cnn", pair, usual),
        "mlp": more("mlp", pair, usual),
        "cnn_precise": more("cnn", pair, usual, "precise"),
        "cnn_batch": more("cnn", pair, usual, "batch"),
        "mlp_precise": more("mlp", pair, usual, "precise"),
        "mlp_batch": more("mlp", pair, usual, "batch"),
        "dense_error": mean(found["mlp"]["batch"]["2"]["running"], "%"),
        "dense_gradient": mean(exact["median_gradient"]),
        "dense_spikes": mean(exact["root_mean_square"]),
        "renorm_below": more("cnn", ("batch", "4"), ("renorm", "4")),
        "renorm_above": more("cnn", ("renorm", "4"), usual),
        "renorm_mlp": more("mlp", pair, ("renorm", "2")),
        "moving_cnn": more("cnn", pair, ("moving", "2")),
        "moving_mlp": more("mlp", pair, ("moving", "2")),
        "group_change": extremes(exact["group_change"]),
        "group_cnn": more("cnn", ("group", "0"), usual),
        "layer_cnn": more("cnn", ("layer", "0"), usual),
    }


def draw(found: dict[str, Any], figure: Figure) -> str:
    """Test error against the size of the normalization batch, of all norms and by other statistics; the caption."""
    panels = figure.subplots(1, 3, sharey=True)
    arms = {
        "batch": "batch norm",
        "renorm": "batch renorm",
        "moving": "MABN",
        "group": "group norm",
        "layer": "layer norm",
    }
    for panel, net in zip(panels, ("mlp", "cnn"), strict=False):
        for at, (arm, name) in enumerate(arms.items()):
            _curve(panel, found[net][arm], "running", at, name)
        _sizes(panel, f"{net.upper()}, by running averages")
    kinds = {"running": "running averages", "precise": "pooled", "batch": "test batches"}
    for at, net in enumerate(("mlp", "cnn")):
        for (kind, name), style in zip(kinds.items(), (0, 5, 6), strict=True):
            _curve(panels[2], found[net]["batch"], kind, style, f"{net.upper()}, {name}")
            panels[2].containers[-1][0].set(
                linestyle="-" if at else "--", marker=plots.MARKERS[style], fillstyle="full" if at else "none"
            )
    _sizes(panels[2], "batch norm, by other statistics")
    # Last: the panels share this axis, and to set the scale of one sets its marks anew.
    panels[0].set_ylabel("test error, %")
    for panel in panels:
        panel.set_yticks([2, 5, 10, 20, 50, 100], ["2", "5", "10", "20", "50", "100"])
        panel.minorticks_off()
    n = len(found["mlp"]["batch"]["2"]["running"])
    return (
        f"The training batch, the learning rate and the steps are the same everywhere. Lines: median of n = {n} seeds; "
        "bars and bands: quartiles. Group and layer norm do not depend on the size."
    )


def _curve(panel: Any, parts: dict[str, Any], kind: str, at: int, name: str) -> None:
    """Error against size; a band over all sizes for a norm that has none."""
    # The axis is logarithmic: no error at all is drawn as the least that it shows.
    parts = {size: {kind: np.maximum(np.asarray(p[kind], float), LEAST)} for size, p in parts.items()}
    if list(parts) == ["0"]:
        errors = np.asarray(parts["0"][kind])
        plots.band(panel, [2, 64], np.stack([errors, errors], 1), at, name)
    else:
        values = np.stack([np.asarray(p[kind]) for p in parts.values()], 1)
        plots.points(panel, [int(size) for size in parts], values, at, name)


def _sizes(panel: Any, title: str) -> None:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    plots.finish(panel, "images normalized together", "", title)
    panel.set_xticks([2, 4, 8, 16, 32, 64], ["2", "4", "8", "16", "32", "64"])
    panel.legend(frameon=False, fontsize=8)
