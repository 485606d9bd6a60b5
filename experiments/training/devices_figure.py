"""The figure and the table of docs/devices: batch statistics of a whole batch of 16, and of 2 examples on each device.

    python -m experiments.training.devices_figure

It runs the configs of `configs/two_examples/` into `runs/two_examples/`; a run that is complete there is kept.
"""

import sys
from pathlib import Path

import numpy as np

from experiments import disk
from experiments.figures import open_figure
from experiments.interrupt import Interrupt
from experiments.training import command, compare, parallel, summary

CONFIGS, RUNS, OUT = Path("configs/two_examples"), Path("runs/two_examples"), Path("docs/devices")
NUMBERS = ("one_device", "two_devices", "four_devices", "eight_devices")
COSTS = {
    "eight_devices": "global",
    "local": "per device",
    "ghost": "ghost batches of 2",
    "renorm": "renorm, global",
    "local_renorm": "renorm, per device",
    "group": "group norm",
}


def main(interrupt: Interrupt) -> int:
    """Run what is missing, and draw; return the exit code."""
    parallel.simulate_devices(8)  # the run on one device comes first, and would start JAX with one
    names = dict.fromkeys((*NUMBERS, *COSTS))
    for name in names:
        done = RUNS / name / "summary.json"
        if not (done.is_file() and disk.read_json(done)["complete"]):
            code = command.main([str(CONFIGS / f"{name}.toml"), "--out", str(RUNS / name), "--replace"], interrupt)
            if code:
                return code
    runs = {name: compare.read(RUNS / name) for name in names}
    OUT.mkdir(exist_ok=True)
    with open_figure(OUT / "two_examples.png", 1, 3, (13.0, 4.0)) as (_, panels):
        draw(panels[0], runs)
    disk.write(OUT / "two_examples.md", compare.table(list(runs.values())) + "\n")
    return 0


def draw(panels: np.ndarray, runs: dict[str, compare.Run]) -> None:
    """Draw the trajectories on 1 to 8 devices, their distances, and the accuracies at 2 examples a device."""
    left, middle, right = panels
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
    right.set_xticks(range(len(COSTS)), COSTS.values(), rotation=30, ha="right")
    right.set(ylabel="test accuracy, %; 5 seeds", title="2 examples on each of 8 devices")
    left.legend()
    middle.legend()


def _curves(run: compare.Run, measure: str) -> summary.Curves:
    ((arm, rate),) = run.rates.items()
    return summary.curves(run.rows, arm, rate, measure)


if __name__ == "__main__":
    with Interrupt() as interrupt:
        sys.exit(main(interrupt))
