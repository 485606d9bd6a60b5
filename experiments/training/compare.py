"""Runs side by side: `python -m experiments compare RUN... [--out FIGURE]`, drawn together and tabulated.

The settings that differ name the runs; the figure is a PNG, the table is Markdown.
"""

import dataclasses
from pathlib import Path
from typing import Any

import tyro

from experiments import disk, tables
from experiments.interrupt import refuse
from experiments.training import figure, record, summary

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
DASHES = ("-", "--", "-.", ":")


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
    """The contents of the folder of a run."""

    name: str
    settings: dict[str, Any]
    rows: list[record.Row]
    arms: dict[str, dict[str, Any]]


def main(arguments: list[str]) -> int:
    """Run the command line `arguments`; the exit code."""
    command = tyro.cli(Command, args=arguments, prog="python -m experiments compare")
    try:
        if not command.runs:
            raise ValueError("`compare` needs the folders of runs; got none.")
        runs = [read(folder) for folder in command.runs]
        out = command.out or command.runs[0].parent / "comparison.png"
        figure.draw(out, lines(runs), "median of the seeds; bands: interquartile range", None)
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


def differing(runs: list[Run]) -> list[str]:
    """Return the names of the settings that the runs do not share."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    return [n for n in names if any(run.settings.get(n) != runs[0].settings.get(n) for run in runs)]


def lines(runs: list[Run]) -> list[figure.Line]:
    """Return the lines to draw: a color for each run, dashes for each of its arms."""
    return [
        line._replace(label=f"{run.name}: {line.label}", color=COLORS[i % len(COLORS)], dashes=DASHES[j % len(DASHES)])
        for i, run in enumerate(runs)
        for j, line in enumerate(figure.lines(run.rows))
    ]


def table(runs: list[Run]) -> str:
    """Return a row for each arm of each run: what differs, and what came out."""
    names = [n for n in differing(runs) if n != "arms"]
    head = ["run", *names, "arm", "rate", "n", "steps", "validation accuracy, %", "test accuracy, %"]
    body = []
    for run in runs:
        given = [str(run.settings.get(n)) for n in names]
        for arm in dict.fromkeys(r["arm"] for r in run.rows):
            rate = summary.best_rate(run.rows, arm)
            logged = summary.curves(run.rows, arm, rate, "val_accuracy")
            tested = run.arms.get(arm, {}).get("test_accuracy")
            came = [str(len(logged.values)), f"{logged.steps[-1]:.0f}", summary.percent(logged.values[:, -1])]
            came.append(summary.percent(tested) if tested else "-")
            body.append([run.name, *given, summary.NAMES[arm], f"{rate:g}", *came])
    return tables.markdown(head, body)
