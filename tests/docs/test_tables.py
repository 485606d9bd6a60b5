"""Numbers in prose are those of a record that a command wrote: the pages cannot drift from what was measured."""

import json
from pathlib import Path

import pytest

from experiments.benchmark import bars, report, tried
from experiments.training import variants

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def record(name):
    return json.loads((ROOT / "docs" / name).read_text())


def between(page, marks):
    return page.split(marks[0])[1].split(marks[1])[0]


def test_benchmark():
    """The README's table, the long one, and the verdicts follow from `results.json`."""
    results = record("benchmark/results.json")
    for row, again in zip(results["bars"], bars.bars(results), strict=True):
        # Python 3.12 and newer sum floats more accurately.
        assert {**row, "value": pytest.approx(again["value"])} == again
    assert (ROOT / "docs" / "benchmark" / "table.md").read_text() == report.tables(results)
    shown = between(README, report.MARKS)
    assert report.readme_table(results) in shown
    assert report.described(results) in shown


def test_what_was_tried():
    found = record("benchmark/tried.json")["rows"]
    assert between((ROOT / "docs" / "speed.md").read_text(), report.MARKS).strip() == tried.table(found)


def test_variants():
    found = record("variants.json")
    assert between(README, variants.MARKS).strip() == variants.table(found)
    assert set(found) == {v.config for v in variants.VARIANTS}
    assert all(len(accuracy) >= 5 for arms in found.values() for accuracy in arms.values())
