"""From a command line to a finished run: read, validate, train each arm, write what came of it."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments import disk, memory
from experiments.interrupt import INTERRUPTED, Interrupt, refuse
from experiments.training import figure, networks, parallel, record, statistics, summary, train
from experiments.training.config import Config, Settings, changed, load, refusal
from experiments.training.data import digits

USAGE = "python -m experiments CONFIG [--out FOLDER] [--replace] [settings]"


@dataclasses.dataclass(frozen=True)
class Command:
    """Train on the digits as a config says, and write a log, a summary and a figure.

    Attributes:
        config: a file of `configs/`.
        settings: each overrides the config.
        out: the folder to write to, new or empty; `runs/NAME` by default.
        replace: replace the files of a former run that is there. Whatever else is there stays.
    """

    config: tyro.conf.Positional[Path]
    settings: Annotated[Settings, tyro.conf.arg(name="")]
    out: Path | None = None
    replace: bool = False


def main(arguments: list[str], interrupt: Interrupt) -> int:
    """Run the command line `arguments`; the exit code."""
    try:
        config, folder, replace = parse(arguments)
        parallel.require_devices(config.settings.devices)
        memory.require(config.settings)
    except (ValueError, TypeError, OSError) as error:
        return refuse(error)
    try:
        with disk.hold("--out", folder):
            disk.check_contents("--out", folder, record.FILES[0], record.KEYS, replace=replace)
            record.begin(folder, config)
            return run(config, folder, interrupt)
    except OSError as error:
        return refuse(error)


def parse(arguments: list[str]) -> tuple[Config, Path, bool]:
    """The config that `arguments` name, changed as they say, where to write, and whether to replace what is there.

    Raises:
        ValueError, TypeError: something is wrong with the file or the settings.
    """
    if not arguments or (arguments[0].startswith("-") and not {"-h", "--help"} & set(arguments)):
        raise ValueError(f"the first argument must be a config. Usage: {USAGE}, as in `configs/quickstart.toml`.")
    path = Path("configs/quickstart.toml" if arguments[0].startswith("-") else arguments[0])
    config = load(path)
    default = Command(path, config.settings)
    try:
        command = tyro.cli(Command, args=arguments, default=default, prog="python -m experiments")
    except ValidationError as error:
        raise refusal(error, Settings, "command line") from None
    return changed(config, command.settings), command.out or Path("runs") / config.name, command.replace


def run(config: Config, folder: Path, interrupt: Interrupt) -> int:
    """Train every arm of `config` and write to `folder`, to the end or until interrupted; the exit code."""
    s, data, console = config.settings, digits(), Console()
    arms, trained = {}, {}
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=console) as progress:
        bar = progress.add_task("starting", total=s.steps * len(s.arms))

        def log(norm: str, step: int, metrics: train.Metrics, _: train.Carry) -> None:
            record.append(folder / "metrics.jsonl", record.rows(norm, s.learning_rates, step, metrics))
            progress.advance(bar, s.log_every)

        for norm in s.arms:
            if interrupt.requested:
                break
            progress.update(bar, description=f"{summary.NAMES[norm]} (of {len(s.arms)} arms)")
            arms[norm] = train.compile_arm(s, networks.build(s, norm))
            trained[norm] = train.train(s, arms[norm], data, partial(log, norm), lambda: interrupt.requested)

    def test(norm: str, rate: float) -> list[float]:
        at = s.learning_rates.index(rate)
        chosen = jax.tree.map(lambda v: v[:, at : at + 1], trained[norm].carry)
        return np.asarray(arms[norm].evaluate(chosen, data.test)[1])[:, 0].tolist()

    complete = [t.steps for t in trained.values()] == [s.steps] * len(s.arms)
    if any(t.steps for t in trained.values()):
        rows, seconds = record.read(folder / "metrics.jsonl"), {norm: t.seconds for norm, t in trained.items()}
        results = summary.summarize(rows, s.target_accuracy, test, seconds, s.log_every)
        if s.evaluations != ("running",):
            at = s.learning_rates.index(results[0]["learning_rate"])
            chosen = jax.tree.map(lambda v: v[:, at : at + 1], trained["batch"].carry)
            results[0]["evaluations"] = statistics.accuracies(s, arms["batch"], chosen, data)
        disk.write_json(folder / "summary.json", {"complete": complete, "arms": results})
        spread = f"lines: median of {s.seeds} seeds; bands: interquartile range; loss: mean of {s.log_every} steps"
        name = config.name if complete else f"{config.name}, interrupted"
        figure.draw(folder / "figure.png", rows, f"{name}: {described(s)}\n{spread}", s.target_accuracy)
        caption = f"Median (quartiles) of n seeds; ms/step: all runs of an arm at once. {described(s)}."
        console.print(summary.table(results, caption))
        for told in summary.evaluations(results):
            console.print(told)
        console.print(expectation(config))
    if not complete:
        console.print(f"Interrupted: {folder} holds what was done until then.")
        return INTERRUPTED
    console.print(f"Written to {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}.")
    return 0


def expectation(config: Config) -> str:
    """What the config expects; nothing where the run is another than the config's."""
    if config.overridden:
        return f"What the config expects is of its own settings; this run has others: {', '.join(config.overridden)}."
    return f"What the config expects: {' '.join(config.claim.expected.split())}"


def described(s: Settings) -> str:
    """The settings that a reader of a figure wants to know."""
    scope = f"{s.statistics.replace('_', '-')} statistics"
    over = f" over {s.devices} devices by {s.way}, {scope}" if s.devices > 1 else ""
    network = f"{s.activation} {s.model.upper()} {'-'.join(map(str, s.widths))}"
    return f"{network}, {s.optimizer}, batch {s.batch_size}{over}"
