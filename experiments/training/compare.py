"""Runs drawn and tabulated, each alone or side by side: `python -m experiments compare RUN... [--out FIGURE]`.

The settings that differ name the runs; the figure is a PNG, the table is Markdown.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro

from experiments import disk, tables
from experiments.figures import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, band, open_figure
from experiments.interrupt import refuse
from experiments.training import record, summary

# Of the arms of one run; the lines differ in dashes as well.
STYLES = {
    "batch": (BLUE, "-"),
    "none": (VERMILION, "--"),
    "ghost": (GREEN, "-."),
    "renorm": (PURPLE, "-."),
    "group": (VERMILION, ":"),
    "domains": (ORANGE, ":"),
    "conditional": (SKY, "-."),
    "whiten": (BLACK, "-."),
}
COLORS, DASHES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK, "#999933"), ("-", "--", "-.", ":")
PANELS = {"train_loss": "training loss (cross-entropy)", "val_accuracy": "validation accuracy"}


@dataclasses.dataclass(frozen=True)
class Command:
    """Draw runs together, and tabulate their settings and results.

    Attributes:
        runs: the folders of runs, finished or not.
        out: the PNG to draw; `comparison.png` in the first run's parent folder by default.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    out: Path | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """The contents of the folder of a run: its log, and the results of the arms that are done."""

    name: str
    settings: dict[str, Any]
    rows: list[record.Row]
    arms: dict[str, dict[str, Any]]

    @property
    def rates(self) -> dict[str, float]:
        """Return the best learning rate by validation of each arm that was logged."""
        return {arm: summary.best_rate(self.rows, arm) for arm in dict.fromkeys(r["arm"] for r in self.rows)}


def main(arguments: list[str]) -> int:
    """Run the command line `arguments`; return the exit code."""
    command = tyro.cli(Command, args=arguments, prog="python -m experiments compare")
    try:
        if not command.runs:
            raise ValueError("`compare` needs the folders of runs; got none.")
        runs = [read(folder) for folder in command.runs]
        out = command.out or command.runs[0].parent / "comparison.png"
        draw(out, runs, "median of the seeds; bands: interquartile range", None)
    except (ValueError, OSError) as error:
        return refuse(error)
    print(table(runs))
    print(f"Drawn to {out}.")
    return 0


def read(folder: Path) -> Run:
    """Read the folder of a run.

    Raises:
        ValueError: it holds none, or one that has logged nothing yet.
    """
    config = disk.read_json(folder / record.FILES[0])
    if not isinstance(config, dict) or not config.keys() >= record.KEYS:
        raise ValueError(f"{folder} must be the folder of a run; its {record.FILES[0]} is of none.")
    if not (folder / record.LOG).is_file():
        raise ValueError(f"{folder} must be the folder of a run that has logged something; it has no {record.LOG}.")
    done = folder / "summary.json"
    arms = {a["arm"]: a for a in disk.read_json(done)["arms"]} if done.is_file() else {}
    return Run(folder.name, config["settings"], record.read(folder / record.LOG), arms)


def draw(path: Path, runs: Sequence[Run], title: str, target: float | None) -> None:
    """Draw the medians over seeds, and their quartiles, against steps to a PNG at `path`."""
    with open_figure(path, 1, 2, (9.6, 4.0)) as (fig, panels):
        loss, accuracy = panels[0]
        for panel, (measure, name) in zip(panels[0], PANELS.items(), strict=True):
            for run, arm, rate, label, look in _lines(runs):
                band(panel, *summary.curves(run.rows, arm, rate, measure), *look, 0.2, label)
            panel.set(xlabel="training step", ylabel=name, xlim=(0, None))
        loss.set_yscale("log")
        accuracy.set_ylim(0, 1)
        if target is not None:
            accuracy.axhline(target, color="0.4", lw=0.8, ls=":", label=f"target {target:g}")
        accuracy.legend(loc="lower right")
        fig.suptitle(title)


def _lines(runs: Sequence[Run]) -> Iterator[tuple[Run, str, float, str, tuple[str, str]]]:
    """Yield each arm of each run, its best rate, its label, color and dashes; of several runs each has its color."""
    for i, run in enumerate(runs):
        for j, (arm, rate) in enumerate(run.rates.items()):
            label, look = f"{summary.NAMES[arm]}, learning rate {rate:g}", STYLES[arm]
            if len(runs) > 1:
                label, look = f"{run.name}: {label}", (COLORS[i % len(COLORS)], DASHES[j % len(DASHES)])
            yield run, arm, rate, label, look


def table(runs: Sequence[Run]) -> str:
    """Return a row for each arm of each run: the settings in which runs differ, and what came out."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name != "arms")
    names = [n for n in names if any(run.settings.get(n) != runs[0].settings.get(n) for run in runs)]
    came = ["n", "steps", "validation accuracy, %", "test accuracy, %", "steps to target", "ms/step"]
    body = []
    for run in runs:
        given = [str(run.settings.get(n)) for n in names]
        for arm, rate in run.rates.items():
            logged = summary.curves(run.rows, arm, rate, "val_accuracy")
            row = [run.name, *given, summary.NAMES[arm], f"{rate:g}", str(len(logged.values))]
            results = summary.results(run.arms[arm]) if arm in run.arms else ["-", "-", "-"]
            body.append([*row, f"{logged.steps[-1]:.0f}", summary.percent(logged.values[:, -1]), *results])
    return tables.markdown(["run", *names, "arm", "rate", *came], body)
