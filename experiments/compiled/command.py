"""Measure from a command line to records, and report from records to tables."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments import disk, tables
from experiments.compiled import bars, report
from experiments.compiled.cases import list_cases
from experiments.compiled.measure import hash_sources, measure_missing, read_records
from experiments.compiled.targets import ENVIRONMENT, PACKAGES, find_versions
from experiments.interrupt import INTERRUPTED, refuse

RUNS, DOCS = Path("runs/compiled"), Path("docs/compiled")


@dataclasses.dataclass(frozen=True)
class Measure:
    """Compile the programs for the targets of one kind into records in `runs/compiled`, where a later run goes on.

    Attributes:
        kind: whose compiler.
        small: only what is checked with every change.
        only: only the cases that have this in their names, as the log prints them.
    """

    kind: tyro.conf.Positional[Literal["tpu", "gpu"]]
    small: bool = False
    only: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """Join the records of both kinds to `results.json` and `table.md`; print the bars; exit with 1 if one is missed.

    Attributes:
        small: only what is checked with every change; written to `runs/compiled`, and not to `docs/compiled`.
    """

    small: bool = False


Command = Annotated[Measure, tyro.conf.subcommand("measure")] | Annotated[Report, tyro.conf.subcommand("report")]


def main(arguments: list[str]) -> int:
    """Run the command line `arguments`; return the exit code."""
    command = tyro.cli(Command, args=arguments, prog="python -m experiments.compiled")
    try:
        return measure(command) if isinstance(command, Measure) else write(command)
    except (ValueError, OSError) as error:
        return refuse(error)
    except KeyboardInterrupt:
        print(f"Interrupted: what was measured is in {RUNS}; the same command goes on.", file=sys.stderr)
        return INTERRUPTED


def measure(command: Measure) -> int:
    """Measure what has no valid record yet; return the exit code.

    Raises:
        ValueError: no case has the name, a package is missing, or the folder cannot be written to.
    """
    kind, chosen = command.kind, list_cases((command.kind,), command.small, command.only)
    versions = find_versions(kind)
    disk.make_folder(str(RUNS), RUNS)
    os.environ.update(ENVIRONMENT[kind])
    from experiments.compiled.programs import measure_case  # with JAX, which reads these variables once

    failed, console = 0, Console(soft_wrap=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("programs"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn(kind), *columns, console=console) as progress:
        bar = progress.add_task(kind, total=len(chosen))
        for case, record in measure_missing(RUNS / f"{kind}.jsonl", chosen, versions, measure_case):
            failed += "error" in record
            console.print(report.describe(case, record), markup=False, highlight=False)
            progress.advance(bar)
    if failed:
        print(f"{failed} of {len(chosen)} programs failed to compile.", file=sys.stderr)
    return 0  # which of them count, the bars say


def write(command: Report) -> int:
    """Write the tables; return 0 if all bars are met, else 1.

    Raises:
        ValueError: a folder is missing or cannot be written to, or programs of the published tables were not measured.
    """
    if not RUNS.is_dir():
        raise ValueError(f"`report` needs the records of `measure`; there are none in {RUNS}.")
    folder = RUNS if command.small else DOCS
    disk.make_folder(str(folder), folder)
    wanted, hashes = list_cases(small=command.small), hash_sources()
    found: bars.Records = {}
    for kind in PACKAGES:
        found |= read_records(RUNS / f"{kind}.jsonl")
    # Those that were made from the sources as they are, failures too.
    found = {c: found[c] for c in wanted if c in found and found[c]["sources"] == hashes[c.ours]}
    missing = [case.name for case in wanted if case not in found]
    if missing and not command.small:
        raise ValueError(
            f"`report` writes {DOCS} when all {len(wanted)} programs were measured from the sources as they are; "
            f"{len(missing)} are missing, such as {missing[0]}. Run `make compiled`, which goes on where it was."
        )
    verdicts = bars.judge(found, wanted)
    results = {"bars": [v._asdict() for v in verdicts], "records": list(found.values())}
    disk.write(folder / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    disk.write(folder / "table.md", report.write_page(found, wanted, verdicts))
    if folder == DOCS:
        tables.put(Path("docs/speed.md"), report.write_summary(found), ("<!-- compiled -->", "<!-- /compiled -->"))
        tables.put(Path("docs/devices.md"), report.write_sent(found), ("<!-- sent -->", "<!-- /sent -->"))
    print(report.write_bars(verdicts))
    for case in wanted:
        if case not in found:
            print(f"Not measured from the sources as they are: {case.name}.")
        elif "error" in found[case]:
            print(report.describe(case, found[case]))
    print(f"Written to {folder}: results.json, table.md.")
    return 0 if len(found) == len(wanted) and all(v.verdict == bars.MET for v in verdicts) else 1
