"""The memory of a run: estimated from below, compared to what there is, and refused before anything is made."""

import os

import pytest
from training_runs import QUICKSTART, tiny

from experiments import memory
from experiments.interrupt import Interrupt
from experiments.training import command, data, run


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
