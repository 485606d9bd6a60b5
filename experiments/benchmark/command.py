"""Run the benchmark from a command line to a folder of results."""

import dataclasses
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import tyro

from experiments import disk
from experiments.benchmark import figures, memory, one_layer, report, sizes, torch_layers, training
from experiments.benchmark.bars import Results, bars
from experiments.benchmark.layers import ABSENT, present
from experiments.interrupt import INTERRUPTED, refuse
from experiments.tables import check_page

RECORD, KEYS = "results.json", {"plan", "times", "measures", "bars"}  # by which a former run is known
LIBRARIES = ("jax", "jaxlib", "flax", "haiku", "equinox", "torch")


@dataclasses.dataclass(frozen=True)
class Command:
    """Measure jaxbn beside the batch normalization of other libraries; write JSON, tables and figures.

    Attributes:
        quick: fewer sizes, repetitions and layers: two minutes instead of twelve.
        output: the folder to write to, new or empty; `docs/benchmark` by default, `runs/benchmark` if quick.
        replace: replace the files of a former run that is there.
        readme: a page that holds the marks `<!-- measured -->` and `<!-- /measured -->`: the short table goes there.
    """

    quick: bool = False
    output: Path | None = None
    readme: Path | None = None
    replace: bool = False


def main(arguments: list[str]) -> int:
    """Run the command line `arguments`; return the exit code."""
    command = tyro.cli(Command, args=arguments, prog="python -m experiments.benchmark")
    folder = command.output or Path("runs/benchmark" if command.quick else "docs/benchmark")
    plan = sizes.QUICK if command.quick else sizes.FULL
    try:
        if command.readme is not None:
            check_page(command.readme, report.MARKS)
        with disk.hold("--output", folder):
            disk.check_contents("--output", folder, RECORD, KEYS, replace=command.replace)
            try:
                results = measure(plan, print)
            except KeyboardInterrupt:
                print("Interrupted: nothing was written.", file=sys.stderr)
                return INTERRUPTED
            write(folder, results)
            if command.readme is not None:
                report.write_page(command.readme, results)
            print(report.bars_table(results))
            print(f"Written to {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}.")
    except (OSError, UnicodeDecodeError) as error:
        return refuse(error)
    return 0


def measure(plan: sizes.Plan, say: Callable[[str], Any]) -> Results:
    """Measure everything, in order; `say` gets each finding."""
    load = os.getloadavg()[0]
    # Programs of their own come first: a GPU, once this process has it, is lent to no other.
    found = list(child("experiments.benchmark.collectives"))
    for name in training.PAIR:
        peak = child("experiments.benchmark.training", name)
        found.append({"measure": "peak, ResNet", "contender": name, "value": peak})
    if jax.default_backend() == "gpu":
        plan = plan._replace(batch=sizes.GPU_BATCH)
    timed = []
    for row in one_layer.time_rows(plan):
        timed.append(row)
        what = f"{row['size']:>14} {row['dtype']:8} {row['epilogue']:13} {row['program']:16} {row['contender']:20}"
        time, ratio = 1e3 * row["seconds"]["median"], row["ours_to_theirs"]["median"]
        say(f"{what} {time:8.3f} ms, ours/theirs {ratio:.2f}")
    for row in measures(plan):
        found.append(row)
        say(f"{row['measure']}, {row['contender']}: {report.written(row['value'], '.3g')}")
    results = {
        "command": "python -m experiments.benchmark" + (" --quick" if plan.name == "quick" else ""),
        "plan": plan._asdict(),
        "versions": versions(),
        "hardware": hardware() | {"load_before": load},
        "absent": ABSENT,
        "times": timed,
        "measures": found,
    }
    return results | {"bars": bars(results)}


def measures(plan: sizes.Plan) -> Iterator[dict[str, Any]]:
    """Yield all but the times of one layer: a measure, whose it is, and a value. ResNet-50 takes some minutes."""
    names = present(plan.contenders)
    yield from one_layer.error_rows(names)
    yield from one_layer.masked_rows()
    yield from memory.rows(plan, names)
    yield from one_layer.dispatch_rows(names, plan.rounds)
    yield from training.deep_rows(plan.deep, plan.compilations)
    yield from training.resnet_50_rows(plan.stages, plan.steps)
    resnet_20 = training.RESNET_20 if plan.name == "full" else training.SMALLEST
    yield from training.resnet_20_rows(resnet_20, plan.rounds, plan.compilations)


def write(folder: Path, results: Results) -> None:
    """Write the results as JSON, as tables and as figures."""
    disk.write_json(folder / RECORD, results)
    disk.write(folder / "table.md", report.tables(results))
    figures.draw(folder, results)


def child(module: str, *arguments: str) -> Any:
    """Run a module of ours as a program; return the JSON that it prints."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries."""
    packages = {name: "dm-haiku" if name == "haiku" else name for name in present(LIBRARIES)}
    return {"python": platform.python_version()} | {name: version(package) for name, package in packages.items()}


def hardware() -> dict[str, Any]:
    """Return the machine and the settings of the memory allocator."""
    device = jax.devices()[0]
    name = device.device_kind
    if device.platform == "cpu":
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.is_file() else []
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "platform": device.platform,
        "device": name or platform.machine(),
        "cores": torch_layers.cores(),
        "allocator": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")},
    }
