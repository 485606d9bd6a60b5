"""The published report: made of the records by the rule, short, and without a number that somebody typed."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from experiments import disk
from experiments.claims._lib import command, config, intervals, judged, report
from experiments.interrupt import Interrupt

ROOT = Path(__file__).parents[2]
CLAIMS, PAGES = ROOT / "experiments" / "claims", ROOT / "docs" / "claims"
CONFIGS = config.load_all(CLAIMS)
RECORDS = judged.read(CLAIMS, CONFIGS)
NAMES = [c.name for c in CONFIGS]


def published(name):
    at = NAMES.index(name)
    return judged.judge(CONFIGS[at], RECORDS[at])


def test_all_twelve_are_published():
    assert [c.number for c in CONFIGS] == list(range(1, 13))
    for c, record in zip(CONFIGS, RECORDS, strict=True):
        assert c.command == f"python -m experiments.claims --only {c.name}"
        assert (record["data"], record["smoke"]) == ("digits", False)


def test_the_report_is_made_of_the_records(tmp_path):
    """A number that was changed by hand anywhere would differ."""
    report.write(tmp_path, CONFIGS, RECORDS)
    for path in tmp_path.glob("*.md"):
        assert path.read_text() == (PAGES / path.name).read_text(), path.name
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in PAGES.iterdir()}


def test_the_table_is_put_into_a_page(tmp_path):
    page = tmp_path / "PAGE.md"
    page.write_text(f"before\n{report.MARKS[0]}\n{report.MARKS[1]}\nafter\n")
    report.put_table(page, tmp_path / "claims", CONFIGS, RECORDS)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert all(f"](claims/{name}.md)" in text for name in NAMES)
    own = [p for p in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")) if report.MARKS[0] in p.read_text()]
    for path in own:  # wherever the repository shows it
        report.put_table(page, PAGES, CONFIGS, RECORDS)
        rows = path.read_text().split(report.MARKS[0])[1].split(report.MARKS[1])[0]
        answers = [re.sub(r"\]\([^)]*/", "](", row) for row in (rows, text)]
        assert [row.split("|")[2] for row in answers[0].strip().splitlines()] == [
            row.split("|")[2]
            for row in answers[1].split(report.MARKS[0])[1].split(report.MARKS[1])[0].strip().splitlines()
        ]


def unfolded(path):
    text = re.sub(r"<details.*?</details>", "", path.read_text(), flags=re.DOTALL)
    return re.sub(r"\]\([^)]*\)|[|#*]|---", " ", text)


def test_the_report_is_short():
    assert sum(len(unfolded(path).split()) for path in PAGES.glob("*.md")) <= 6000
    for name in NAMES:
        rows = re.findall(r"^\| ", re.sub(r"<details.*", "", (PAGES / f"{name}.md").read_text(), flags=re.DOTALL), re.M)
        assert 2 <= len(rows) <= 1 + report.SHOWN


@pytest.mark.parametrize("name", NAMES)
def test_pages_hold_no_typed_result(name):
    """Results stand in braces, where the program fills them in; other numbers are of the method and of sources."""
    text = (CLAIMS / name / "page.md").read_text()
    advice, rest = text.split("\n---\n")
    before, came_out = rest.split("### What came out")
    came_out = came_out.split("### Why")[0]
    claim = CONFIGS[NAMES.index(name)]
    known = " ".join([before, claim.claim, claim.expected, *(c.text for c in claim.criteria)])
    plain = re.sub(
        r"\{\{.*?\}\}|\{%.*?%\}|`[^`]*`|\w+-\d+|claims? \d+( and \d+)?", "", advice + came_out, flags=re.DOTALL
    )
    for number in re.findall(r"\d[\d,.]*\d|\d", plain):
        assert re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d])", known), number


@pytest.mark.parametrize("name", NAMES)
def test_pages_follow_their_verdicts(name):
    """A page renders for all verdicts, and no sentence is there both for one verdict and for its opposite."""
    j = published(name)
    pages = {
        verdict: report.chapter(
            dataclasses.replace(j, parts=[p._replace(verdict=verdict) for p in j.parts]), "alt", "c"
        )
        for verdict in ("holds", "fails", "undecided")
    }
    for text in pages.values():
        assert "{" not in re.sub(r"`[^`]*`", "", text)
        assert f"# {j.config.number}. {j.config.claim}" in text


def test_what_changed_after_results_is_said():
    """A rule that differs from that of the measuring run stands beside its old outcome; the same rule does not."""
    j = published("faster")
    by = {c.key: c for c in j.config.criteria}
    assert j.changed(by["step_cost"]) == ""
    assert j.changed(by["sigmoid_digits"]) == "added after results"
    stricter = dataclasses.replace(by["step_cost"], at_least=100.0)
    assert re.fullmatch(r"changed after results; before: decided, at least 1, holds, [\d.]+", j.changed(stricter))
    assert j.changed(dataclasses.replace(stricter, at_least=1.0)) == ""


def test_a_verdict_follows_its_criterion():
    j = published("initialization")
    first = dataclasses.replace(j.config.criteria[0], at_least=1000.0)
    changed = dataclasses.replace(j.config, criteria=(first, *j.config.criteria[1:]))
    assert (j.parts[0].verdict, judged.judge(changed, j.record).parts[0].verdict) == ("holds", "fails")


@pytest.mark.parametrize("name", NAMES)
def test_the_verdicts_of_smoke_runs_mean_nothing(name):
    """Wherever one is printed it says so, and no advice is given."""
    j = published(name)
    j = dataclasses.replace(j, record=j.record | {"smoke": True})
    text = report.chapter(j, "alt", "caption")
    assert j.said == judged.SMOKE
    assert f"**{judged.SMOKE.capitalize()}.** None" in text
    assert "numbers and verdicts mean nothing" in text
    assert "What it means for you" not in text
    assert judged.SMOKE in report.table([j], [j.config], "")


def test_a_record_is_judged_again_without_training(tmp_path, capsys):
    assert command.main(["--report", "--out", str(tmp_path)], Interrupt()) == 2
    assert "needs measured claims" in capsys.readouterr().err
    (tmp_path / "initialization").mkdir()
    for name in (judged.RESULT, judged.CHECKS):
        kept = disk.read_checked(CLAIMS / "initialization" / name, "")
        disk.write_checked(tmp_path / "initialization" / name, kept)
    assert command.main(["--report", "--out", str(tmp_path)], Interrupt()) == 0
    assert (tmp_path / "initialization.md").read_text() == (PAGES / "initialization.md").read_text()
    assert "| not measured |" in (tmp_path / "index.md").read_text()


def test_what_holds_by_construction():
    """Training does not read the running averages and updates them; evaluation reads them; weights before it matter."""
    x, weight = jax.random.normal(jax.random.key(0), (6, 4)), jnp.linspace(0.5, 2.0, 4)
    params, state = jaxbn.bn_init(4)

    def output(mean, weight, train):
        return jnp.sum(jaxbn.bn_apply(params, state._replace(mean=mean), x * weight[None], train)[0] ** 3)

    by_mean, by_weight = jax.grad(output, (0, 1))(state.mean, weight, True)
    assert np.all(np.asarray(by_mean) == 0)
    assert np.any(np.asarray(jax.grad(output)(state.mean, weight, False)) != 0)
    _, after = jaxbn.bn_apply(params, state, x, True)
    assert np.any(np.asarray(after.mean != state.mean))
    assert jaxbn.bn_apply(params, state, x, False)[1] is state
    # Its gradient passes through the statistics: of a scale, which they divide out, only epsilon's share is left.
    assert np.max(np.abs(np.asarray(by_weight))) < 1e-2


def test_numbers_in_print():
    assert judged.number(intervals.exact(13824.0, "counted")) == "13824"
    assert judged.number(intervals.median([5.0, 5.0])) == "5, n = 2"
    assert judged.number(intervals.extremes([50.0, 51.0], "%"), brief=True) == "50.5% (50 to 51)"
    assert judged.number(intervals.extremes([1e-7, 2.0, float("inf")], "pp")) == "2 pp (1.0e-07 to ∞), n = 3"
    assert judged.number(None) == "not measured yet"
