"""The folder of a run.

`config.json` says what ran, with what and on what; `metrics.jsonl` holds one line for each arm, seed, learning rate
and logged step, `performance.jsonl` one for each chunk of steps; `checkpoints` is what to resume from; `summary.json`
and `figure.png` are made of the log at the end.
"""

import dataclasses
import json
import math
import os
import platform
import secrets
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import disk
from experiments.training.config import Config, Settings
from experiments.training.train import Metrics

LOG = "metrics.jsonl"
FILES = ("config.json", LOG, "performance.jsonl", "summary.json", "figure.png")
FOLDERS = ("checkpoints", "set_aside", "tensorboard")
KEYS = {"claim", "settings", "versions", "hardware"}  # of config.json, by which a former run is known
PACKAGES = ("jax", "jaxlib", "numpy", "flax", "optax", "orbax-checkpoint", "scikit-learn")
SPREAD = {"devices", "groups", "way"}  # the settings that a run with global statistics may be resumed with others of
Row = dict[str, Any]


def begin(folder: Path, config: Config) -> None:
    """Write `config.json`, and delete what a former run of this program has left in `folder` beside it."""
    given = dataclasses.asdict(config) | {"versions": versions(), "hardware": hardware(), "git": revision()}
    # First: a full disk is known before anything is lost.
    disk.write_json(folder / FILES[0], given | {"run": secrets.token_hex(8)})
    for name in FILES[1:]:
        (folder / name).unlink(missing_ok=True)
    for name in FOLDERS:
        disk.remove_folder(folder / name)


def identity(folder: Path) -> str:
    """Return the identity of the run in `folder`, which its checkpoints bear."""
    return disk.read_json(folder / FILES[0])["run"]


def check_same(folder: Path, settings: Settings) -> None:
    """Raise ValueError if the run in `folder` has other settings; with global statistics devices may differ."""
    former, own = disk.read_json(folder / FILES[0])["settings"], json.loads(json.dumps(dataclasses.asdict(settings)))
    free = SPREAD if settings.statistics == "global" else set()
    others = [key for key in own if key not in free and former.get(key) != own[key]]
    if others:
        key = others[0]
        raise ValueError(
            f"`--resume` needs the settings that {folder} began with; {key} was {former.get(key)}, and is "
            f"{own[key]}. Take the former {', '.join(others)}, or another folder."
        )


def revision() -> str | None:
    """Return the git revision of the program, and whether files differ from it; None where there is none."""
    describe = ["describe", "--always", "--abbrev=40", "--exclude=*", "--dirty= and changes"]
    git = ["git", "-C", str(Path(__file__).parent), *describe]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that numbers depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def hardware() -> dict[str, Any]:
    """Describe the devices and the machine."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
    }


def rows(arm: str, rates: tuple[float, ...], step: int, metrics: Metrics, gaps: dict[str, Any]) -> list[Row]:
    """Return the lines of the log for one chunk of one arm; `gaps` are those of its norms, if it has any."""
    lines = []
    for seed, rate in np.ndindex(*np.shape(metrics.train_loss)):
        line: Row = {"arm": arm, "seed": seed, "learning_rate": rates[rate], "step": step}
        line |= {name: _number(values[seed, rate]) for name, values in metrics._asdict().items()}
        lines.append(line | ({"gaps": {k: _number(v[seed, rate]) for k, v in gaps.items()}} if gaps else {}))
    return lines


def write(path: Path, lines: list[Row], *, over: bool = False) -> None:
    """Add `lines` to a JSONL file, or write them over what it holds."""
    (disk.write if over else disk.append)(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))


def read(path: Path) -> list[Row]:
    """Read the lines of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _number(value: np.float32) -> float | None:
    """Return a float that prints with the digits of float32; JSON has no NaN, so one that is not finite is None."""
    return float(str(value)) if math.isfinite(value) else None
