"""Damaged records are named: a part of a measurement, a claim's result, the variants' table."""

from pathlib import Path

import pytest
from writers import page, tree

from experiments import disk
from experiments.claims._lib import command as claims
from experiments.claims._lib import study
from experiments.interrupt import Interrupt
from experiments.training import data, variants

ROOT = Path(__file__).parents[2]

DAMAGE = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "no JSON": lambda text: "\x00" + text,
    "a list": lambda text: "[1]",
    "a number": lambda text: "1",
    "no object inside": lambda text: "{}",
    "a number halved": lambda text: text.replace("0.5", "0.25"),
    "not UTF-8": lambda text: text.encode() + b"\xff",
}


def damage(path, kind):
    made = DAMAGE[kind](path.read_text())
    path.write_bytes(made if isinstance(made, bytes) else made.encode())


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_part_is_named(kind, tmp_path):
    here = study.Study(data.digits(), smoke=True, folder=tmp_path)
    measure = lambda: {"accuracy": [0.5, 0.75]}  # noqa: E731
    here.part("part", {}, measure)
    (path,) = tmp_path.iterdir()
    damage(path, kind)
    with pytest.raises(disk.DiskError, match=f"{path.name} must .* Delete it, and it is measured again."):
        here.part("part", {}, measure)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_record_fails_the_report_in_one_line(kind, tmp_path, capsys):
    name = "initialization"
    path = tmp_path / name / "result.json"
    path.parent.mkdir()
    made = disk.read_checked(ROOT / "experiments" / "claims" / name / path.name, "")
    disk.write_checked(path, made | {"seconds": 0.5})
    damage(path, kind)
    before = tree(tmp_path)
    assert claims.main(["--report", "--out", str(tmp_path)], Interrupt()) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"Error: {path} must ")
    assert said.count("\n") == 1
    assert tree(tmp_path) == before


def test_a_damaged_record_of_the_variants_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(variants, "PAGE", page(tmp_path, variants.MARKS))
    monkeypatch.setattr(variants, "RECORD", tmp_path / "record.json")
    for text in (None, "{"):
        if text:
            (tmp_path / "record.json").write_text(text)
        assert variants.main(["adapt"], Interrupt()) == 2
        assert "record.json must" in capsys.readouterr().err
