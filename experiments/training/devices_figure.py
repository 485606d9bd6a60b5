"""The figure and the table of docs/devices: batch statistics of a whole batch of 16, and of 2 examples on each device.

    python -m experiments.training.devices_figure

It runs the configs of `configs/two_examples/` into `runs/two_examples/`; a run that is complete there is kept.
"""

import json
import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

from experiments import disk
from experiments.interrupt import Interrupt
from experiments.training import command, compare, parallel, summary

CONFIGS, RUNS, OUT = Path("configs/two_examples"), Path("runs/two_examples"), Path("docs/devices")
NUMBERS = ("one_device", "two_devices", "four_devices", "eight_devices")
COSTS = ("eight_devices", "local", "ghost", "renorm", "local_renorm", "group")
LABELS = {
    "eight_devices": "global",
    "local": "per device",
    "ghost": "ghost batches of 2",
    "renorm": "renorm, global",
    "local_renorm": "renorm, per device",
    "group": "group norm",
}


def main(interrupt: Interrupt) -> int:
    """Run what is missing, and draw; the exit code."""
    parallel.simulate_devices(8)  # the run on one device comes first, and would start JAX with one
    for name in dict.fromkeys((*NUMBERS, *COSTS)):
        done = RUNS / name / "summary.json"
        if not (done.is_file() and json.loads(done.read_text())["complete"]):
            code = command.main([str(CONFIGS / f"{name}.toml"), "--out", str(RUNS / name), "--replace"], interrupt)
            if code:
                return code
    runs = {name: compare.read(RUNS / name) for name in dict.fromkeys((*NUMBERS, *COSTS))}
    OUT.mkdir(exist_ok=True)
    draw(runs)
    disk.write(OUT / "two_examples.md", compare.table(list(runs.values())) + "\n")
    return 0


def draw(runs: dict[str, compare.Run]) -> None:
    """Draw the trajectories on 1 to 8 devices, their distances, and the accuracies at 2 examples a device."""
    mpl.use("Agg")
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    losses = {n: _curves(runs[n], "train_loss") for n in NUMBERS}
    for at, (name, (steps, values)) in enumerate(losses.items()):
        look = {"color": compare.COLORS[at], "ls": compare.DASHES[at], "lw": 4 - at}
        left.plot(steps, np.median(values, 0), label=name.replace("_", " "), **look)
        if at:
            far = np.max(np.abs(values - losses[NUMBERS[0]][1]), 0)
            middle.plot(steps, np.maximum(far, 1e-9), label=name.replace("_", " "), **look)
    local = np.max(np.abs(_curves(runs["local"], "train_loss")[1] - losses[NUMBERS[0]][1]), 0)
    middle.plot(losses[NUMBERS[0]][0], local, color="0.4", label="per-device statistics")
    left.set(xlabel="training step", ylabel="training loss, median of 5 seeds", yscale="log", title="global statistics")
    middle.set(xlabel="training step", yscale="log", title="largest difference from one device, over 5 seeds")
    for at, name in enumerate(COSTS):
        (arm,) = runs[name].arms.values()
        tested = 100 * np.array(arm["test_accuracy"])
        right.plot(np.full(len(tested), at), tested, "o", color=compare.COLORS[at], alpha=0.6)
        right.plot([at - 0.3, at + 0.3], [summary.quartiles(tested).median] * 2, color=compare.COLORS[at], lw=2)
    right.set_xticks(range(len(COSTS)), [LABELS[n] for n in COSTS], rotation=30, ha="right")
    right.set(ylabel="test accuracy, %; 5 seeds", title="2 examples on each of 8 devices")
    for panel in (left, middle):
        panel.legend(frameon=False, fontsize=8)
    disk.write_figure(OUT / "two_examples.png", fig, dpi=130)
    plt.close(fig)


def _curves(run: compare.Run, measure: str) -> tuple[np.ndarray, np.ndarray]:
    arm = run.rows[0]["arm"]
    c = summary.curves(run.rows, arm, summary.best_rate(run.rows, arm), measure)
    return c.steps, c.values


if __name__ == "__main__":
    with Interrupt() as interrupt:
        sys.exit(main(interrupt))
