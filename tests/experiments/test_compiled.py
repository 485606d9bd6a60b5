"""What is read off compiled programs, what it is held to, and what happens to records; nothing is compiled here."""

import json
import os
from importlib.metadata import PackageNotFoundError

import pytest

from experiments.compiled import bars, cases, command, counting, measure, report, targets
from experiments.compiled.cases import ALONE, FLAX, NET, NONE, OURS, Case, list_cases

X = 4 * 8 * 128 * 2  # bytes of bf16[4,8,128]
PROGRAM = """
HloModule jit_step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%fused_slices (p.0: bf16[4,8,128], p.1: f32[128]) -> bf16[4,2,128] {
  %p.0 = bf16[4,8,128]{2,1,0} parameter(0)
  %p.1 = f32[128]{0} parameter(1)
  %view = bf16[4,8,128]{2,1,0} bitcast(%p.0)
  %first = bf16[4,1,128]{2,1,0} slice(%view), slice={[0:4], [0:1], [0:128]}
  %last = bf16[4,1,128]{2,1,0} slice(%view), slice={[0:4], [7:8], [0:128]}
  ROOT %both = bf16[4,2,128]{2,1,0} concatenate(%first, %last), dimensions={1}
}

%fused_all (q: bf16[4,8,128]) -> bf16[4,8,128] {
  %q = bf16[4,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %part = bf16[4,1,128]{2,1,0} slice(%q), slice={[0:4], [0:1], [0:128]}
  ROOT %whole = bf16[4,8,128]{2,1,0} add(%q, %q)
}

ENTRY %main (x: bf16[4,8,128], v: f32[128]) -> (bf16[4,8,128], f32[128]) {
  %x = bf16[4,8,128]{2,1,0} parameter(0), metadata={op_name="x"}
  %v = f32[128]{0} parameter(1)
  %slices = bf16[4,2,128]{2,1,0} fusion(%x, %v), kind=kLoop, calls=%fused_slices
  %y = bf16[4,8,128]{2,1,0:T(8,128)(2,1)} fusion(%x), kind=kLoop, calls=%fused_all, metadata={op_name="f(%x)"}
  %started = ((f32[128]{0}), f32[128]{0}) all-reduce-start(%v), replica_groups={{0,1}}, to_apply=%sum
  %done = f32[128]{0} all-reduce-done(%started)
  %pair = (f32[128]{0}, f32[2]{0}, /*index=2*/pred[3]{0}) all-reduce(%v, %v, %v), to_apply=%sum
  %moved = bf16[4,8,128]{2,1,0} collective-permute(%y), source_target_pairs={{0,1},{1,0}}
  ROOT %out = (bf16[4,8,128]{2,1,0}, f32[128]{0}) tuple(%moved, %done)
}
"""


# What is read off a program


