"""A run under way: every arm trained from where it stands, saved as it goes, and reported at its end."""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments import disk
from experiments.interrupt import INTERRUPTED, Interrupt
from experiments.training import compare, data, networks, observe, processes, record, statistics, summary, train
from experiments.training.checkpoint import Checkpoints
from experiments.training.config import Config, Settings
from experiments.training.saved import numbers


@dataclasses.dataclass(frozen=True)
class Saving:
    """The checkpoints and logs of a run, as a command line says it.

    Attributes:
        resume: go on from the last checkpoint of the run in the folder, on as many devices as you like where
            statistics are global.
        checkpoint: which one to resume from, by its number; later ones are set aside.
        checkpoint_every: steps between two checkpoints, a multiple of `log_every`; a tenth of the steps by default.
        keep: how many checkpoints stay.
        tensorboard: write the log for TensorBoard, too.
    """

    resume: bool = False
    checkpoint: int | None = None
    checkpoint_every: int | None = None
    keep: int = 3
    tensorboard: bool = False


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
        return train.compile_arm(self.settings, networks.build(self.settings, arm, self.data))

    def stopped(self) -> bool:
        """Return whether any process was asked to stop."""
        return processes.any_of(self.interrupt.requested)

    def execute(self) -> int:
        """Train every arm, to the end or until interrupted; return the exit code."""
        s, console, identity = self.settings, Console(quiet=not self.writes), record.identity(self.folder)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
        with (
            Checkpoints(self.folder, identity, self.saving.keep) as checkpoints,
            observe.open_logs(self.folder, s, tensorboard=self.saving.tensorboard) as observed,
            Progress(TextColumn("{task.description}"), *columns, console=console, disable=not self.writes) as progress,
        ):
            done, start = self._restored(checkpoints)
            bar = progress.add_task("starting", total=s.steps * len(s.arms), completed=done)
            for norm in s.arms[done // s.steps :]:
                if self.stopped():
                    break
                progress.update(bar, description=f"{summary.NAMES[norm]} (of {len(s.arms)} arms)")
                self._train(norm, start, done % s.steps, checkpoints, observed, partial(progress.advance, bar))
                start, done = None, 0
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
            record.write(self.folder / record.LOG, self.rows, over=True)
        done = s.arms.index(known["arm"]) * s.steps + known["step"]
        return done, carry if known["step"] < s.steps else None  # the next arm starts from its own weights

    def _train(
        self,
        norm: str,
        start: train.Carry | None,
        begun: int,
        checkpoints: Checkpoints,
        observed: Callable[..., None],
        advance: Callable[[int], None],
    ) -> None:
        s, arm = self.settings, self.build(norm)
        every = self.saving.checkpoint_every or -(-s.steps // 10 // s.log_every) * s.log_every
        before, gauge, gauged = s.arms.index(norm) * s.steps, observe.gauge(s, norm, self.data), time.perf_counter()

        def save(step: int, carry: train.Carry) -> None:
            known = {"arm": norm, "step": step, "lines": len(self.rows), "finished": self.finished}
            checkpoints.save(before + step, carry, known)

        def log(step: int, metrics: train.Metrics, carry: train.Carry) -> None:
            nonlocal gauged
            gaps, last, gauged = gauge(carry) if gauge else {}, gauged, time.perf_counter()
            observed(norm, step, gauged - last, metrics, gaps)
            rows = record.rows(norm, s.learning_rates, step, metrics, gaps)
            self.rows += rows
            if self.writes:
                record.write(self.folder / record.LOG, rows)
            if step % every == 0 and step < s.steps:
                save(step, carry)
            advance(s.log_every)

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
            described = describe_settings(s)
            title = f"{name}: {described}\n{spread}"
            ran = compare.read(folder)
            compare.draw(folder / "figure.png", [ran], title, s.target_accuracy)
            console.print(compare.table([ran]), markup=False, soft_wrap=True)
            console.print(f"Median (quartiles) of n seeds; ms/step: all runs of an arm at once. {described}.")
            for line in (line for arm in results for line in summary.evaluations(arm)):
                console.print(line)
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


def describe_settings(s: Settings) -> str:
    """Name the settings that a reader of a figure wants to know."""
    scope = f"{s.statistics.replace('_', '-')} statistics"
    over = f" over {s.devices} devices by {s.way}, {scope}" if s.devices > 1 else ""
    network = f"{s.activation} {s.model.upper()} {'-'.join(map(str, s.widths))}"
    return f"{network}, {s.optimizer}, batch {s.batch_size}{over}"
