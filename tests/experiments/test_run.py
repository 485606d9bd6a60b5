"""A run from the command line: what it leaves in its folder, what it says, and how it is stopped."""

import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time

import jax
import pytest
from training_runs import QUICKSTART, ROOT, TINY

from experiments.benchmark import command as benchmark
from experiments.interrupt import Interrupt
from experiments.training import command, config, record, run, train, variants


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of a whole run through the command line, at a small learning rate and at one that diverges."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    arguments = [
        str(QUICKSTART),
        *TINY,
        "--learning-rates",
        "0.1",
        "1e30",
        "--activation",
        "relu",
        "--out",
        str(folder),
    ]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert command.main(arguments, Interrupt()) == 0
    (folder.parent / "printed").write_text(printed.getvalue())
    return folder


def test_a_run_leaves_a_complete_log_in_which_divergence_is_null(finished):
    """One line for each arm, seed, learning rate and chunk."""
    rows = record.read(finished / "metrics.jsonl")
    keys = {(r["arm"], r["seed"], r["learning_rate"], r["step"]) for r in rows}
    assert len(rows) == len(keys) == 16
    assert keys == {(a, s, lr, t) for a in ("batch", "none") for s in (0, 1) for lr in (0.1, 1e30) for t in (5, 10)}
    for row in rows:
        measured = [row[m] for m in train.Metrics._fields]
        assert None not in measured or row["learning_rate"] == 1e30
    assert any(r["val_loss"] is None for r in rows)
    assert "NaN" not in (finished / "metrics.jsonl").read_text()


def test_a_run_leaves_a_figure_a_summary_and_what_it_ran_on(finished):
    """All there, nothing half written, and the test accuracy is that of the rate chosen by validation."""
    assert {p.name for p in finished.iterdir()} == {*record.FILES, "checkpoints"}
    picture = (finished / "figure.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert 20_000 < len(picture) < 500_000
    ran = json.loads((finished / "config.json").read_text())
    assert ran["settings"]["steps"] == 10
    assert ran["versions"]["jax"] == jax.__version__
    assert ran["hardware"]["platform"] == "cpu"
    assert len(ran["git"].split()[0]) == 40
    speed = record.read(finished / "performance.jsonl")
    assert [(r["arm"], r["step"]) for r in speed] == [("batch", 5), ("batch", 10), ("none", 5), ("none", 10)]
    for r in speed:
        assert r["examples_per_second"] == pytest.approx(64 * r["steps_per_second"])
        assert r["steps_per_second"] == pytest.approx(5 / r["seconds"])
        assert 1e8 < r["memory_bytes"] < 1e11
    results = json.loads((finished / "summary.json").read_text())
    assert results["complete"]
    assert [a["arm"] for a in results["arms"]] == ["batch", "none"]
    for arm in results["arms"]:
        assert arm["learning_rate"] == 0.1
        assert len(arm["test_accuracy"]) == len(arm["steps_to_target"]) == 2
        assert all(round(360 * v, 3).is_integer() for v in arm["test_accuracy"])
        assert arm["steps_to_target"] == [None, None]
    printed = (finished.parent / "printed").read_text()
    assert all(name in printed for name in ("batch norm", "no norm", ">10 (>10 to >10)", f"Written to {finished}"[:30]))


def test_a_folder_is_replaced_only_by_a_valid_run(finished):
    """A refused command line leaves all as it was."""
    before = {p.name: p.stat().st_mtime_ns for p in finished.iterdir()}
    assert command.main([str(QUICKSTART), "--steps", "-1", "--out", str(finished), "--replace"], Interrupt()) == 2
    assert {p.name: p.stat().st_mtime_ns for p in finished.iterdir()} == before


def test_a_run_that_is_stopped_before_its_first_chunk_leaves_what_it_has(tmp_path):
    """The config; and no crash for want of data. A former run is gone: the folder is of this one."""
    folder, interrupt = tmp_path / "run", Interrupt()
    interrupt.requested = True
    for more in ([], ["--replace"]):
        assert command.main([str(QUICKSTART), *TINY, "--out", str(folder), *more], interrupt) == 130
        assert sorted(p.name for p in folder.iterdir()) == ["checkpoints", "config.json"]
        (folder / "metrics.jsonl").write_text("of the former run")


@pytest.mark.slow
def test_ctrl_c_ends_a_run_cleanly_with_what_it_has(tmp_path):
    """Exit code 130, no traceback, and whole files for the steps that were done."""
    folder = tmp_path / "run"
    arguments = [str(QUICKSTART), *TINY, "--steps", "1000000", "--learning-rates", "0.1", "--out", str(folder)]
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not (folder / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert "Interrupted" in output
    rows = record.read(folder / "metrics.jsonl")
    assert {r["arm"] for r in rows} == {"batch"}
    assert len(rows) == 2 * max(r["step"] for r in rows) / 5
    results = json.loads((folder / "summary.json").read_text())
    assert not results["complete"]
    assert results["arms"][0]["steps"] == max(r["step"] for r in rows)
    assert (folder / "figure.png").read_bytes()[:4] == b"\x89PNG"


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
