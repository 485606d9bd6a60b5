"""Claim 7: the estimates and the figure."""

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims._lib import plots
from experiments.claims._lib.compare import at_best, better, level, moved
from experiments.claims._lib.intervals import exact, geometric, mean
from experiments.claims._lib.verdict import Estimates
from experiments.tables import markdown

HE, MIDDLE = 2, slice(10, 20)
NAMES = {"batch": "batch norm", "none": "no norm", "group": "group norm", "skip": "SkipInit"}
KINDS = {"sigmoid": "sigmoid stacks", "relu": "ReLU stacks", "cnn": "residual CNNs"}
BATCHES = (8, 32, 64)
TYPICAL = 32  # the batch of the training


def growth_of(batch: int) -> float:
    """Return the growth of the squared gradient norm in a ReLU layer after batch norm, in wide stacks before training.

    Yang et al. 2019, "A mean field theory of batch normalization", theorem 8, with the arc-cosine kernel of ReLU.
    """
    c = -1 / (batch - 1)
    kernel = (math.sqrt(1 - c * c) + (math.pi - math.acos(c)) * c) / math.pi
    slope = (math.pi - math.acos(c)) / math.pi
    b = batch - 1
    return b * (slope + b) / ((batch - 3) * b * (1 - kernel)) - 1 / (batch - 3)


def limit_of(batch: int) -> float:
    """Return the depth at which Yang et al. expect training to fail: 16 / log(growth)."""
    return 16 / math.log(growth_of(batch))


def ratios(found: dict[str, Any], name: str) -> np.ndarray:
    """Return the gradient of the first layer over that of the last, `[seeds, gains]`."""
    logs = np.array(found["gradients"][name]["log_norm"])
    return np.exp(logs[:, :, 0] - logs[:, :, -1])


def growth(found: dict[str, Any], name: str) -> np.ndarray:
    """Return the squared growth of a layer, from the middle of the stack, of each seed at He's gain."""
    logs = np.array(found["gradients"][name]["log_norm"])[:, HE, MIDDLE]
    return np.exp(2 * (logs[:, 0] - logs[:, -1]) / (logs.shape[1] - 1))


def estimates(found: dict[str, Any]) -> Estimates:
    """Return the estimates by the keys of the criteria."""
    relu = ratios(found, "relu-batch-32")
    made: Estimates = {
        "sigmoid_batch": geometric(ratios(found, "sigmoid-batch-32")[:, HE]),
        "gain": geometric(relu.max(1) / relu.min(1)),
        "relu_he_batch": geometric(relu[:, HE]),
        "sigmoid_plain": geometric(ratios(found, "sigmoid-none-32")[:, HE]),
        "relu_he_plain": geometric(ratios(found, "relu-none-32")[:, HE]),
        # A smoke run has no other batches.
        **{f"growth_{b}": mean(growth(found, _there(found, b)) / growth_of(b)) for b in BATCHES},
        "limit": exact(limit_of(TYPICAL), "closed formula"),
        "cnn_steps": exact(float(found["trained"]["cnn-20"]["steps"]), "counted"),
    }
    for name, run in found["trained"].items():
        key = name.replace("-", "_")
        made[key] = better((run, "batch"), (run, "none"))
        made |= {f"{key}_{arm}": level((run, arm)) for arm in NAMES if arm in run}
        made[f"{key}_moved"] = moved((run, "none"))
        if "skip" in run:
            made[f"{key}_skip_moved"] = moved((run, "skip"))
            made |= {f"{key}_over_{arm}": better((run, "batch"), (run, arm)) for arm in ("group", "skip")}
    return made


def _there(found: dict[str, Any], batch: int) -> str:
    name = f"relu-batch-{batch}"
    return name if name in found["gradients"] else f"relu-batch-{TYPICAL}"


def tables(found: dict[str, Any]) -> str:
    """Return the ratios of gradients before training as a table."""
    rows = []
    for name in found["gradients"]:
        activation, norm, batch = name.split("-")
        by_gain = [f"{v:.0f}" if 1e3 <= v < 1e6 else f"{v:.3g}" for v in np.median(ratios(found, name), 0)]
        rows.append([activation.replace("relu", "ReLU"), NAMES[norm], batch, *by_gain])
    table = markdown(["units", "norm", "batch", *(f"gain {g:.3g}" for g in found["gains"])], rows)
    return (
        "Before training, 30 layers: the gradient of the first layer over that of the last, medians of all seeds.\n\n"
        f"{table}"
    )


def draw(found: dict[str, Any], figure: Figure) -> tuple[str, str]:
    """Draw test accuracy by depth, each arm at its best rate."""
    panels, said = figure.subplots(1, len(KINDS), sharey=True), []
    for panel, (kind, title) in zip(panels, KINDS.items(), strict=True):
        runs = {int(name.split("-")[1]): run for name, run in found["trained"].items() if name.startswith(f"{kind}-")}
        depths = sorted(runs)
        for arm, name in NAMES.items():
            if arm in runs[depths[0]]:
                plots.points(panel, depths, [100 * at_best((runs[d], arm)) for d in depths], arm, name)
        plots.finish(panel, "layers", "", title, "lower left", xscale="log", ylim=(0, 100))
        panel.set_xticks(depths, [str(d) for d in depths])
        panel.minorticks_off()
        deepest = {arm: 100 * np.mean(at_best((runs[depths[-1]], arm))) for arm in ("batch", "none")}
        said.append(
            f"{title} of {depths[-1]} layers {deepest['batch']:.1f}% with batch norm, {deepest['none']:.1f}% without"
        )
    panels[0].set_ylabel("test accuracy, %")
    counts = sorted({len(run["none"]["test"]) for run in found["trained"].values()})
    alt = f"Test accuracy by depth with and without batch norm: {'; '.join(said)}."
    return (
        alt,
        f"{'; '.join(said)}. Each at its best rate; medians and quartiles of {counts[0]} to {counts[-1]} splits.",
    )
