"""Run the configs of the variants on the digits, and tabulate what came out.

    python -m experiments.training.variants [CONFIG ...]

A row is a config's question and source, and the median and quartiles over the seeds of test accuracy, each arm at its
best learning rate by validation. With names of configs only these run, and those that the record lacks.
"""

import dataclasses
import sys
from pathlib import Path

import tyro

from experiments import disk, tables
from experiments.interrupt import Interrupt, refuse
from experiments.training import command, config, statistics, summary

CONFIGS, RECORD = Path(__file__).parents[2] / "configs" / "variants", Path("docs/variants.json")
PAGE, MARKS = Path("docs/variants.md"), ("<!-- variants -->", "<!-- /variants -->")


@dataclasses.dataclass(frozen=True)
class Command:
    """Run the configs of the variants on the digits, and put what came out into the table of `docs/variants.md`.

    Attributes:
        configs: names of configs in `configs/variants/`, which run again, and those that the record lacks; all by
            default.
    """

    configs: tyro.conf.Positional[tuple[str, ...]] = ()


def names() -> list[str]:
    """List the configs of the table."""
    return sorted(path.stem for path in CONFIGS.glob("*.toml"))


def results(name: str) -> dict[str, list[float]]:
    """Read the test accuracies of each seed, by what differs: the arm, or how the one arm is evaluated."""
    record = disk.read_json(Path(f"runs/{name}/summary.json"))
    arms = {summary.NAMES[arm["arm"]]: arm["test_accuracy"] for arm in record["arms"]}
    evaluations = record["arms"][0].get("evaluations", {})
    return {statistics.NAMES[name]: accuracy for name, accuracy in evaluations.items()} or arms


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """Return the results of all configs as Markdown."""
    body = []
    for name, accuracies in found.items():
        claim, shown = config.load(CONFIGS / f"{name}.toml").claim, summary.percent
        cells = [f"{arm} {shown(accuracy)}" for arm, accuracy in accuracies.items()]
        body.append([claim.question, claim.source, f"{', '.join(cells)}; n = {len(next(iter(accuracies.values())))}"])
    return tables.markdown(["question", "source", "test accuracy on the digits, %: median (quartiles)"], body)


def main(arguments: list[str], interrupt: Interrupt) -> int:
    """Run the command line `arguments`; return the exit code."""
    named = tyro.cli(Command, args=arguments, prog="python -m experiments.training.variants").configs
    known = names()
    try:
        if unknown := [name for name in named if name not in known]:
            raise ValueError(f"a config of the table must be one of {', '.join(known)}; got {', '.join(unknown)}.")
        tables.check_page(PAGE, MARKS)
        kept = disk.read_json(RECORD) if named else {}
        found = {}
        for name in known:
            if name in kept and name not in named:
                found[name] = kept[name]
                continue
            # `--replace` replaces what a former run of this program has left in `runs/`, and nothing else there.
            if code := command.main([str(CONFIGS / f"{name}.toml"), "--replace"], interrupt):
                return code
            found[name] = results(name)
        disk.write_json(RECORD, found)
        tables.put(PAGE, table(found), MARKS)
    except (OSError, ValueError) as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    with Interrupt() as interrupt:
        sys.exit(main(sys.argv[1:], interrupt))
