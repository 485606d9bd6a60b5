"""What went wrong with the experiments' files, memory and words: each kind, at every place where it could occur."""

import contextlib
import dataclasses
import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import chex
import pytest
from matplotlib.figure import Figure
from training_runs import QUICKSTART, ROUNDING, TINY, same, tiny, trajectory

from experiments import disk, memory, tables
from experiments.benchmark import command as benchmark
from experiments.benchmark import report as benchmark_report
from experiments.claims._lib import command as claims
from experiments.claims._lib import config as claims_config
from experiments.claims._lib import report, study
from experiments.interrupt import Interrupt
from experiments.training import command, config, data, record, run, variants

ROOT = Path(__file__).parents[2]
CLAIMS = claims_config.load_all(ROOT / "experiments" / "claims")


def tree(folder):
    """All that is in a folder."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def stopped():
    """Return an interrupt that ends a run before its first step."""
    interrupt = Interrupt()
    interrupt.requested = True
    return interrupt


# Every command that writes to a folder, made to end before it computes anything.
WRITERS = {
    "run": lambda out, *more: command.main([str(QUICKSTART), *TINY, "--out", str(out), *more], stopped()),
    "claims": lambda out, *more: claims.main(
        ["--only", "initialization", "--smoke", "--out", str(out), *more], stopped()
    ),
    "benchmark": lambda out, *more: benchmark.main(["--quick", "--output", str(out), *more]),
}


@pytest.fixture
def unmeasured(monkeypatch):
    """Interrupt the benchmark at once."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "measure", interrupted)


pytestmark = pytest.mark.usefixtures("unmeasured")


# Folders


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


# Files


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


def page(folder, marks):
    path = folder / "PAGE.md"
    path.write_text(f"before\n{marks[0]}\nold\n{marks[1]}\nafter\n")
    return path


def write_report(folder):
    report.write(folder, CLAIMS, [None] * len(CLAIMS))


def write_part(folder):
    here = study.Study(data.digits(), smoke=True, folder=folder)
    here.part("part", {}, lambda: {"values": [1.0, 2.0]})


# Whatever writes a file that was there before.
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
    """By each command that puts a table into one."""
    path = page(tmp_path, benchmark_report.MARKS)
    monkeypatch.setattr(tables.os, "access", lambda *_: False)
    monkeypatch.setattr(variants, "PAGE", path)
    monkeypatch.setattr(claims, "README", path)
    for main in (
        lambda: benchmark.main(["--quick", "--output", str(tmp_path / "out"), "--readme", str(path)]),
        lambda: variants.main([], Interrupt()),
        lambda: claims.main(["--publish"], Interrupt()),
    ):
        assert main() == 2
        assert "can be written" in capsys.readouterr().err


# Records

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


# Words


@pytest.mark.parametrize(
    "main",
    [lambda a: variants.main(a, Interrupt()), benchmark.main],
    ids=["variants", "benchmark"],
)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_is_help(main, option, capsys):
    with pytest.raises(SystemExit) as end:
        main([option])
    assert end.value.code == 0
    assert "usage: python -m experiments." in capsys.readouterr().out


def test_an_expectation_is_that_of_the_configs_own_run():
    given = config.load(QUICKSTART)
    assert "at most half the steps" in run.expectation(given)
    changed = config.changed(given, dataclasses.replace(given.settings, steps=50, widths=(4,)))
    said = run.expectation(changed)
    assert "at most half" not in said
    assert said.endswith("widths, steps.")
    assert config.changed(given, given.settings) == given


# Memory


@pytest.mark.parametrize(
    "more",
    [
        ["--widths", "3000000", "3000000"],
        pytest.param(["--widths", "3000000", "--model", "lstm"], marks=pytest.mark.slow),
        pytest.param(["--widths", "3000000", "3000000", "--model", "cnn"], marks=pytest.mark.slow),
        ["--seeds", "1000000000"],
        ["--steps", "100000000", "--log-every", "100000000"],
    ],
    ids=lambda more: " ".join(more[:1] + more[2:]),
)
def test_memory_that_cannot_be_had_is_refused_before_anything(more, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run.Run, "execute", lambda *_: pytest.fail("it ran"))
    out = tmp_path / "run"
    assert command.main([str(QUICKSTART), "--out", str(out), *more], Interrupt()) == 2
    said = capsys.readouterr().err
    assert "must fit into memory" in said
    assert "GB at least" in said
    assert not out.exists()


def test_what_is_needed_is_less_than_what_training_takes():
    """So that nothing is refused that could run: the weights of a small network, counted by hand."""
    s = tiny(widths=(8,), devices=2, seeds=3, learning_rates=(0.1,), optimizer="adam")
    kernels = 4 * (64 * 8 + 8 * 10 + 10 + 2 * 8)
    adam = 2 * kernels + 4
    chunk = 4 * s.seeds * s.log_every * s.batch_size * (64 + 1)
    assert memory.needed(s, "batch", data.digits()) == chunk + s.devices * s.seeds * (2 * kernels + adam)


@pytest.mark.parametrize(("limit", "least"), [("max", None), ("1000", 1000)])
def test_the_least_of_what_limits_memory_counts(limit, least, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "LIMIT", tmp_path / "limit")
    (tmp_path / "limit").write_text(limit + "\n")
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 3 kB\n")
    assert memory.available() == (least or 3 * 1024)
    (tmp_path / "meminfo").unlink()
    (tmp_path / "limit").unlink()
    assert memory.available() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# Ghost batches


@pytest.mark.parametrize(
    ("parts", "statistics"),
    [
        (16, "global"),
        pytest.param(2, "global", marks=pytest.mark.slow),
        pytest.param(16, "per_device", marks=pytest.mark.slow),
    ],
)
def test_ghost_batches_train_alike_in_both_ways(parts, statistics):
    """A number of them is of the whole batch: more than there are devices, or fewer."""
    given = {"norm": "ghost", "ghost_batches": parts, "devices": 4, "statistics": statistics, "learning_rates": (0.1,)}
    by_jit, by_shard_map = (trajectory(way=way, arms=("ghost",), **given) for way in ("jit", "shard_map"))
    chex.assert_trees_all_close(by_shard_map, by_jit, **ROUNDING)
    one = trajectory(way="jit", arms=("ghost",), **given | {"devices": 1, "statistics": "global"})
    # With statistics for each device evaluation is by what is pooled of them, and validation may differ.
    alike = slice(0, 2) if statistics == "global" else slice(1, 2)
    chex.assert_trees_all_close(by_jit[alike], one[alike], **ROUNDING)
    plain = trajectory(way="jit", **given | {"norm": "batch", "statistics": "global", "devices": 1})
    assert not same(plain[1], one[1], rtol=0, atol=1e-4)  # so that the tolerance above tells parts from the whole


def test_ghost_batches_of_a_config_are_valid_in_both_ways_or_in_none():
    ghost = config.load(ROOT / "configs" / "variants" / "ghost.toml").settings
    for parts in (1, 2, 4, 8, 16, 12):
        found = []
        for way in ("jit", "shard_map"):
            values = dataclasses.asdict(ghost) | {"ghost_batches": parts, "way": way, "devices": 8, "batch_size": 576}
            with contextlib.suppress(ValueError):
                config.settings(values, "here")
                found.append(way)
        assert found == ([] if parts == 12 else ["jit", "shard_map"])
