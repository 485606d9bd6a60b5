"""Numbers in prose are those of a record that a command wrote: the pages cannot drift from what was measured."""

import json
import re
from pathlib import Path
from statistics import geometric_mean

import pytest

from experiments.benchmark import bars, report
from experiments.benchmark.bars import ratios, value
from experiments.compiled import report as compiled_report
from experiments.compiled.cases import BATCH, FLAX, OURS, Case
from experiments.training import variants

ROOT = Path(__file__).parents[2]
README, SPEED = (re.sub(r"\s+", " ", (ROOT / name).read_text()) for name in ("README.md", "docs/speed.md"))


def record(name):
    return json.loads((ROOT / "docs" / name).read_text())


def between(name, marks):
    return (ROOT / "docs" / name).read_text().split(marks[0])[1].split(marks[1])[0]


RESULTS = record("benchmark/results.json")


def test_benchmark():
    """Both tables and the verdicts follow from `results.json`."""
    for row, again in zip(RESULTS["bars"], bars.bars(RESULTS), strict=True):
        # Python 3.12 and newer sum floats more accurately.
        assert {**row, "value": pytest.approx(again["value"])} == again
    assert (ROOT / "docs" / "benchmark" / "table.md").read_text() == report.tables(RESULTS)
    shown = between("speed.md", report.MARKS)
    assert report.readme_table(RESULTS) in shown
    assert report.described(RESULTS) in shown


def test_variants():
    found = record("variants.json")
    assert between("variants.md", variants.MARKS).strip() == variants.table(found)
    assert list(found) == variants.names()
    assert all(len(accuracy) >= 5 for arms in found.values() for accuracy in arms.values())


def mean_ratio(program, peer, **only):
    """Return our time over theirs, the geometric mean over the sizes, of one dtype and epilogue or of all."""
    found = ratios(RESULTS, program, peer)
    chosen = {key: sizes for key, sizes in found.items() if not only or key == (only["dtype"], only["epilogue"])}
    return geometric_mean([ratio for sizes in chosen.values() for ratio in sizes.values()])


def spread(program, peer, dtype):
    """Return the least and the largest mean ratio over the epilogues."""
    each = [geometric_mean(v.values()) for (name, _), v in ratios(RESULTS, program, peer).items() if name == dtype]
    return f"{min(each):.2f} to {max(each):.2f}"


def measured(measure, form, **labels):
    """Return Flax's value and ours, as cells of a table."""
    both = [value(RESULTS, measure, name, **labels) for name in ("flax", "jaxbn")]
    return " | ".join(format(v, form) for v in both)


def slowdown(measure, ours="jaxbn", **labels):
    """Return our value over Flax's."""
    return f"{value(RESULTS, measure, ours, **labels) / value(RESULTS, measure, 'flax', **labels):.2f}"


STEP, FORWARD = "forward+backward", "forward"
IN_README = {
    "far mean": f"10,000 | {measured('error', '.0e', mean_to_std=1e4)} |",
    "masks": f"different sizes | {measured('masked error', '.0e')} |",
    "kept": f"float32 with ReLU | {measured('kept', '.1f', dtype='float32', epilogue='relu')} |",
    "step": f"(jaxbn = 1) | {1 / mean_ratio(STEP, 'flax', dtype='bfloat16', epilogue='relu'):.2f} | 1.00 |",
    "forward": f"takes {spread(FORWARD, 'flax', 'float32')} times as long as Flax's",
    "float32 step": f"training step takes {spread(STEP, 'flax', 'float32')} times as long",
    "tiny": f"takes {slowdown('dispatch', call='jitted')} times as long as Flax's",
    "eager": f"an eager `bn_apply` {slowdown('dispatch', call='eager')} and",
    "eager module": f"an eager module {slowdown('dispatch', 'jaxbn.linen', call='eager')} times",
    "compile": f"50 layers takes {slowdown('compile time', part='trace + compile')} times as long",
    "compile ResNet-20": f"step {slowdown('compile time, ResNet-20', part='trace + compile')} times",
    "ResNet-20's time": f"takes {slowdown('step time, ResNet-20')} of the time and",
    "ResNet-20's memory": f"and {slowdown('peak, ResNet-20')} of the memory",
}


@pytest.mark.parametrize("number", IN_README)
def test_readme(number):
    assert IN_README[number] in README


def kept(dtype):
    return measured("kept", ".1f", dtype=dtype, epilogue="relu").split(" | ")


IN_SPEED = {
    "step over Flax's": f"takes {mean_ratio(STEP, 'flax'):.2f} of Flax's time",
    "step over PyTorch's": f"and {mean_ratio(STEP, 'torch, channels_last'):.2f} of PyTorch's",
    "forward": f"slower than Flax's ({spread(FORWARD, 'flax', 'float32')} times)",
    "kept by us": f"keeps {kept('float32')[1]} bytes per element in float32 and {kept('bfloat16')[1]} in bfloat16",
    "kept by Flax": f"with Flax it keeps {kept('float32')[0]} and {kept('bfloat16')[0]}",
}


@pytest.mark.parametrize("number", IN_SPEED)
def test_summary_of_speed(number):
    assert IN_SPEED[number] in SPEED


def test_bars_missed_against_flax():
    """The page tells each of them, as it is measured."""
    told = SPEED.split("## Slower than promised")[1].split("### Why XLA")[0]
    missed = [row for row in RESULTS["bars"] if row["verdict"] == "missed" and "flax" in row["bar"]]
    assert missed
    for row in missed:
        assert f"{row['value']:.2f} of" in told, row


def test_resnet20():
    """The page on training runs tells what the record of the run says."""
    ran, page = record("examples/resnet20_mnist.json"), (ROOT / "docs" / "training_runs.md").read_text()
    plain, averaged, exported = (
        f"{100 * ran['test accuracy' + of]:.1f} %" for of in ("", ", averaged weights", ", exported")
    )
    said = f"took {ran['seconds']} seconds and ended at a test accuracy of {plain}, with the averaged weights "
    assert f"{said}{averaged}, and as the exported program {exported}." in re.sub(r"\s+", " ", page)


@pytest.fixture(scope="module")
def compiled():
    """Return the records of `make compiled` by their cases."""
    return {Case(**r["case"]): r for r in record("compiled/results.json")["records"]}


def test_compiled(compiled):
    assert compiled_report.write_summary(compiled) in between("speed.md", ("<!-- compiled -->", "<!-- /compiled -->"))
    assert compiled_report.write_sent(compiled) in between("devices.md", ("<!-- sent -->", "<!-- /sent -->"))


def test_readme_on_compiled_networks(compiled):
    (row,) = [row for row in compiled_report.write_summary(compiled).splitlines() if "ResNet-50, GiB, 8 H100" in row]
    flax, *_, ours = (cell.strip() for cell in row.strip("|").split("|")[1:])
    assert f"8 H100 (compiled, not run) | {flax} | {ours} |" in README


@pytest.mark.parametrize(("target", "said"), [("h100-8", "moves {:.2f} of"), ("v5e-4", "as many on TPU v5e")])
def test_summary_of_compiled_networks(target, said, compiled):
    case = Case("net", target, "jit", BATCH, "ReLU", "bfloat16", OURS)
    over_flax = compiled[case]["moved_bytes"] / compiled[case._replace(contender=FLAX)]["moved_bytes"]
    assert said.format(over_flax) in SPEED
    assert "{" in said or over_flax == pytest.approx(1, abs=0.005)
