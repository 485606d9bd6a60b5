"""What each variant does on the digits: runs its config and puts the results into a table.

    python -m experiments.training.variants [CONFIG ...]

The table's words stand here, its numbers come from the runs: the median and quartiles over the seeds of test accuracy,
each arm at its best learning rate by validation. With names of configs only these run, and what the record has of the
others stays.
"""

import dataclasses
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro

from experiments import disk, tables
from experiments.interrupt import Interrupt, refuse
from experiments.training import command, statistics, summary

PAGE, MARKS = Path("docs/variants.md"), ("<!-- variants -->", "<!-- /variants -->")
RECORD = Path("docs/variants.json")


class Variant(NamedTuple):
    """A row of the table; `config` is in `configs/variants/`."""

    name: str
    call: str
    source: str
    config: str


VARIANTS = (
    Variant(
        "ghost batches: statistics of parts of the batch, one update by the whole",
        "`bn_apply(..., ghost_batches=16)`",
        "Hoffer et al. 2017",
        "ghost",
    ),
    Variant(
        "batch renormalization: tied to the running statistics, limits as numbers or schedules",
        "`bn_apply(..., renorm=Renorm(3.0, 5.0))`, `renorm_warmup()`",
        "Ioffe 2017",
        "renorm",
    ),
    Variant(
        "conditional: scale and bias given at the call, for each example if you like",
        "`bn_apply(BatchNormParams(scale, bias), ...)`",
        "de Vries et al. 2017",
        "domains",
    ),
    Variant(
        "several domains: statistics, scale and bias for each, chosen by a traced index",
        "`domain_init(2, n)`, `domain_apply(..., domain)`",
        "Xie et al. 2020",
        "domains",
    ),
    Variant(
        "whitening: decorrelated features, by a Newton iteration that does not diverge",
        "`whiten_init(n, group_size=20)`, `whiten_apply`; `IterNorm` in both modules",
        "Huang et al. 2019",
        "whiten",
    ),
    Variant(
        "recalibration: moments of a stream pooled exactly, whole models, layer by layer, on many devices",
        "`pool_batches`, `linen.recalibrate`, `nnx.recalibrate`",
        "Wu and Johnson 2021",
        "recalibrate",
    ),
    Variant(
        "adaptation to other data: replaced or mixed statistics",
        "`adapt(state, moments, source_weight=64)`",
        "Li et al. 2016, Schneider et al. 2020",
        "adapt",
    ),
    Variant(
        "example weighing: in evaluation each example has a say in the statistics that normalize it",
        "`apply_with_example_weight(params, state, x, 0.1)`, `BatchNorm(example_weight=0.1)`",
        "Summers and Dinneen 2020",
        "weigh",
    ),
    Variant(
        "health report: what is wrong with the layers of a model, and what to do",
        "`health`, `linen.health`, `nnx.health`",
        "here",
        "health",
    ),
    Variant(
        "folding for inference: into the layer before or after, exact or refused; whole models",
        "`fold`, `fold_into_next`, `linen.fold`, `nnx.fold`",
        "Jacob et al. 2018",
        "fold",
    ),
    Variant(
        "recurrent: an LSTM with statistics for each step, ragged sequences",
        "`lstm_init`, `lstm_apply`; `BatchNormLSTMCell` in both modules",
        "Cooijmans et al. 2017",
        "lstm",
    ),
)


@dataclasses.dataclass(frozen=True)
class Command:
    """Run the configs of the variants on the digits, and put what came out into the table of `docs/variants.md`.

    Attributes:
        configs: names of configs in `configs/variants/`, which run again, and those that the record lacks; all by
            default.
    """

    configs: tyro.conf.Positional[tuple[str, ...]] = ()


def results(config: str) -> dict[str, list[float]]:
    """Test accuracy of each seed, by what differs: the arm, or how the one arm is evaluated."""
    record = disk.read_json(Path(f"runs/{config}/summary.json"))
    arms = {summary.NAMES[arm["arm"]]: arm["test_accuracy"] for arm in record["arms"]}
    evaluations = record["arms"][0].get("evaluations", {})
    return {statistics.NAMES[name]: accuracy for name, accuracy in evaluations.items()} or arms


def told(found: dict[str, list[float]]) -> str:
    """The results of a config, in a cell."""
    parts = []
    for name, accuracy in found.items():
        q = summary.quartiles(np.array(accuracy, float))
        parts.append(f"{name} {summary.spread(q, lambda v: f'{100 * v:.1f}')}")
    return f"{', '.join(parts)}; n = {len(next(iter(found.values())))}"


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """All variants as Markdown."""
    head = ["variant", "call", "source", "test accuracy on the digits, %: median (quartiles)"]
    return tables.markdown(head, [[v.name, v.call, v.source, told(found[v.config])] for v in VARIANTS])


def main(arguments: list[str], interrupt: Interrupt) -> int:
    """Run the command line `arguments`; the exit code."""
    named = tyro.cli(Command, args=arguments, prog="python -m experiments.training.variants").configs
    known = list(dict.fromkeys(v.config for v in VARIANTS))
    try:
        if unknown := [config for config in named if config not in known]:
            raise ValueError(f"a config of the table must be one of {', '.join(known)}; got {', '.join(unknown)}.")
        tables.check_page(PAGE, MARKS)
        kept = disk.read_json(RECORD) if named else {}
    except ValueError as error:
        return refuse(error)
    found = {}
    for config in known:
        if config not in kept or config in named:
            # What a former run of this program has left in `runs/` is told apart from all else there.
            code = command.main([f"configs/variants/{config}.toml", "--replace"], interrupt)
            if code:
                return code
        found[config] = kept[config] if config in kept and config not in named else results(config)
    try:
        disk.write_json(RECORD, found)
        tables.put(PAGE, table(found), MARKS)
    except OSError as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    with Interrupt() as interrupt:
        sys.exit(main(sys.argv[1:], interrupt))
