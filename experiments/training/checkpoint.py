"""Checkpoints of a run, by orbax: written while training goes on, complete or not there, the last few kept.

A checkpoint holds the parameters, the running statistics and the optimizer's state of the arm in training, and a
record: the run, the arm, the step, how long the log was, and the results of finished arms. The step is the position in
the data and the random key: both are functions of a seed and the step.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from experiments.disk import DiskError
from experiments.training.saved import FOLDER, numbers
from experiments.training.train import Carry

logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax speaks of its defaults; errors are raised, too


class Checkpoints:
    """The checkpoints in the folder of a run; a context manager, which waits for what is being written."""

    def __init__(self, folder: Path, run: str, keep: int):
        """Open those in `folder`, of the run with the identity `run`."""
        self._folder, self._run = (folder / FOLDER).absolute(), run
        former = sys.unraisablehook
        # Reads that were under way when the first one failed, which is reported, would say so on their own.
        sys.unraisablehook = lambda r: None if str(r.exc_value) == "Event loop is closed" else former(r)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> "Checkpoints":
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for what is being written."""
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of many kinds, and of an earlier checkpoint that was being written
            said = " ".join(str(error).split())[:120]
            raise DiskError(f"{self._folder} cannot be written ({said}). What was there is as it was.") from None

    def save(self, number: int, carry: Carry, record: dict[str, Any]) -> None:
        """Save under `number`, which grows, if that number is not there; raise DiskError if it cannot be written."""
        if number in self._manager.all_steps():
            return
        known = ocp.args.JsonSave(record | {"run": self._run})
        with self._writing():
            self._manager.save(number, args=ocp.args.Composite(carry=ocp.args.StandardSave(carry), record=known))

    def record(self, number: int) -> dict[str, Any]:
        """Read the record of a checkpoint.

        Raises:
            ValueError: it cannot be read, or is of another run; names the one before.
        """
        try:
            restored = self._manager.restore(number, args=ocp.args.Composite(record=ocp.args.JsonRestore()))
            found = restored["record"]["run"]
        except Exception as error:
            raise self._refusal(number, f"cannot be read ({type(error).__name__})") from None
        if found != self._run:
            raise self._refusal(number, f"is of another run, {found}, and not of {self._run}")
        return restored["record"]

    def restore(self, number: int, shapes: Carry) -> Carry:
        """Read a checkpoint onto the devices that `shapes` names.

        Raises:
            ValueError: it is damaged, or of another network; names the one before.
        """
        try:
            args = ocp.args.Composite(carry=ocp.args.StandardRestore(shapes))
            return self._manager.restore(number, args=args)["carry"]
        except Exception as error:
            said = " ".join(str(error).split())[:120]
            raise self._refusal(number, f"is damaged, or of another network ({said})") from None

    def _refusal(self, number: int, what: str) -> ValueError:
        before = [n for n in numbers(self._folder.parent) if n < number]
        remedy = f"Pass `--resume --checkpoint {before[-1]}` to go on from the one before" if before else "Start again"
        return ValueError(f"checkpoint {self._folder / str(number)} {what}. {remedy}.")
