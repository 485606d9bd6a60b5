"""A whole run of the benchmark, tiny, and its command line."""

import copy
import json
import os
import runpy
import sys
from pathlib import Path

import jax
import pytest

from experiments import tables
from experiments.benchmark import (
    bars,
    collectives,
    command,
    memory,
    one_layer,
    report,
    sizes,
    training,
)
from experiments.benchmark.layers import PROGRAMS, present
from experiments.benchmark.sizes import OURS

# Other libraries are measured as they are used: with JAX's own rules of promotion.
pytestmark = pytest.mark.usefixtures("ordinary_promotion")


# A whole run


TINY = sizes.FULL._replace(
    name="tiny",
    contenders=tuple(present((OURS, "flax", "torch, channels_last"))),
    dense=(),
    images=((2, 2, 4),),
    batch=2,
    dtypes=("float32",),
    epilogues=("relu",),
    rounds=2,
    deep=1,
    compilations=1,
    scanned=8,
    stages=(),
    steps=1,
)


@pytest.fixture(scope="module")
def results():
    """Run everything, tiny; what other programs find is made up."""
    small = ((one_layer, "ROWS", 64), (memory, "KEPT", (8, 4)), (memory, "SCANNED", (2, 4, 4, 8)))
    found = [
        {"measure": "collectives", "contender": name, "way": way, "value": 2}
        for way in collectives.WAYS
        for name in collectives.MODULES
    ]
    asked, cleared = [], []

    def child(module, *arguments):
        asked.append((module, *arguments))
        return found if module.endswith("collectives") else None

    with (
        pytest.MonkeyPatch.context() as patch,
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        patch.setattr(command, "child", child)
        patch.setattr(jax, "clear_caches", lambda: cleared.append(1))  # not really: the other tests' too
        patch.setattr(training, "ON_CPU", training.ON_CPU._replace(batch=2, size=8))
        for module, name, value in small:
            patch.setattr(module, name, value)
        said = []
        results = command.measure(TINY, said.append)
    assert [a[0].rsplit(".")[-1] for a in asked] == ["collectives", "training", "training"]
    # Deep with both layers, ResNet-20 with three, each once more than is measured.
    assert len(cleared) == 2 * 2 + 3 * 2
    assert len(said) == len(results["times"]) + len(results["measures"]) - len(found) - 2
    return results


@pytest.mark.slow
def test_every_case_program_and_contender_has_a_time(results):
    rows = results["times"]
    assert len(rows) == len(PROGRAMS) * len(TINY.contenders)
    for row in rows:
        assert row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
        assert row["ours_to_theirs"]["median"] == 1 if row["contender"] == OURS else row["ours_to_theirs"]["median"] > 0
        # float32, of values of size 1: far from 1e-3 if it is batch normalization at all.
        assert row["errors"]["y"] < 1e-4
        assert ("dx" in row["errors"]) == (row["program"] == "forward+backward")
        assert row["errors"].get("dx", 0) < 1e-4


@pytest.mark.slow
def test_every_measure_is_taken(results):
    """Ours and flax's are measured by the same instruments; their memory differs even when tiny."""
    found = {
        m: [bars.value(results, m, n) for n in (OURS, "flax")] for m in {r["measure"] for r in results["measures"]}
    }
    assert set(found) == {
        *("step time, ResNet-20", "peak, ResNet-20", "compile time, ResNet-20"),
        *("error", "masked error", "kept", "temporary, layer", "temporary, scan", "temporary, ResNet"),
        *("temporary, scan, rematerialized", "arrays moved"),
        *("collectives", "dispatch", "compile time", "step time, ResNet", "peak, ResNet"),
    }
    assert all(v is not None and v >= 0 for m, pair in found.items() for v in pair if m != "peak, ResNet")
    for measure in ("kept", "temporary, scan"):
        own, flax = found[measure]
        assert 4 < own < flax


@pytest.mark.slow
def test_a_run_writes_what_it_found(results, tmp_path):
    """JSON that holds all of it, the tables, and figures with something on them."""
    command.write(tmp_path, results)
    read = json.loads((tmp_path / "results.json").read_text())
    assert read == json.loads(json.dumps(results))
    assert {"jax", "flax", "python"} <= set(read["versions"])
    assert {"platform", "device", "cores", "load_before", "allocator"} <= set(read["hardware"])
    table = (tmp_path / "table.md").read_text()
    assert all(row["bar"] in table for row in results["bars"])
    for name in ("times", "memory", "errors"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(tmp_path)) == ["errors.png", "memory.png", "results.json", "table.md", "times.png"]


@pytest.mark.slow
def test_what_is_absent_is_named(results):
    changed = copy.deepcopy(results)
    changed["absent"] = ["haiku", "torch"]
    assert "Not installed, and so not measured: haiku, torch." in report.described(changed)


@pytest.mark.slow
def test_the_readme_gets_its_rows(results, tmp_path):
    """They go between the marks and nowhere else; the second time they replace the first."""
    page = tmp_path / "PAGE.md"
    page.write_text(f"before\n{report.MARKS[0]}\nold\n{report.MARKS[1]}\nafter\n")
    for _ in range(2):
        tables.check_page(page, report.MARKS)
        report.write_page(page, results)
    before, between, after = page.read_text().replace(report.MARKS[1], report.MARKS[0]).split(report.MARKS[0])
    assert (before, after) == ("before\n", "\nafter\n")
    assert "old" not in between
    rows = [line for line in between.splitlines() if line.startswith("|")]
    assert 20 < len(rows) < 30
    assert {row.count("|") for row in rows} == {len(report.COLUMNS) + 2}
    assert not any(row.startswith("| GPU") for row in rows)  # this was measured on a CPU
    assert results["command"] in between


# The command line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "there is none at"),
        ("no marks", "must hold the marks"),
        (report.MARKS[1] + report.MARKS[0], "in this order"),
        (report.MARKS[0] * 2 + report.MARKS[1], "once"),
    ],
)
def test_a_page_without_the_marks_is_refused_before_the_work(tmp_path, monkeypatch, capsys, text, words):
    monkeypatch.setattr(command, "measure", lambda *_: pytest.fail("measured"))
    page = tmp_path / "PAGE.md"
    if text is not None:
        page.write_text(text)
    assert command.main(["--quick", "--output", str(tmp_path / "out"), "--readme", str(page)]) == 2
    assert words in capsys.readouterr().err


