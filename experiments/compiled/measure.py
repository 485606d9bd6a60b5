"""The file of records, one for each case, in which an interrupted run goes on."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments import disk
from experiments.compiled.cases import Case

ROOT = Path(__file__).parents[2]
# What the numbers depend on, beside jaxbn where the layer is its own.
SOURCES = [
    *(ROOT / "experiments/compiled" / f"{name}.py" for name in ("targets", "programs", "counting")),
    *(ROOT / "experiments/benchmark" / f"{name}.py" for name in ("networks", "hlo")),
]
Record = dict[str, Any]


def hash_sources() -> dict[bool, str]:
    """Return a digest of the sources that a case depends on, by whether the layer is jaxbn's."""
    found, own = hashlib.sha256(), {}
    for ours, paths in ((False, SOURCES), (True, sorted((ROOT / "jaxbn").rglob("*.py")))):
        for path in paths:
            content = path.read_bytes()
            found.update(f"{path.name} {len(content)}\n".encode() + content)
        own[ours] = found.hexdigest()[:16]
    return own


def read_records(path: Path) -> dict[Case, Record]:
    """Return the last record of each case; a line that an interruption cut off is none."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[Case(**record["case"])] = record
    return found


def measure_missing(
    path: Path, cases: list[Case], versions: dict[str, str], measure: Callable[[Case], Record]
) -> Iterator[tuple[Case, Record]]:
    """Measure the cases of which `path` has no valid record from the same versions; add each as it is done."""
    hashes, found = hash_sources(), read_records(path)
    valid = {c: r for c, r in found.items() if r["sources"] == hashes[c.ours] and "error" not in r}
    if path.is_file() and not path.read_bytes().endswith(b"\n"):
        path.write_bytes(path.read_bytes() + b"\n")
    for case in cases:
        record = valid.get(case)
        if record is None or record["versions"] != versions:
            began = time.perf_counter()
            record = {"case": case._asdict(), "sources": hashes[case.ours], "versions": versions}
            try:
                record |= measure(case)
            except Exception as error:  # a library's failure is a result, which the bars count as missed
                record["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            record["seconds"] = round(time.perf_counter() - began, 1)
            disk.append(path, json.dumps(record, allow_nan=False) + "\n")
        yield case, record
