"""Claim 7: the estimates and the figure."""

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims._lib import plots
from experiments.claims._lib.compare import better, level, moved
from experiments.claims._lib.intervals import best, exact, geometric, mean
from experiments.claims._lib.verdict import Estimates
from experiments.tables import markdown

HE, MIDDLE = 2, slice(10, 20)
NAMES = {"batch": "batch norm", "none": "no norm", "group": "group norm", "skip": "SkipInit"}
KINDS = {"sigmoid": "sigmoid stack", "relu": "ReLU stack", "cnn": "residual CNN"}
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
        # The depth at which Yang et al. expect training to fail.
        "limit": exact(16 / math.log(growth_of(TYPICAL)), "closed formula"),
        "cnn_steps": exact(float(found["trained"]["cnn-20"]["steps"]), "counted"),
    }
    for name, run in found["trained"].items():
        key = name.replace("-", "_")
        made[key] = better((run, "batch"), (run, "none"))
        made[f"{key}_train"] = better((run, "batch"), (run, "none"), "train")
        made[f"{key}_moved"] = moved((run, "none"))
        if "skip" in run:
            made[f"{key}_skip_moved"] = moved((run, "skip"))
            made |= {f"{key}_over_{arm}": better((run, "batch"), (run, arm)) for arm in ("group", "skip")}
    deep, stack = found["trained"]["cnn-56"], found["trained"]["relu-40"]
    made |= {f"cnn_56_{arm}": level((deep, arm)) for arm in NAMES}
    return made | {
        "sigmoid_20_none": level((found["trained"]["sigmoid-20"], "none")),
        "relu_40_batch_train": level((stack, "batch"), "train"),
        "cnn_56_none_rate": exact(deep["grid"][best(deep["none"]["validation"])], "chosen by validation"),
        "cnn_56_lowest": exact(min(deep["grid"]), "counted"),
    }


def _there(found: dict[str, Any], batch: int) -> str:
    name = f"relu-batch-{batch}"
    return name if name in found["gradients"] else f"relu-batch-{TYPICAL}"


def tables(found: dict[str, Any]) -> str:
    """Return the ratios of gradients before training, and the accuracies of each arm, as tables."""
    rows = []
    for name in found["gradients"]:
        activation, norm, batch = name.split("-")
        by_gain = [f"{v:.0f}" if 1e3 <= v < 1e6 else f"{v:.3g}" for v in np.median(ratios(found, name), 0)]
        rows.append([activation.replace("relu", "ReLU"), NAMES[norm], batch, *by_gain])
    table = markdown(["units", "norm", "batch", *(f"gain {g:.3g}" for g in found["gains"])], rows)
    arms = []
    for key, run in found["trained"].items():
        kind, depth = key.split("-")
        for arm in (arm for arm in NAMES if arm in run):
            levels = [level((run, arm), what) for what in ("test", "train")]
            cells = [f"{e.value:.1f} ({e.low:.1f} to {e.high:.1f})" for e in levels]
            arms.append([f"{KINDS[kind]}, {depth} layers", NAMES[arm], *cells])
    accuracies = markdown(["network", "norm", "test accuracy, %", "training accuracy, %"], arms)
    return (
        "Before training, 30 layers: the gradient of the first layer over that of the last, medians of all seeds.\n\n"
        f"{table}\n\nAfter training, each at its best rate, means with 95% intervals:\n\n{accuracies}"
    )


def draw(found: dict[str, Any], figure: Figure) -> tuple[str, str]:
    """Draw test accuracies of all arms, each at its best rate, and what batch norm has over the others."""
    left, right = figure.subplots(1, 2, sharey=True)
    names, said = [], []
    for at, (key, run) in enumerate(found["trained"].items()):
        kind, depth = key.split("-")
        names.append(f"{KINDS[kind]}, {depth} layers")
        for row, arm in enumerate(arm for arm in NAMES if arm in run):
            y, label = -at + 0.3 - 0.2 * row, NAMES[arm] if run is found["trained"]["cnn-56"] else None
            plots.interval(left, level((run, arm)), y, arm, label, capsize=2)
            if arm != "batch":
                plots.interval(right, better((run, "batch"), (run, arm)), y, arm, capsize=2)
        batch, none = (level((run, arm)).value for arm in ("batch", "none"))
        said.append(f"{names[-1]}, {batch:.1f} and {none:.1f}%")
    left.set_yticks(-np.arange(len(names)), names)
    right.axvline(0, color="black", lw=1, ls="--")
    plots.finish(left, "test accuracy, %", "", xlim=(0, 100))
    plots.finish(right, "batch norm minus the other arm, percentage points", "")
    figure.legend(loc="outside upper center", ncols=len(NAMES), fontsize=9)
    gains = {key: better((run, "batch"), (run, "none")).value for key, run in found["trained"].items()}
    steps = found["trained"]["cnn-56"]["steps"]
    caption = (
        f"Batch norm changes test accuracy by {gains['sigmoid-20']:+.1f} points in 20 sigmoid layers, "
        f"{gains['relu-40']:+.1f} in 40 ReLU layers, and {gains['cnn-56']:+.1f} in a residual CNN of 56 layers "
        f"after {steps} steps. Means with 95% intervals, at the best rates; no published gain is comparable."
    )
    return f"Test accuracy with batch norm and without: {'; '.join(said)}.", caption
