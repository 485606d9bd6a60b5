"""Take a command line to a finished run: read, validate, train each arm, write what came of it."""

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import jax
import tyro
from pydantic import ValidationError

from experiments import disk, memory
from experiments.interrupt import REFUSED, Interrupt, refuse
from experiments.training import data, parallel, processes, record
from experiments.training.check import check_data
from experiments.training.config import Config, Settings, changed, load, refusal
from experiments.training.processes import Together
from experiments.training.run import Run, Saving
from experiments.training.saved import FOLDER, numbers

USAGE = "python -m experiments CONFIG [--out FOLDER] [--replace | --resume] [settings]"


@dataclasses.dataclass(frozen=True)
class Command:
    """Train as a config says, and write a log, checkpoints, a summary and a figure.

    Attributes:
        config: a file of `configs/`.
        settings: each overrides the config.
        saving: what is kept.
        together: the processes.
        out: the folder to write to, new or empty; `runs/NAME` by default.
        replace: replace the files of a former run that is there. All else there stays.
    """

    config: tyro.conf.Positional[Path]
    settings: Annotated[Settings, tyro.conf.arg(name="")]
    saving: Annotated[Saving, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Saving)
    together: Annotated[Together, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Together)
    out: Path | None = None
    replace: bool = False


def main(arguments: list[str], interrupt: Interrupt) -> int:
    """Run the command line `arguments`; return the exit code."""
    try:
        config, command = parse(arguments)
        s, together = config.settings, processes.several(arguments)
        if together:
            processes.initialize(command.together, s.devices)
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
            return Run(config, folder, command.saving, images, interrupt).execute()
    except (OSError, ValueError) as error:
        return refuse(error)


def _prepare(folder: Path, config: Config, command: Command) -> None:
    """Make the folder that of this run, or check that it is; nothing is written unless all is well."""
    resume, wanted = command.saving.resume, command.saving.checkpoint
    disk.check_contents("--out", folder, record.FILES[0], record.KEYS, replace=None if resume else command.replace)
    if not resume:
        record.begin(folder, config)
        return
    there = numbers(folder)
    if not there or wanted not in (None, *there):
        got = f"no {wanted}, but {', '.join(map(str, there))}" if there else "none"
        raise ValueError(f"`--resume` needs a checkpoint; {folder} holds {got}. Take one of these, or start again.")
    record.check_same(folder, config.settings)
    later = [] if wanted is None else [n for n in there if n > wanted]
    for number in later:  # others will have their numbers; nothing is deleted
        disk.move_aside(folder / FOLDER / str(number), folder / "set_aside")


def folder_of(command: Command, config: Config) -> Path:
    """Return the folder that a command line writes to."""
    return command.out or Path("runs") / config.name


def parse(arguments: list[str]) -> tuple[Config, Command]:
    """Return the config that `arguments` name, changed as they say, and the rest of what they say.

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
    config, saving, every = changed(config, command.settings), command.saving, command.saving.checkpoint_every
    if command.replace and saving.resume:
        raise ValueError("command line: `--replace` and `--resume` exclude each other.")
    if saving.checkpoint is not None and not saving.resume:
        raise ValueError("command line: `--checkpoint` says where to resume from; pass `--resume`, too.")
    if saving.keep < 1 or (every is not None and (every < 1 or every % config.settings.log_every)):
        raise ValueError(
            f"command line: `--keep` must be 1 at least, and `--checkpoint-every` a multiple of `log_every`; got "
            f"{saving.keep}, and {every} with {config.settings.log_every}."
        )
    return config, command
