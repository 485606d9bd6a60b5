"""The command line of the claims: measure what is not measured yet, judge, draw, report."""

import contextlib
import dataclasses
import importlib
import time
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments import disk
from experiments.claims import report, study, verdict
from experiments.claims.config import ClaimConfig, load_all
from experiments.interrupt import INTERRUPTED, Interrupt, refuse
from experiments.tables import check_page
from experiments.training import data, record

CONFIGS = study.ROOT / "configs" / "claims"
PUBLISHED, README = study.ROOT / "experiments", study.ROOT / "README.md"
PROGRAM, RECORD = "python -m experiments.claims", "claims.json"
SMOKE_MINUTES = 0.2  # of a claim, for the bar


@dataclasses.dataclass(frozen=True)
class Command:
    """Test the claims about batch normalization, and report. An interrupted run goes on where it stopped.

    Attributes:
        only: names of configs in `configs/claims/`; all by default.
        smoke: everything as small as it can be, to see that it runs.
        mnist: the folder of MNIST's four files, in the place of scikit-learn's digits.
        cifar: the folder of CIFAR-10's batches, binary or for Python.
        out: the folder to write to, new, empty or of a former run, which goes on; `runs/claims...` by default.
        publish: write the report that is kept in the repository, and the README's table, too.
        report: measure nothing; judge the kept numbers again, and make figures and pages anew.
    """

    only: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    smoke: bool = False
    mnist: Path | None = None
    cifar: Path | None = None
    out: Path | None = None
    publish: bool = False
    report: bool = False


def main(arguments: list[str], interrupt: Interrupt) -> int:
    """Run the command line `arguments`; the exit code."""
    command = tyro.cli(Command, args=arguments, prog=PROGRAM)
    try:
        configs = load_all(CONFIGS)
        wanted = selected(configs, command.only)
        if command.publish and (command.smoke or command.mnist or command.cifar):
            raise ValueError("`--publish` is for a full run on the digits; it excludes --smoke, --mnist and --cifar.")
        if command.publish:
            check_page(README, report.MARKS)
        name, images = source(command)
    except (ValueError, TypeError, OSError) as error:
        return refuse(error)
    kind = "-smoke" if command.smoke else ""
    out = command.out or Path("runs") / f"claims{'' if name == 'digits' else f'-{name}'}{kind}"
    conditions = study.Study(images, command.smoke, out / "parts")
    try:
        with contextlib.ExitStack() as held:
            if command.publish:
                held.enter_context(disk.hold("--publish", PUBLISHED))
            if command.report:
                folder = PUBLISHED if command.publish else out
                if not (folder / "results").is_dir():
                    raise disk.DiskError(f"`--report` needs measured claims; there are none in {folder}.")
                if not command.publish:
                    held.enter_context(disk.hold("--out", out))
                return again(configs, wanted, folder, command.publish)
            held.enter_context(disk.hold("--out", out))
            disk.check_contents("--out", out, RECORD, {"program", "data", "smoke", "versions"})
            given = {"program": PROGRAM, "data": name, "smoke": command.smoke, "versions": record.versions()}
            disk.write_json(out / RECORD, given)
            return run(configs, wanted, conditions, name, out, command.publish, interrupt)
    except OSError as error:
        return refuse(error)


def selected(configs: list[ClaimConfig], names: tuple[str, ...]) -> list[ClaimConfig]:
    """The claims of those names, all if there are none."""
    known = [c.name for c in configs]
    for name in names:
        if name not in known:
            raise ValueError(f"`--only` must name claims; got {name!r}. They are {', '.join(known)}.")
    return [c for c in configs if not names or c.name in names]


def source(command: Command) -> tuple[str, data.Data]:
    """The name of the data, and the data."""
    if command.mnist and command.cifar:
        raise ValueError("`--mnist` and `--cifar` exclude each other; run the command twice.")
    if command.mnist:
        return "mnist", data.mnist(command.mnist)
    if command.cifar:
        return "cifar", data.cifar10(command.cifar)
    return "digits", data.digits()