def test_ctrl_c_writes_nothing(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "measure", interrupted)
    assert command.main(["--output", str(tmp_path)]) == command.INTERRUPTED
    assert "nothing was written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "plan", "folder"), [([], sizes.FULL, "docs"), (["--quick"], sizes.QUICK, "runs")]
)
@pytest.mark.slow
def test_the_command_line_chooses_the_plan_and_the_folder(tmp_path, monkeypatch, results, arguments, plan, folder):
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "measure", lambda plan, say: asked.append(plan) or results)
    monkeypatch.setattr(command.figures, "draw", lambda *_: None)
    assert command.main(arguments) == 0
    assert asked == [plan]
    assert (Path(folder) / "benchmark" / "results.json").is_file()


@pytest.mark.parametrize("module", ["experiments.benchmark", "experiments.claims"])
def test_a_process_starts_again_with_an_allocator_that_keeps_its_pages(monkeypatch, module):
    """Once: with the settings in place it goes on."""

    class NewProcessError(Exception):
        pass

    def execve(program, arguments, environment):
        raise NewProcessError(program, arguments, environment)

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", module, "--fast"])
    monkeypatch.setattr(sys, "argv", [module, "--fast"])
    with pytest.raises(NewProcessError) as started:
        runpy.run_module(module, run_name="__main__")
    program, arguments, environment = started.value.args
    assert (program, arguments) == (sys.executable, [sys.executable, "-m", module, "--fast"])
    settings = {name: value for name, value in environment.items() if name.startswith("MALLOC_")}
    assert set(settings) >= {"MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:  # of the unknown option, so beyond that point
        runpy.run_module(module, run_name="__main__")
    assert stopped.value.code == 2


def test_other_programs_print_json(tmp_path, monkeypatch):
    """The JSON that a module prints is read."""
    (tmp_path / "echo.py").write_text("import json, sys; print(json.dumps({'arguments': sys.argv[1:]}))")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert command.child("echo", "a", "b") == {"arguments": ["a", "b"]}
