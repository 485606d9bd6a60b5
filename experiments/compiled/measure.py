"""The record of a case, and the file of records, in which an interrupted run goes on."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments import disk
from experiments.compiled.cases import Case

ROOT = Path(__file__).parents[2]
# What the numbers depend on, beside jaxbn where the layer is its own.
SOURCES = [
    *(ROOT / "experiments/compiled" / f"{name}.py" for name in ("targets", "programs", "counting", "measure")),
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


def keep_valid(found: dict[Case, Record], hashes: dict[bool, str]) -> dict[Case, Record]:
    """Return the records that were made from the sources as they are and hold no error."""
    return {c: r for c, r in found.items() if r["sources"] == hashes[c.ours] and "error" not in r}


def measure_missing(
    path: Path, cases: list[Case], versions: dict[str, str], measure: Callable[[Case], Record]
) -> Iterator[tuple[Case, Record]]:
    """Measure the cases of which `path` has no valid record from the same versions; add each as it is done."""
    hashes = hash_sources()
    valid = keep_valid(read_records(path), hashes)
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


def measure_case(case: Case) -> Record:
    """Return what the compiler made of a case.

    `moved_bytes` is that of the steady state, in which the second pass that jaxbn makes in its first steps and after
    jumps is not taken; `moved_bytes_rare` that of the program with it. Temporaries and collectives are the program's.
    """
    from experiments.compiled.counting import count_collectives, has_loop

    lowered, array = _lower(case)
    with never_repeating():
        steady, _ = _lower(case)
    repeats = lowered.as_text() != steady.as_text()
    with ThreadPoolExecutor() as pool:  # each takes one core
        compiled, *others = pool.map(lambda program: program.compile(), [lowered, steady][: 1 + repeats])
    usual = others[0] if repeats else compiled
    if has_loop(usual.as_text()):
        raise ValueError("the program has a loop or a branch beside `jax.lax.while_loop`: no steady state")
    return {
        "array_bytes": array,
        "moved_bytes": _moved(case, usual),
        "moved_bytes_rare": _moved(case, compiled) if repeats else None,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "collectives": {kind: sent._asdict() for kind, sent in count_collectives(compiled.as_text()).items()},
    }


@contextmanager
def never_repeating() -> Iterator[None]:
    """Compile `jax.lax.while_loop` as if its condition were false: in jaxbn it is the rare second pass."""
    import jax

    while_loop = jax.lax.while_loop
    jax.lax.while_loop = lambda condition, body, start: start
    try:
        yield
    finally:
        jax.lax.while_loop = while_loop


def _lower(case: Case) -> tuple[Any, float]:
    """Return what a case's compiler is given, and the bytes that a device holds of x."""
    import jax

    from experiments.compiled.programs import build_program

    jax.clear_caches()  # no trace from before `jax.lax.while_loop` was another
    program = build_program(case)
    with jax.set_mesh(program.mesh):
        return jax.jit(program.step, donate_argnums=0).lower(*program.arguments), program.array_bytes


def _moved(case: Case, compiled: Any) -> float:
    """Return the compiler's own count of the bytes moved; for GPUs, for which it makes none, the count by operation."""
    from experiments.compiled.counting import count_moved

    if case.kind == "tpu":
        return compiled.cost_analysis()["bytes accessed"]
    return count_moved(compiled.as_text())