def run(
    configs: list[ClaimConfig],
    wanted: list[ClaimConfig],
    conditions: study.Study,
    name: str,
    out: Path,
    publish: bool,
    interrupt: Interrupt,
) -> int:
    """Measure and judge the claims `wanted`, write each as it is done, and then the report; the exit code."""
    console, folders = Console(), [out, *([PUBLISHED] if publish else [])]
    for folder in folders:
        (folder / "results").mkdir(parents=True, exist_ok=True)
    minutes = [SMOKE_MINUTES if conditions.smoke else c.minutes for c in wanted]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, speed_estimate_period=3600) as progress:
        bar = progress.add_task("starting", total=sum(minutes))
        for at, (config, expected) in enumerate(zip(wanted, minutes, strict=True)):
            progress.update(bar, completed=sum(minutes[:at]), description=f"{at + 1}/{len(wanted)} {config.name}")
            began = time.perf_counter()

            def tick(at: int = at, began: float = began, expected: float = expected) -> None:
                if interrupt.requested:
                    raise study.StoppedError
                # Never quite done before it is.
                share = 1 - 1 / (1 + (time.perf_counter() - began) / 60 / expected * 3)
                progress.update(bar, completed=sum(minutes[:at]) + expected * share)

            source = study.source_hash(config.name)
            here = dataclasses.replace(conditions, source=source, tick=tick, seconds={}, asked={})
            try:
                measured = module("measured", config).measure(here, config.settings)
            except study.StoppedError:
                console.print(f"Interrupted: {out} holds what is done; the same command goes on from there.")
                return INTERRUPTED
            made = judged(config, measured) | known(config, measured, here, name)
            for folder in folders:
                keep(config, made, folder)
            console.print(f"{config.number}. {config.name}: {report.said(made)}")
        progress.update(bar, completed=sum(minutes))
    for folder in folders:
        report.write(folder, configs)
    if publish:
        report.readme(README, PUBLISHED, configs)
    console.print(f"Written to {', '.join(str(f) for f in folders)}: RESULTS.md, RESULTS.html, results/.")
    return 0


def again(configs: list[ClaimConfig], wanted: list[ClaimConfig], folder: Path, publish: bool) -> int:
    """Judge what is in `folder` by the configs as they are now, and make its figures and pages anew; the exit code."""
    old = report.read(folder / "results", wanted)
    if not any(old):
        return refuse(ValueError(f"`--report` needs measured claims; {folder / 'results'} has none of these."))
    for config, made in zip(wanted, old, strict=True):
        if made:
            keep(config, made | judged(config, study.numbers(made["measured"])), folder)
    report.write(folder, configs)
    if publish:
        report.readme(README, folder, configs)
    return 0


def keep(config: ClaimConfig, made: dict[str, Any], folder: Path) -> None:
    """Write the record `made` and its figure."""
    at = folder / "results" / config.name
    caption = draw(config, study.numbers(made["measured"]), at.with_suffix(".png"))
    disk.write_checked(at.with_suffix(".json"), made | {"caption": caption})


def module(kind: str, config: ClaimConfig) -> Any:
    """Of `measured` or `judged`, that of a claim."""
    return importlib.import_module(f"experiments.claims.{kind}.{config.name}")


def judged(config: ClaimConfig, measured: dict[str, Any]) -> dict[str, Any]:
    """Of the record of a claim what follows from the config and the numbers: words, estimates, verdicts, tables."""
    judge = module("judged", config)
    estimates = judge.estimates(measured)
    missing = {c.key for c in config.criteria} ^ set(estimates)
    if missing:
        raise RuntimeError(f"{config.name}: criteria and estimates must have the same keys; not in both: {missing}.")
    verdicts: list[verdict.Verdict | None] = [verdict.judged(c, estimates[c.key]) for c in config.criteria]
    criteria = [
        dataclasses.asdict(c) | {"estimate": estimates[c.key]._asdict(), "verdict": v}
        for c, v in zip(config.criteria, verdicts, strict=True)
    ]
    words = dataclasses.asdict(config)
    return study.plain(
        {key: words[key] for key in ("number", "name", "claim", "question", "source", "command", "expected", "cost")}
        | {"verdict": verdict.overall(config.criteria, verdicts, contested=config.contested), "criteria": criteria}
        | {"tables": judge.tables(measured) if hasattr(judge, "tables") else ""}
    )


def known(config: ClaimConfig, measured: dict[str, Any], here: study.Study, name: str) -> dict[str, Any]:
    """The rest of the record: what each part was asked, on what it ran, by which program, and the numbers."""
    return study.plain(
        {
            "data": name,
            "smoke": here.smoke,
            "seconds": sum(here.seconds.values()),
            "versions": record.versions(),
            "hardware": record.hardware(),
            "program": here.source,
            "settings": dataclasses.asdict(config.settings),
            "asked": study.differing(here.asked, config.settings),
            "measured": measured,
        }
    )


def draw(config: ClaimConfig, measured: dict[str, Any], path: Path) -> str:
    """The figure at `path`; its caption."""
    mpl.use("Agg")
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    caption = module("judged", config).draw(measured, figure)
    disk.write_figure(path, figure, dpi=110)
    return caption
