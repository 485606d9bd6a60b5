"""The command line of the claims: measure what is not measured yet, judge, draw, report."""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from experiments import disk
from experiments.claims._lib import checks, judged, report, study
from experiments.claims._lib.config import ClaimConfig, load_all
from experiments.claims._lib.measuring import measure
from experiments.interrupt import INTERRUPTED, Interrupt, refuse
from experiments.tables import check_page
from experiments.training import data, record

CLAIMS, PAGES = study.ROOT / "experiments" / "claims", study.ROOT / "docs" / "claims"
README = study.ROOT / "README.md"
PROGRAM, RECORD = "python -m experiments.claims", "claims.json"


@dataclasses.dataclass(frozen=True)
class Command:
    """Test the claims about batch normalization, and report. An interrupted run goes on where it stopped.

    Attributes:
        only: names of the folders in `experiments/claims/`; all by default.
        smoke: everything as small as it can be, to see that it runs; its verdicts mean nothing.
        mnist: the folder of MNIST's four files, instead of scikit-learn's digits.
        cifar: the folder of CIFAR-10's batches, binary or for Python.
        out: the folder to write to, new, empty or of a former run, which goes on; `runs/claims...` by default.
        publish: keep the records, or the outcome of the check, in `experiments/claims/`, and write the report to
            `pages` and to `table`.
        check: measure again with a `grid` wider by a factor of 3 at both ends, twice the `steps` or other `split`s, or
            on another `machine` as it was, and compare the answers with the kept ones.
        report: measure nothing; judge the kept records, and make figures and pages, again.
        pages: the folder of the published report.
        table: the page that gets the table of answers; the README by default, if it has the marks for it.
    """

    only: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    smoke: bool = False
    mnist: Path | None = None
    cifar: Path | None = None
    out: Path | None = None
    publish: bool = False
    check: Literal["grid", "steps", "split", "machine"] | None = None
    report: bool = False
    pages: Path = PAGES
    table: Path | None = None


def main(arguments: list[str], interrupt: Interrupt) -> int:
    """Run the command line `arguments`; return the exit code."""
    command = tyro.cli(Command, args=arguments, prog=PROGRAM)
    try:
        configs = load_all(CLAIMS)
        wanted = select(configs, command.only)
        if command.publish and (command.smoke or command.mnist or command.cifar):
            raise ValueError("`--publish` is for a full run on the digits; it excludes --smoke, --mnist and --cifar.")
        if command.check and (command.mnist or command.cifar or command.report):
            raise ValueError("`--check` is of the answers on the digits; it excludes --mnist, --cifar and --report.")
        table = command.table or (README if report.MARKS[0] in README.read_text(encoding="utf-8") else None)
        if command.publish and table:
            check_page(table, report.MARKS)
        name, images, split = source(command)
        if name == "digits" and not (command.report or command.smoke):
            check_packages(wanted)
    except (ValueError, TypeError, OSError) as error:
        return refuse(error)
    out = command.out or Path("runs") / ("claims" + f"-{name}" * (name != "digits") + "-smoke" * command.smoke)
    pages = command.pages if command.publish else out
    kept = out / f"check-{command.check}" if command.check else CLAIMS if command.publish else out
    differ = 0
    try:
        with contextlib.ExitStack() as held:
            if command.publish:
                held.enter_context(disk.hold("--pages", pages))
            if not command.report:
                held.enter_context(disk.hold("--out", out))
                disk.check_contents("--out", out, RECORD, {"program", "data", "smoke", "versions"})
                given = {"program": PROGRAM, "data": name, "smoke": command.smoke, "versions": record.versions()}
                if (out / RECORD).is_file():
                    check_same(out, disk.read_json(out / RECORD), given)
                disk.write_json(out / RECORD, given)
                vary = command.check or ""
                conditions = study.Study(images, command.smoke, out / "parts", split=split, vary=vary)
                if not measure(wanted, conditions, name, kept, CLAIMS, interrupt):
                    print(f"Interrupted: {out} holds all finished parts; the same command goes on from there.")
                    return INTERRUPTED
            elif not any((kept / c.name / judged.RESULT).is_file() for c in wanted):
                raise disk.DiskError(f"`--report` needs measured claims; there are none in {kept}.")
            elif not command.publish:
                held.enter_context(disk.hold("--out", out))
            records = judged.read(kept, configs)
            if command.check:
                differ = compare(command, wanted, configs, records)
                records = judged.read(CLAIMS, configs)
            if command.publish or not command.check:
                report.write(pages, configs, records)
            if command.publish and table:
                report.put_table(table, pages, configs, records)
    except OSError as error:
        return refuse(error)
    if command.check:
        return int(differ > 0)
    for config, found in zip(configs, records, strict=True):
        if found and config in wanted:
            print(f"{config.number}. {config.name}: {judged.judge(config, found).said}")
    print(f"Written to {pages}: index.md, and a page and a figure for each claim.")
    return 0


def compare(
    command: Command, wanted: list[ClaimConfig], configs: list[ClaimConfig], again: list[dict[str, Any] | None]
) -> int:
    """Print what the check found beside the published answers, and keep it; return how many cases differ."""
    differ, kind = 0, command.check or ""
    for config, new, old in zip(configs, again, judged.read(CLAIMS, configs), strict=True):
        if new and old and config in wanted:
            differ += checks.compare(config, kind, new, old)
            if command.publish:
                checks.keep(CLAIMS / config.name, kind, config, new, old)
    if command.smoke:
        print(judged.SMOKE)
        return 0
    print(f"{differ} decided cases are answered otherwise." if differ else "All decided cases stand.")
    return differ


def check_same(out: Path, former: dict[str, Any], given: dict[str, Any]) -> None:
    """Check that the run in `out`, which is to go on, was of the same data and size."""
    for key in ("data", "smoke"):
        if former[key] != given[key]:
            raise disk.DiskError(
                f"`--out` must hold a run of the same kind; {out} has {key} = {former[key]}, and this run "
                f"{given[key]}. Take another folder."
            )


def check_packages(wanted: list[ClaimConfig]) -> None:
    """Check that the packages are installed whose data the claims read."""
    for config in wanted:
        for package in config.needs:
            if importlib.util.find_spec(package) is None:
                raise ValueError(
                    f"Claim {config.number}, {config.name}, needs data of the package {package}, which is not here. "
                    f"Run `pip install --no-deps {package}`, or leave the claim out with `--only`."
                )


def select(configs: list[ClaimConfig], names: tuple[str, ...]) -> list[ClaimConfig]:
    """Return the claims of those names, all if there are none."""
    known = [c.name for c in configs]
    for name in names:
        if name not in known:
            raise ValueError(f"`--only` must name claims; got {name!r}. They are {', '.join(known)}.")
    return [c for c in configs if not names or c.name in names]


def source(command: Command) -> tuple[str, data.Data, Callable[[int], data.Data] | None]:
    """Return the name of the data, the data, and the maker of their other splits."""
    if command.mnist and command.cifar:
        raise ValueError("`--mnist` and `--cifar` exclude each other; run the command twice.")
    if command.mnist:
        return "mnist", data.mnist(command.mnist), None
    if command.cifar:
        return "cifar", data.cifar10(command.cifar), None
    return "digits", data.digits(study.first_split(command.check or "")), data.digits