def test_bytes_moved():
    slices = (X // 4 + 512) + X // 4  # two eighths of x and all of v; its result
    reduces = (512 + 512) + (3 * 512 + 512 + 8 + 3)
    assert counting.count_moved(PROGRAM) == slices + 2 * X + reduces + 2 * X


def test_bytes_of_types():
    assert counting.count_bytes(
        "(bf16[2,3]{1,0:T(8,128)(2,1)}, f32[], /*index=2*/pred[7]{0}, s64[0], f8e4m3fn[5])"
    ) == (12 + 4 + 7 + 0 + 5)


def test_collectives_are_counted_once_if_they_are_asynchronous():
    found = counting.count_collectives(PROGRAM)
    assert found == {"all-reduce": (2, 512 + 523, 523), "collective-permute": (1, X, X)}


def test_calls_are_followed_and_branches_refused():
    called = PROGRAM.replace("%moved = ", "%called = f32[] call(), to_apply=%run\n  %moved = ")
    called = called.replace("ENTRY", "%run () -> f32[] {\n  ROOT %c = f32[9]{0} iota(), iota_dimension=0\n}\n\nENTRY")
    assert counting.count_moved(called) == counting.count_moved(PROGRAM) + 36
    branched = PROGRAM.replace(
        "%moved = ", "%branch = f32[] conditional(%v), branch_computations={%sum, %sum}\n  %moved = "
    )
    assert counting.has_loop(branched)
    assert not counting.has_loop(PROGRAM)
    with pytest.raises(ValueError, match="conditional"):
        counting.count_moved(branched)


# What is measured


def test_cases_are_distinct_and_whole():
    every, small = list_cases(), list_cases(small=True)
    assert len(set(every)) == len(every)
    assert set(small) <= set(every)
    assert {c.target for c in every} == set(targets.TARGETS)
    assert {c.kind for c in list_cases(("gpu",))} == {"gpu"}
    named = list_cases(only="net, v5p-4096, jit, ReLU, float32")
    assert [c.contender for c in named] == [NONE, OURS, FLAX, cases.STABLE]
    compared = {c._replace(contender=FLAX) for c in every if c.ours}
    compared |= {c._replace(contender=NONE) for c in every if c.program == NET}
    assert compared <= set(every)


# What it is held to


def made_up(case: Case, **changes):
    """Return a record that meets every bar."""
    record = {
        "case": case._asdict(),
        "sources": "now",
        "versions": {"jax": "0.12.0.1"},
        "array_bytes": float(X),
        "moved_bytes": (7 if case.ours else 10) * X,
        "moved_bytes_rare": None,
        "temporary_bytes": X,
        "collectives": {} if case.contender == NONE else {"all-reduce": {"number": 2, "bytes": 2560, "largest": 1536}},
        "seconds": 1.0,
    }
    return record | changes


def test_bars_are_met():
    wanted = list_cases()
    verdicts = bars.judge({case: made_up(case) for case in wanted}, wanted)
    assert len(verdicts) == len(bars.BARS)
    assert {v.verdict for v in verdicts} == {bars.MET}


COLLECTIVES = {
    "all-reduces a layer": {"all-reduce": {"number": 13, "bytes": 0, "largest": 0}},
    "collectives of other kinds": {"all-gather": {"number": 1, "bytes": 4, "largest": 4}},
    "bytes sent a layer": {"all-reduce": {"number": 2, "bytes": 2**20, "largest": 2**19}},
}


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("net, TPU: moved", {"moved_bytes": 10.2 * X}),
        ("temporaries", {"temporary_bytes": 1.6 * X}),
        *((what, {"collectives": sent}) for what, sent in COLLECTIVES.items()),
    ],
)
def test_one_bad_program_misses_its_bar(what, changes):
    wanted = list_cases()
    bad = Case(NET, "v5e-256", cases.JIT, cases.BATCH, "ReLU", "bfloat16", OURS)
    found = {case: made_up(case, **(changes if case == bad else {})) for case in wanted}
    missed = [v for v in bars.judge(found, wanted) if v.verdict == bars.MISSED]
    assert [v.what.startswith(what) for v in missed] == [True]
    assert missed[0].where == f"{bad.title}, {OURS}"


def test_a_permute_of_x_misses_the_bar_on_corner_cases():
    wanted = list_cases()
    bad = Case(ALONE, "h100-64", cases.JIT, cases.ROWS, "ReLU", "bfloat16", OURS)
    sent = {"collective-permute": {"number": 1, "bytes": X, "largest": X}}
    found = {case: made_up(case, **({"collectives": sent} if case == bad else {})) for case in wanted}
    missed = [v.what for v in bars.judge(found, wanted) if v.verdict == bars.MISSED]
    assert [what.startswith("corner cases") for what in missed] == [True]


@pytest.mark.parametrize("contender", [OURS, FLAX])
def test_what_was_not_measured_is_not_met(contender):
    wanted = list_cases(small=True)
    gone = Case(ALONE, "v5p-4096", cases.JIT, cases.BATCH, "ReLU", "bfloat16", contender)
    verdicts = bars.judge({case: made_up(case) for case in wanted if case != gone}, wanted)
    unknown = {v.what: v.where for v in verdicts if v.verdict == bars.UNKNOWN}
    assert unknown["alone, TPU: moved, over flax"] == f"{gone.title}, {OURS}"


# What happens to records


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
