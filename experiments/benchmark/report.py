"""The tables: everything for `table.md`, and the few rows that the README shows."""

from itertools import product
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from experiments.benchmark.bars import Results, ratios, resnet, value
from experiments.benchmark.layers import PROGRAMS
from experiments.benchmark.sizes import OURS, TORCH
from experiments.tables import markdown, put

MARKS = ("<!-- measured -->", "<!-- /measured -->")
NOT_MEASURED = "not measured"
COLUMNS = {"flax": "flax", "flax, stable": "flax, `use_fast_variance=False`", TORCH: TORCH, OURS: "jaxbn"}
LEGEND = """
Milliseconds, the median over the rounds, and in parentheses our time over theirs, the median over the rounds of the
ratio within each. Beside them the largest error of y at mean/std 1 and 1000 and, where there is a backward pass, the
relative error of dx at mean/std 1.
"""


def tables(results: Results) -> str:
    """Return all results as Markdown."""
    parts = ["# Benchmark", described(results), "## Bars", bars_table(results), "## Overview", readme_table(results)]
    parts += ["## One layer", LEGEND.strip()]
    for program in PROGRAMS:
        for dtype, epilogue in ratios(results, program, OURS):
            parts += [f"### {program}, {dtype}, epilogue {epilogue}", _times(results, program, dtype, epilogue)]
    parts += ["## Everything else", _measures(results)]
    return "\n\n".join(parts) + "\n"


def described(results: Results) -> str:
    """Describe the measurement: versions, machine and rounds."""
    hardware, versions = results["hardware"], results["versions"]
    names = ", ".join(f"{name} {version}" for name, version in versions.items())
    absent = f" Not installed, and so not measured: {', '.join(results['absent'])}." if results["absent"] else ""
    kept = " in which the C library keeps the pages of freed arrays" if hardware["allocator"] else ""
    machine = f"{hardware['device']} ({hardware['platform']}, {hardware['cores']} cores"
    return (
        f"Measured with {names} on {machine}, load {hardware['load_before']:.1f} before), by `{results['command']}`: "
        f"{results['plan']['rounds']} interleaved rounds in one process{kept}.{absent}"
    )


def bars_table(results: Results) -> str:
    """Return each bar with its verdict."""
    body = []
    for row in results["bars"]:
        shown = "" if row["value"] is None else f"{row['value']:.2f}"
        body.append([row["bar"], row["limit"], shown, row["where"], row["verdict"]])
    return markdown(["bar", "limit", "measured", "worst at", "verdict"], body)


def written(v: float | int | str, form: str = ".0e") -> str:
    """Return a number in this form; words stay."""
    return v if isinstance(v, str) else format(v, form)


def _times(results: Results, program: str, dtype: str, epilogue: str) -> str:
    wanted = {"program": program, "dtype": dtype, "epilogue": epilogue}
    rows = [r for r in results["times"] if all(r[k] == v for k, v in wanted.items())]
    names = list(dict.fromkeys(r["contender"] for r in rows))
    body = []
    for size in dict.fromkeys(r["size"] for r in rows):
        here = {r["contender"]: r for r in rows if r["size"] == size}
        body.append([size, *(_cell(here[n]) if n in here else "" for n in names)])
    return markdown(["size", *names], body)


def _cell(row: dict[str, Any]) -> str:
    time, ratio = 1e3 * row["seconds"]["median"], row["ours_to_theirs"]["median"]
    near, far = row["errors"], row["errors_far"]
    own = "" if row["contender"] == OURS else f" ({ratio:.2f})"
    dx = f"; dx {written(near['dx'])}" if "dx" in near else ""
    return f"{time:.3g}{own}; y {written(near['y'])}, {written(far['y'])}{dx}"


def _measures(results: Results) -> str:
    body = []
    for row in results["measures"]:
        known = {"measure", "contender", "value", "median", "low", "high"}
        labels = ", ".join(f"{k} {v}" for k, v in row.items() if k not in known)
        shown = NOT_MEASURED if row["value"] is None else written(row["value"], ".3g")
        body.append([row["measure"], row["contender"], labels, shown])
    return markdown(["measure", "library", "of", "value"], body)


def readme_table(results: Results) -> str:
    """Return the README's rows: each library's own figures; of times and of whole networks, ours is 1."""
    platform, plan = results["hardware"]["platform"].upper(), results["plan"]
    network, all_of_it = resnet(plan), "trace + compile"
    body: list[list[str]] = []

    def row(label: str, form: str, values: list[Any]) -> None:
        body.append([label, *("" if v is None else written(v, form) for v in values)])

    def absolute(label: str, form: str, measure: str, **labels: Any) -> None:
        row(label, form, [value(results, measure, name, **labels) for name in COLUMNS])

    def relative(label: str, measure: str, **labels: Any) -> None:
        own = value(results, measure, OURS, **labels)
        values = (value(results, measure, name, **labels) for name in COLUMNS)
        row(label, ".2f", [None if own is None or v is None else v / own for v in values])

    for offset in (0.0, 1e2, 1e4, 1e6):
        absolute(f"error of y, mean/std = {offset:g}", ".0e", "error", mean_to_std=offset)
    absolute("error of the mean, unequal masks on 8 devices", ".0e", "masked error")
    for dtype, (epilogue, said) in product(plan["dtypes"], (("none", ""), ("relu", " + ReLU"))):
        label = f"bytes kept for the backward pass, per element, {dtype}{said}"
        absolute(label, ".1f", "kept", dtype=dtype, epilogue=epilogue)
    for dtype, end in product(plan["dtypes"], ("", ", rematerialized")):
        label = f"temporary bytes per element and layer, {dtype} conv-norm-ReLU under `lax.scan`{end}"
        absolute(label, ".1f", f"temporary, scan{end}", dtype=dtype)
    for way in dict.fromkeys(r["way"] for r in results["measures"] if r["measure"] == "collectives"):
        absolute(f"collectives per training step, {way}", "d", "collectives", way=way)
    for program, dtype in product(PROGRAMS, plan["dtypes"]):
        label = f"{platform}: time of {program}, {dtype} + ReLU"
        row(label, ".2f", [_slower(results, program, dtype, name) for name in COLUMNS])
    relative(f"time to trace and compile {plan['deep']} layers", "compile time", part=all_of_it)
    for kind in ("jitted", "eager"):
        relative(f"time of the {kind} call of a tiny layer", "dispatch", call=kind)
    relative("time of ResNet-20's training step", "step time, ResNet-20")
    relative("memory of ResNet-20's training step", "peak, ResNet-20")
    relative("time to compile ResNet-20's training step", "compile time, ResNet-20", part=all_of_it)
    relative(f"temporary memory of {network}'s training step", "temporary, ResNet")
    if platform == "GPU":
        relative(f"GPU: time of {network}'s training step", "step time, ResNet")
        relative(f"GPU: peak memory of {network}'s training step", "peak, ResNet")
    return markdown(["", *COLUMNS.values()], body)


def _slower(results: Results, program: str, dtype: str, name: str) -> float | None:
    """Return the library's time over ours, the geometric mean over the sizes."""
    found = ratios(results, program, name).get((dtype, "relu"))
    return None if found is None else 1 / geometric_mean(found.values())


def write_page(path: Path, results: Results) -> None:
    """Put the README's table between the marks."""
    words = "Times, and what networks take, are relative to ours; times of one layer the geometric mean over the sizes."
    put(path, f"{readme_table(results)}\n\n{described(results)} {words}", MARKS)
