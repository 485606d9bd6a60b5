"""Records of compiled programs: made, resumed, reported or refused; nothing is compiled here."""

import json
import os
from importlib.metadata import PackageNotFoundError

import pytest
from compiled_records import made_up

from experiments.compiled import command, measure, report, targets
from experiments.compiled.cases import ALONE, Case, list_cases


@pytest.fixture
def compiler(monkeypatch):
    """Return made-up records; it knows what it was asked for, and which cases fail."""
    monkeypatch.setattr(measure, "hash_sources", lambda: {True: "now", False: "now"})

    class Compiler:
        asked: list[Case] = []  # noqa: RUF012
        failing: frozenset[Case] = frozenset()

        def __call__(self, case):
            self.asked.append(case)
            if case in self.failing:
                raise TypeError("not today\nnor tomorrow")
            return {k: v for k, v in made_up(case).items() if k not in ("case", "sources", "versions", "seconds")}

    Compiler.asked = []
    return Compiler()


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, compiler):
    path, wanted, versions = tmp_path / "gpu.jsonl", list_cases(("gpu",), small=True), {"jax": "0.12.0.1"}

    def run(versions=versions):
        compiler.asked.clear()
        list(measure.measure_missing(path, wanted, versions, compiler))
        return list(compiler.asked)

    begun = measure.measure_missing(path, wanted, versions, compiler)
    assert [next(begun)[0] for _ in range(3)] == wanted[:3]
    begun.close()
    path.write_bytes(path.read_bytes()[:-9])  # the last line is cut off
    assert run() == wanted[2:]
    assert run() == []
    compiler.failing = frozenset(wanted[:1])
    assert run({"jax": "0.13"}) == wanted  # another compiler
    assert "error" in measure.read_records(path)[wanted[0]]
    compiler.failing = frozenset()
    assert run({"jax": "0.13"}) == wanted[:1]  # a failure is tried again
    monkeypatch.setattr(measure, "hash_sources", lambda: {True: "changed", False: "now"})
    assert run({"jax": "0.13"}) == [case for case in wanted if case.ours]  # only jaxbn is another
    assert set(measure.read_records(path)) == set(wanted)


def test_report(tmp_path, monkeypatch, compiler, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "hash_sources", measure.hash_sources)
    folder = tmp_path / "runs" / "compiled"
    folder.mkdir(parents=True)
    for kind in ("tpu", "gpu"):
        path = folder / f"{kind}.jsonl"
        list(measure.measure_missing(path, list_cases((kind,), small=True), {"jax": "0.12.0.1"}, compiler))
    assert command.main(["report", "--small"]) == 0
    table, results = (folder / "table.md").read_text(), json.loads((folder / "results.json").read_text())
    assert len(results["records"]) == len(list_cases(small=True))
    row = next(line for line in table.splitlines() if line.startswith("| TPU v5p | 4,096 | jit |"))
    assert "10.00 (" in row
    assert row.endswith("| flax: 10.00 |")
    assert "computed and not measured" in table
    assert sorted(p.name for p in folder.iterdir()) == ["gpu.jsonl", "results.json", "table.md", "tpu.jsonl"]
    assert command.main(["report"]) == 2  # what is published is not replaced by less
    assert "programs were measured" in capsys.readouterr().err
    assert not list((tmp_path / "docs" / "compiled").iterdir())
    (folder / "tpu.jsonl").unlink()
    assert command.main(["report", "--small"]) == 1
    assert "| not measured |" in capsys.readouterr().out


def test_failures_are_in_the_tables():
    wanted = [case for case in list_cases(small=True) if case.program == ALONE]
    found = {case: made_up(case) for case in wanted}
    found[wanted[0]] = {**made_up(wanted[0]), "error": "ValueError: no"}
    assert "| failed: ValueError: no |" in report.write_moved(found, wanted)


# What is refused


def install(monkeypatch, packages):
    """Make `packages` all that is installed."""

    def version(name):
        if name not in packages:
            raise PackageNotFoundError(name)
        return packages[name]

    monkeypatch.setattr(targets, "version", version)


def refused(capsys, *arguments):
    """Return the one line on stderr."""
    assert command.main([str(a) for a in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_refusals(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    installed = dict.fromkeys(targets.PACKAGES["tpu"], "0.12.0.1")
    install(monkeypatch, installed)
    assert "there are none in runs/compiled" in refused(capsys, "report")
    (tmp_path / "runs").touch()
    assert "cannot be made" in refused(capsys, "measure", "tpu")
    (tmp_path / "runs").unlink()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "compiled").touch()
    assert "is a file" in refused(capsys, "measure", "tpu")
    (tmp_path / "runs" / "compiled").unlink()
    (tmp_path / "docs").touch()
    (tmp_path / "runs" / "compiled").mkdir()
    assert "cannot be made" in refused(capsys, "report")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "can be written to" in refused(capsys, "measure", "tpu")
    assert "got 'v5e-5'" in refused(capsys, "measure", "tpu", "--only", "v5e-5")
    del installed["libtpu"]
    assert "libtpu, not installed here" in refused(capsys, "measure", "tpu")


def test_what_is_installed_must_fit(monkeypatch):
    installed = dict.fromkeys(targets.PACKAGES["gpu"], "0.12.0.1")
    install(monkeypatch, installed)
    assert targets.find_versions("gpu") == installed
    installed["jax-cuda13-plugin"] = "0.12.1"
    with pytest.raises(ValueError, match=r"one release; JAX is 0\.12\.0\.1, beside jax-cuda13-plugin 0\.12\.1"):
        targets.find_versions("gpu")
    installed["jax"] = "0.10.2"
    with pytest.raises(ValueError, match=r"JAX 0\.12 and newer.*JAX 0\.10\.2"):
        targets.find_versions("gpu")
