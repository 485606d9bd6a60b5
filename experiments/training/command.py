"""From a command line to a finished run: read, validate, train each arm, write what came of it."""

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments import disk, memory
from experiments.interrupt import INTERRUPTED, REFUSED, Interrupt, refuse
from experiments.training import (
    data,
    figure,
    networks,
    observe,
    parallel,
    processes,
    record,
    statistics,
    summary,
    train,
)
from experiments.training.checkpoint import Checkpoints
from experiments.training.config import Config, Settings, changed, check_data, load, refusal
from experiments.training.saved import numbers

USAGE = "python -m experiments CONFIG [--out FOLDER] [--replace | --resume] [settings]"


@dataclasses.dataclass(frozen=True)
class Command:
    """Train as a config says, and write a log, checkpoints, a summary and a figure.

    Attributes:
        config: a file of `configs/`.
        settings: each overrides the config.
        out: the folder to write to, new or empty; `runs/NAME` by default.
        replace: replace the files of a former run that is there. Whatever else is there stays.
        resume: go on from the last checkpoint of the run in the folder, on as many devices as you like where
            statistics are global.
        checkpoint: which one to resume from, by its number; later ones are set aside.
        checkpoint_every: steps between two checkpoints, a multiple of `log_every`; a tenth of the steps by default.
        keep: how many checkpoints stay.
        tensorboard: write the log for TensorBoard, too.
        coordinator: host and port of process 0, where several processes train together; by default
            JAX_COORDINATOR_ADDRESS.
        processes: how many there are; by default JAX_NUM_PROCESSES.
        process: which of them this is, from 0; by default JAX_PROCESS_ID.
        cluster: `auto`, or a cluster that JAX knows (slurm, ompi, k8s, ...), whose environment says the three above.
    """

    config: tyro.conf.Positional[Path]
    settings: Annotated[Settings, tyro.conf.arg(name="")]
    out: Path | None = None
    replace: bool = False
    resume: bool = False
    checkpoint: int | None = None
    checkpoint_every: int | None = None
    keep: int = 3
    tensorboard: bool = False
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    cluster: str | None = None


