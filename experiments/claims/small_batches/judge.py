"""Claim 11: the estimates and the figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims._lib import plots
from experiments.claims._lib.intervals import Estimate, extremes, mean
from experiments.claims._lib.verdict import Estimates

USUAL = "32"  # the size that small ones are compared with
LEAST = 0.1  # percent
ARMS = {"batch": "batch norm", "renorm": "batch renorm", "moving": "MABN", "group": "group norm", "layer": "layer norm"}
KINDS = {"running": ("batch", "running averages"), "precise": ("noisy", "pooled"), "batch": ("pooled", "test batches")}


def estimates(found: dict[str, Any]) -> Estimates:
    """Return the estimates by the keys of the criteria."""

    def more(net: str, one: tuple[str, str], other: tuple[str, str], kind: str = "running") -> Estimate:
        errors = [np.asarray(found[net][arm][size][kind]) for arm, size in (one, other)]
        return mean(errors[0] - errors[1], "pp")

    pair, usual, exact = ("batch", "2"), ("batch", USUAL), found["exact"]
    return {
        "cnn": more("cnn", pair, usual),
        "mlp": more("mlp", pair, usual),
        "mlp_4": more("mlp", ("batch", "4"), usual),
        **{f"{net}_{kind}": more(net, pair, usual, kind) for net in ("cnn", "mlp") for kind in ("precise", "batch")},
        "cnn_usual": mean(found["cnn"]["batch"][USUAL]["running"], "%"),
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


def draw(found: dict[str, Any], figure: Figure) -> tuple[str, str]:
    """Draw test error against the size of the normalization batch, of all norms and by other statistics."""
    panels = figure.subplots(1, 3, sharey=True)
    for panel, net in zip(panels, ("mlp", "cnn"), strict=False):
        for arm, name in ARMS.items():
            _curve(panel, found[net][arm], "running", arm, name)
        _sizes(panel, f"{net.upper()}, by running averages")
    for net, more in (("mlp", {"ls": "--", "fillstyle": "none"}), ("cnn", {"ls": "-"})):
        for kind, (arm, name) in KINDS.items():
            _curve(panels[2], found[net]["batch"], kind, arm, f"{net.upper()}, {name}", **more)
    _sizes(panels[2], "batch norm, by other statistics")
    # Last: the panels share this axis, and to set the scale of one sets its marks anew.
    panels[0].set_ylabel("test error, %")
    for panel in panels:
        panel.set_yticks([2, 5, 10, 20, 50, 100], ["2", "5", "10", "20", "50", "100"])
        panel.minorticks_off()
    n = len(found["mlp"]["batch"]["2"]["running"])
    errors = {net: [np.mean(found[net]["batch"][size]["running"]) for size in ("2", USUAL)] for net in ("mlp", "cnn")}
    said = [
        f"{net.upper()} {few:.1f}% over 2 images, {usual:.1f}% over {USUAL}" for net, (few, usual) in errors.items()
    ]
    alt = f"Test error against the images normalized together, by norm and kind of statistics: {'; '.join(said)}."
    return alt, (
        f"The training batch, the learning rate and the steps are the same everywhere. Lines: median of n = {n} seeds; "
        "bars and bands: quartiles. Group and layer norm do not depend on the size."
    )


def _curve(panel: Any, parts: dict[str, Any], kind: str, arm: str, name: str, **more: Any) -> None:
    """Draw error against size; a band over all sizes for a norm that has none."""
    # The axis is logarithmic: no error at all is drawn as the least that it shows.
    values = np.stack([np.maximum(np.asarray(p[kind], float), LEAST) for p in parts.values()], 1)
    if list(parts) == ["0"]:
        plots.band(panel, [2, 64], np.repeat(values, 2, 1), arm, name)
    else:
        plots.points(panel, [int(size) for size in parts], values, arm, name, **more)


def _sizes(panel: Any, title: str) -> None:
    panel.set_xscale("log", base=2)
    plots.finish(panel, "images normalized together", "", title, "best", yscale="log", ylim=(None, 100))
    panel.set_xticks([2, 4, 8, 16, 32, 64], ["2", "4", "8", "16", "32", "64"])
