"""What a run leaves behind: one folder.

`config.json` says what ran, with what and on what; `metrics.jsonl` holds one line for each arm, seed, learning rate
and logged step; `summary.json` and `figure.png` are made of it at the end.
"""

import dataclasses
import json
import math
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import disk
from experiments.training.config import Config
from experiments.training.train import Metrics

FILES = ("config.json", "metrics.jsonl", "summary.json", "figure.png")
KEYS = {"claim", "settings", "versions", "hardware"}  # of config.json, by which a former run is known
PACKAGES = ("jax", "jaxlib", "numpy", "flax", "optax", "scikit-learn")
Row = dict[str, Any]


def begin(folder: Path, config: Config) -> None:
    """Write `config.json`, and delete what a former run of this program has left in `folder` beside it."""
    given = dataclasses.asdict(config) | {"versions": versions(), "hardware": hardware()}
    disk.write_json(folder / FILES[0], given)  # first: a full disk is known before anything is lost
    for name in FILES[1:]:
        (folder / name).unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """Of Python and of what the numbers depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def hardware() -> dict[str, Any]:
    """What the run is on."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
    }


def rows(arm: str, rates: tuple[float, ...], step: int, metrics: Metrics) -> list[Row]:
    """The lines of the log for one chunk of one arm; what is not finite is None, since JSON has no NaN."""
    runs = np.ndindex(*np.shape(metrics.train_loss))
    return [
        {"arm": arm, "seed": seed, "learning_rate": rates[rate], "step": step}
        | {name: _number(values[seed, rate]) for name, values in metrics._asdict().items()}
        for seed, rate in runs
    ]


def append(path: Path, lines: list[Row]) -> None:
    """Add `lines` to a JSONL file."""
    disk.append(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))


def read(path: Path) -> list[Row]:
    """The lines of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _number(value: np.float32) -> float | None:
    """A float that prints with the digits of float32, or None if it is not finite."""
    return float(str(value)) if math.isfinite(value) else None