class Run:
    """A run under way: its config, where it writes, and how far it has come."""

    def __init__(self, config: Config, command: Command, images: data.Data, interrupt: Interrupt):
        """Of a validated command line."""
        self.config, self.settings, self.command, self.data = config, config.settings, command, images
        self.folder, self.interrupt = folder_of(command, config), interrupt
        self.writes = processes.first()
        self.rows: list[record.Row] = []
        self.finished: dict[str, Any] = {}

    def build(self, arm: str) -> train.Arm:
        """Compile an arm."""
        pixels = self.data.train.images.shape[1]
        model = networks.build(self.settings, arm, pixels, self.data.shape, self.data.classes)
        return train.compile_arm(self.settings, model)

    def stopped(self) -> bool:
        """Return whether any process was asked to stop."""
        return processes.any_of(self.interrupt.requested)

    def execute(self) -> int:
        """Train every arm, to the end or until interrupted; the exit code."""
        s, console, identity = self.settings, Console(quiet=not self.writes), record.identity(self.folder)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
        with (
            Checkpoints(self.folder, identity, self.command.keep) as checkpoints,
            observe.Observer(self.folder, s, self.data, tensorboard=self.command.tensorboard) as observer,
            Progress(TextColumn("{task.description}"), *columns, console=console, disable=not self.writes) as progress,
        ):
            done, start = self._restored(checkpoints)
            bar = progress.add_task("starting", total=s.steps * len(s.arms), completed=done)
            for at, norm in enumerate(s.arms):
                if norm in self.finished and self.finished[norm]["steps"] == s.steps:
                    continue
                if self.stopped():
                    break
                progress.update(bar, description=f"{summary.NAMES[norm]} (of {len(s.arms)} arms)")
                begun = done - at * s.steps if start is not None else 0
                self._train(norm, at, start, begun, checkpoints, observer, lambda: progress.advance(bar, s.log_every))
                start = None
        return self._report(console)

    def _restored(self, checkpoints: Checkpoints) -> tuple[int, train.Carry | None]:
        """Take up the checkpoint to resume from: how many steps were done, and where its arm stands."""
        if not self.command.resume:
            return 0, None
        s, number = self.settings, self.command.checkpoint
        number = numbers(self.folder)[-1] if number is None else number
        known = checkpoints.record(number)
        carry = checkpoints.restore(number, self.build(known["arm"]).shapes())
        self.finished, self.rows = known["finished"], record.read(self.folder / record.LOG)[: known["lines"]]
        if self.writes:
            record.rewrite(self.folder / record.LOG, self.rows)
        return s.arms.index(known["arm"]) * s.steps + known["step"], carry

    def _train(
        self,
        norm: str,
        at: int,
        start: Any,
        begun: int,
        checkpoints: Checkpoints,
        observer: observe.Observer,
        tick: Any,
    ) -> None:
        s, arm = self.settings, self.build(norm)
        every = self.command.checkpoint_every or -(-s.steps // 10 // s.log_every) * s.log_every
        watch = observer.watch(norm)

        def save(step: int, carry: train.Carry) -> None:
            known = {"arm": norm, "step": step, "lines": len(self.rows), "finished": self.finished}
            checkpoints.save(at * s.steps + step, carry, known)

        def log(step: int, metrics: train.Metrics, carry: train.Carry) -> None:
            measured = zip(record.rows(norm, s.learning_rates, step, metrics), watch(step, metrics, carry), strict=True)
            rows = [row | gaps for row, gaps in measured]
            self.rows += rows
            if self.writes:
                record.append(self.folder / record.LOG, rows)
            if step % every == 0 and step < s.steps:
                save(step, carry)
            tick()

        trained = train.train(s, arm, self.data, log, self.stopped, start, begun)
        if trained.steps:
            self.finished[norm] = self._finish(norm, arm, trained)
            save(trained.steps, trained.carry)

    def _finish(self, norm: str, arm: train.Arm, trained: train.Trained) -> dict[str, Any]:
        """The results of an arm at its best learning rate by validation."""
        rate = summary.best_rate(self.rows, norm)
        at = self.settings.learning_rates.index(rate)
        chosen = jax.jit(lambda carry: jax.tree.map(lambda v: v[:, at : at + 1], carry))(trained.carry)
        found: dict[str, Any] = {"steps": trained.steps, "seconds": trained.seconds}
        found["test_accuracy"] = np.asarray(arm.evaluate(chosen, self.data.test)[1])[:, 0].tolist()
        if self.settings.evaluations != ("running",):
            found["evaluations"] = statistics.accuracies(self.settings, arm, chosen, self.data)
        return found

    def _report(self, console: Console) -> int:
        s, folder = self.settings, self.folder
        complete = [self.finished.get(norm, {}).get("steps") for norm in s.arms] == [s.steps] * len(s.arms)
        if self.finished and self.writes:
            results = summary.summarize(self.rows, s.target_accuracy, self.finished, s.log_every)
            disk.write_json(folder / "summary.json", {"complete": complete, "arms": results})
            spread = f"lines: median of {s.seeds} seeds; bands: interquartile range; loss: mean of {s.log_every} steps"
            name = self.config.name if complete else f"{self.config.name}, interrupted"
            title = f"{name}: {described(s)}\n{spread}"
            figure.draw(folder / "figure.png", figure.lines(self.rows), title, s.target_accuracy)
            console.print(
                summary.table(
                    results, f"Median (quartiles) of n seeds; ms/step: all runs of an arm at once. {described(s)}."
                )
            )
            for told in summary.evaluations(results):
                console.print(told)
            console.print(expectation(self.config))
        if not complete:
            console.print(f"Interrupted: {folder} holds what was done until then; `--resume` goes on.")
            return INTERRUPTED
        console.print(f"Written to {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}.")
        return 0


def main(arguments: list[str], interrupt: Interrupt) -> int:
    """Run the command line `arguments`; the exit code."""
    try:
        config, command = parse(arguments)
        s, together = config.settings, processes.several(arguments)
        if together:
            processes.initialize(command.coordinator, command.processes, command.process, command.cluster, s.devices)
        else:
            parallel.simulate_devices(s.devices)
        parallel.require_devices(s.devices)
        images = data.load(s.data)
        check_data(s, images)
        memory.require(s, images)
    except (ValueError, TypeError, OSError) as error:
        return refuse(error)
    folder = folder_of(command, config)
    try:
        with disk.hold("--out", folder) if processes.first() else contextlib.nullcontext():
            problem = None
            if processes.first():
                try:
                    _prepare(folder, config, command)
                except (OSError, ValueError) as error:
                    problem = error
            if processes.any_of(problem is not None):
                return refuse(problem) if problem else REFUSED
            if together:
                print(f"Process {jax.process_index()} of {jax.process_count()}, writing to {folder}.", file=sys.stderr)
            return Run(config, command, images, interrupt).execute()
    except (OSError, ValueError) as error:
        return refuse(error)


def _prepare(folder: Path, config: Config, command: Command) -> None:
    """Make the folder that of this run, or check that it is; nothing is written unless all is well."""
    if not command.resume:
        disk.check_contents("--out", folder, record.FILES[0], record.KEYS, replace=command.replace)
        record.begin(folder, config)
        return
    disk.check_contents("--out", folder, record.FILES[0], record.KEYS)
    there, wanted = numbers(folder), command.checkpoint
    if not there or wanted not in (None, *there):
        got = f"no {wanted}, but {', '.join(map(str, there))}" if there else "none"
        raise ValueError(f"`--resume` needs a checkpoint; {folder} holds {got}. Take one of these, or start anew.")
    record.check_same(folder, config.settings)
    if wanted is not None:
        record.set_aside(folder, [n for n in there if n > wanted])


def folder_of(command: Command, config: Config) -> Path:
    """The folder that a command line writes to."""
    return command.out or Path("runs") / config.name


def parse(arguments: list[str]) -> tuple[Config, Command]:
    """The config that `arguments` name, changed as they say, and the rest of what they say.

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
    config, every = changed(config, command.settings), command.checkpoint_every
    if command.replace and command.resume:
        raise ValueError("command line: `--replace` and `--resume` exclude each other.")
    if command.checkpoint is not None and not command.resume:
        raise ValueError("command line: `--checkpoint` says where to resume from; pass `--resume`, too.")
    if command.keep < 1 or (every is not None and (every < 1 or every % config.settings.log_every)):
        raise ValueError(
            f"command line: `--keep` must be 1 at least, and `--checkpoint-every` a multiple of `log_every`; got "
            f"{command.keep}, and {every} with {config.settings.log_every}."
        )
    return config, command


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
