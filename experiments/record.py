"""What a run leaves behind: one folder, in which nothing is ever half written.

`config.json` says what ran, with what and on what; `metrics.jsonl` holds one line for each arm, seed, learning rate
and logged step; `summary.json` and `figure.png` are made of it at the end.
"""

import dataclasses
import json
import math
import os
import platform
import re
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.config import Config
from experiments.train import Metrics

PACKAGES = ("jax", "jaxlib", "numpy", "flax", "optax", "scikit-learn")
Row = dict[str, Any]


def open_folder(folder: Path, config: Config) -> None:
    """An empty `folder` with `config.json`; a former run that is there is replaced as a whole.

    Raises:
        ValueError: `folder` holds something else, which is left as it is.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`--out` must be a folder; {folder} is a file.")
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise ValueError(f"`--out` must be new, empty or a former run, which is replaced; {folder} is none of them.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", dataclasses.asdict(config) | {"versions": versions(), "hardware": hardware()})


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
    """Add `lines` to a JSONL file in one write: whoever is killed leaves whole lines."""
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    with path.open("ab", buffering=0) as file:
        file.write(text.encode())


def read(path: Path) -> list[Row]:
    """The lines of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_json(path: Path, value: Any) -> None:
    """Write `value` to a file that is there in full or not at all; lists of numbers are a line each."""
    partial = path.with_name(path.name + ".partial")
    text = json.dumps(value, indent=2, allow_nan=False)
    text = re.sub(r"\[\s+([-\d][^\[\]{}\"]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def _number(value: np.float32) -> float | None:
    """A float that prints with the digits of float32, or None if it is not finite."""
    return float(str(value)) if math.isfinite(value) else None
