"""A run under way: every arm trained from where it stands, saved as it goes, and reported at its end."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments import disk
from experiments.interrupt import INTERRUPTED, Interrupt
from experiments.training import data, figure, networks, observe, processes, record, statistics, summary, train
from experiments.training.checkpoint import Checkpoints
from experiments.training.config import Config, Settings
from experiments.training.saved import numbers


class Saving(NamedTuple):
    """The options of a command line for checkpoints and logs.

    Attributes:
        resume: whether to go on from a checkpoint.
        checkpoint: which one; None for the last.
        every: steps between two; None for a tenth of all.
        keep: how many stay.
        tensorboard: whether to write for TensorBoard, too.
    """

    resume: bool
    checkpoint: int | None
    every: int | None
    keep: int
    tensorboard: bool


class Run:
    """A run under way: its config, where it writes, and how far it has come."""

    def __init__(self, config: Config, folder: Path, saving: Saving, images: data.Data, interrupt: Interrupt):
        """Prepare a run of a validated command line, into a prepared folder."""
        self.config, self.settings, self.saving, self.data = config, config.settings, saving, images
        self.folder, self.interrupt = folder, interrupt
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
            Checkpoints(self.folder, identity, self.saving.keep) as checkpoints,
            observe.Observer(self.folder, s, self.data, tensorboard=self.saving.tensorboard) as observer,
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
        if not self.saving.resume:
            return 0, None
        s, number = self.settings, self.saving.checkpoint
        number = numbers(self.folder)[-1] if number is None else number
        known = checkpoints.record(number)
        carry = checkpoints.restore(number, self.build(known["arm"]).shapes())
        self.finished, self.rows = known["finished"], record.read(self.folder / record.LOG)[: known["lines"]]
        if self.writes:
            record.rewrite(self.folder / record.LOG, self.rows)
        done = s.arms.index(known["arm"]) * s.steps + known["step"]
        return done, carry if known["step"] < s.steps else None  # the next arm starts from its own weights

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
        every = self.saving.every or -(-s.steps // 10 // s.log_every) * s.log_every
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
        """Return the results of an arm at its best learning rate by validation."""
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


def expectation(config: Config) -> str:
    """Return the config's expectation; which settings differ where the run is not the config's."""
    if config.overridden:
        return f"What the config expects is of its own settings; this run has others: {', '.join(config.overridden)}."
    return f"What the config expects: {' '.join(config.claim.expected.split())}"


def described(s: Settings) -> str:
    """Name the settings that a reader of a figure wants to know."""
    scope = f"{s.statistics.replace('_', '-')} statistics"
    over = f" over {s.devices} devices by {s.way}, {scope}" if s.devices > 1 else ""
    network = f"{s.activation} {s.model.upper()} {'-'.join(map(str, s.widths))}"
    return f"{network}, {s.optimizer}, batch {s.batch_size}{over}"
