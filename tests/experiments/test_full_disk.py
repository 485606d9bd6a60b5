"""Files on a full disk or a page that cannot be written: each stays as it was, and each command says so in one line."""

import errno
import io
import os
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from writers import WRITERS, page, tree

from experiments import disk, tables
from experiments.benchmark import command as benchmark
from experiments.benchmark import report as benchmark_report
from experiments.claims._lib import command as claims
from experiments.claims._lib import config as claims_config
from experiments.claims._lib import report, study
from experiments.interrupt import Interrupt
from experiments.training import data, record, variants

pytestmark = pytest.mark.usefixtures("unmeasured")

ROOT = Path(__file__).parents[2]
CLAIMS = claims_config.load_all(ROOT / "experiments" / "claims")


@pytest.fixture
def full(monkeypatch):
    """Make the disk full as soon as it is asked for: half of what is written still fits."""
    opened = Path.open

    class Full(io.FileIO):
        def write(self, data):
            super().write(bytes(data)[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill():
        def open_full(path, mode="r", *args, **options):
            return opened(path, mode, *args, **options) if "r" in mode else Full(path, mode.replace("b", ""))

        monkeypatch.setattr(Path, "open", open_full)

    return fill


def write_report(folder):
    report.write(folder, CLAIMS, [None] * len(CLAIMS))


def write_part(folder):
    here = study.Study(data.digits(), smoke=True, folder=folder)
    here.part("part", {}, lambda: {"values": [1.0, 2.0]})


# All functions that write over a file.
FILES = {
    "text": (lambda f: disk.write(f / "file", "new"), ["file"]),
    "JSON": (lambda f: disk.write_json(f / "file", {"new": 1}), ["file"]),
    "checked": (lambda f: disk.write_checked(f / "file", {"new": 1}), ["file"]),
    "figure": (lambda f: disk.write_figure(f / "file", Figure(), 20), ["file"]),
    "lines": (lambda f: record.write(f / "file", [{"new": 1}]), ["file"]),
    "a page's table": (lambda f: tables.put(page(f, report.MARKS), "new", report.MARKS), ["PAGE.md"]),
    "the claims' report": (write_report, ["index.md"]),
    "a part": (write_part, ["parts"]),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_full_disk_leaves_every_file_as_it_was(kind, tmp_path, full):
    write, names = FILES[kind]
    for name in names:
        (tmp_path / name).write_text("old\n")
    if kind == "a page's table":
        path = page(tmp_path, report.MARKS)
        full()
        with pytest.raises(disk.DiskError, match=r"PAGE\.md cannot be written: No space left on device"):
            tables.put(path, "new", report.MARKS)
        assert "old" in path.read_text()
    else:
        full()
        before = tree(tmp_path)
        with pytest.raises(disk.DiskError, match="cannot be written: No space left on device"):
            write(tmp_path)
        if kind == "lines":  # the class above ends in an error; the short write of a real disk is tested below
            return
        assert tree(tmp_path) == before
    assert not list(tmp_path.rglob("*.partial"))


def test_a_line_that_fits_in_half_is_taken_back(tmp_path, monkeypatch):
    """An unbuffered write to a full disk is short, and no error."""
    path, opened = tmp_path / "log", Path.open
    record.write(path, [{"a": 1}])
    before = path.read_bytes()

    class Short(io.FileIO):
        def write(self, data):
            return super().write(bytes(data)[: len(data) // 2])

    monkeypatch.setattr(Path, "open", lambda p, mode="r", **o: Short(p, "a") if "a" in mode else opened(p, mode, **o))
    with pytest.raises(disk.DiskError, match="No space left"):
        record.write(path, [{"a": 2}])
    assert path.read_bytes() == before


def test_no_module_writes_in_place():
    """All go through the one place that does not."""
    direct = (".write_text(", ".write_bytes(", ".savefig(", "rmtree", "json.dump(")
    for path in (ROOT / "experiments").rglob("*.py"):
        if path.name != "disk.py" and path.parent.name != "compiled":
            assert not [word for word in direct if word in path.read_text()], path


def test_a_written_file_keeps_its_mode_and_a_link_stays_one(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "file").chmod(0o640)
    (tmp_path / "link").symlink_to(tmp_path / "file")
    disk.write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    disk.write(tmp_path / "other", "new")
    (tmp_path / "third").write_text("new")
    assert (tmp_path / "other").stat().st_mode == (tmp_path / "third").stat().st_mode


# Commands on a full disk: one line, and exit status 2.


def test_a_run_on_a_full_disk_is_one_line_and_loses_nothing(tmp_path, full, capsys):
    assert WRITERS["run"](tmp_path / "run") == 130
    (tmp_path / "run" / "metrics.jsonl").write_text("of the former run")
    before = tree(tmp_path)
    full()
    assert WRITERS["run"](tmp_path / "run", "--replace") == 2
    said = capsys.readouterr().err
    assert said.startswith("Error: ")
    assert "No space left on device" in said
    assert said.count("\n") == 1
    assert tree(tmp_path) == before


def test_claims_on_a_full_disk_are_one_line(tmp_path, full, capsys):
    full()
    assert WRITERS["claims"](tmp_path / "out") == 2
    assert "No space left on device" in capsys.readouterr().err


def test_variants_on_a_full_disk_are_one_line(tmp_path, full, monkeypatch, capsys):
    path = page(tmp_path, variants.MARKS)
    monkeypatch.setattr(variants, "PAGE", path)
    monkeypatch.setattr(variants, "RECORD", tmp_path / "record.json")
    monkeypatch.setattr(variants, "results", lambda name: {"new": [1.0]})
    monkeypatch.setattr(variants.command, "main", lambda *_: 0)
    full()
    assert variants.main([], Interrupt()) == 2
    assert "record.json cannot be written: No space left" in capsys.readouterr().err
    assert not (tmp_path / "record.json").exists()
    assert "old" in path.read_text()


def test_a_benchmark_on_a_full_disk_is_one_line(tmp_path, full, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "measure", lambda *_: {"bars": []})
    full()
    assert WRITERS["benchmark"](tmp_path) == 2
    assert "results.json cannot be written: No space left" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch, capsys):
    """Each command that puts a table into a page refuses it."""
    path = page(tmp_path, benchmark_report.MARKS)
    monkeypatch.setattr(tables.os, "access", lambda *_: False)
    monkeypatch.setattr(variants, "PAGE", path)
    monkeypatch.setattr(claims, "README", path)
    for main in (
        lambda: benchmark.main(["--quick", "--output", str(tmp_path / "out"), "--readme", str(path)]),
        lambda: variants.main([], Interrupt()),
        lambda: claims.main(["--publish", "--only", "normalizes"], Interrupt()),
    ):
        assert main() == 2
        assert "can be written" in capsys.readouterr().err
