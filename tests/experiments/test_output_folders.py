"""The output folders of all commands: locked, refused or replaced, and no other file is touched."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from writers import WRITERS, tree

from experiments import disk
from experiments.benchmark import command as benchmark

pytestmark = pytest.mark.usefixtures("unmeasured")

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "there",
    [
        {"config.json": "{}", "weights.bin": "x"},
        {"config.json": "not JSON", "figure.png": "mine"},
        {"results.json": "[]", "table.md": "mine"},
        {"claims.json": "{}", "index.md": "mine"},
        {"initialization/result.json": "mine", "parts/part.json": "mine"},
        {"thesis.txt": "years of work"},
    ],
    ids=lambda there: "+".join(there),
)
@pytest.mark.parametrize("command", [*WRITERS, "run --replace", "benchmark --replace"])
def test_what_the_program_did_not_write_stays(command, there, tmp_path, capsys):
    writer, *more = command.split()
    for name, text in there.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = tree(tmp_path)
    assert WRITERS[writer](tmp_path, *more) == 2
    assert tree(tmp_path) == before
    said = capsys.readouterr().err
    assert "must be a new or an empty folder" in said
    assert min(there).split("/")[0] in said
    assert said.count("\n") == 1


def test_a_former_run_is_replaced_if_told_and_nothing_else_in_its_folder(tmp_path, capsys):
    folder = tmp_path / "run"
    assert WRITERS["run"](folder) == 130
    (folder / "metrics.jsonl").write_text("of the former run")
    (folder / "notes.txt").write_text("mine")
    before = tree(folder)
    assert WRITERS["run"](folder) == 2
    assert tree(folder) == before
    assert "Pass `--replace`" in capsys.readouterr().err
    assert WRITERS["run"](folder, "--replace") == 130
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoints", "config.json", "notes.txt"]
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_benchmark_is_replaced_if_told(tmp_path, capsys):
    (tmp_path / "results.json").write_text(json.dumps(dict.fromkeys(benchmark.KEYS)))
    assert WRITERS["benchmark"](tmp_path) == 2
    assert "Pass `--replace`" in capsys.readouterr().err
    assert WRITERS["benchmark"](tmp_path, "--replace") == 130


def test_claims_go_on_without_being_told(tmp_path):
    for _ in range(2):
        assert WRITERS["claims"](tmp_path / "out") == 130


@pytest.mark.parametrize("writer", WRITERS)
def test_a_second_run_in_a_folder_is_refused(writer, tmp_path, capsys):
    folder = tmp_path / "out"
    with disk.hold("--out", folder):
        assert WRITERS[writer](folder) == 2
    assert "must not be in use by another run" in capsys.readouterr().err
    assert WRITERS[writer](folder) == 130


def test_a_lock_ends_with_the_process_that_has_it(tmp_path):
    """However it ends."""
    program = """import os, pathlib, sys
from experiments import disk
with disk.hold("--out", pathlib.Path(sys.argv[1])):
    os._exit(1)
"""
    assert subprocess.run([sys.executable, "-c", program, tmp_path], cwd=ROOT).returncode == 1
    with disk.hold("--out", tmp_path):
        pass


@pytest.mark.parametrize("inside", ["", "deeper"])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_in_the_place_of_a_folder_is_one_line(writer, inside, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert WRITERS[writer](tmp_path / "file" / inside) == 2
    said = capsys.readouterr().err
    assert said.startswith("Error: `--out")
    assert said.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("writer", WRITERS)
def test_a_folder_that_cannot_be_written_to_is_one_line(writer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(disk.os, "access", lambda *_: False)  # permissions do not bind whoever tests as root
    assert WRITERS[writer](tmp_path) == 2
    assert "can be written to" in capsys.readouterr().err
