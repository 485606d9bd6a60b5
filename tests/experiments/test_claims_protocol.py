"""The protocol of a comparison, with trainings that only pretend: grids, budgets, and the checks of an answer."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from experiments import disk
from experiments.claims._lib import checks, command, config, intervals, judged, search, study
from experiments.interrupt import Interrupt
from experiments.training import data

pytestmark = pytest.mark.usefixtures("ordinary_promotion")

CLAIMS = Path(__file__).parents[2] / "experiments" / "claims"
CONFIGS = config.load_all(CLAIMS)


class Fake(study.Study):
    """A study whose trainings score as `score(arm, rate, steps)` says."""

    def __init__(self, score, vary=""):
        super().__init__(data.digits(), smoke=False, folder=Path("unused"), vary=vary)
        self.score, self.trained = score, []

    def part(self, name, asked, measure):
        s, arm = asked["settings"], asked["arm"]
        self.trained.append((s.steps, s.learning_rates))
        full, half = (
            np.array([[self.score(arm, r, steps) + 0.001 * seed for r in s.learning_rates] for seed in range(2)])
            for steps in (s.steps, s.steps // 2)
        )
        return {"validation": full, "test": full, "validation_half": half, "test_half": half}


def untrained(s, arm):
    """Stands for a network that is never trained."""
    raise AssertionError(arm)


def peak(best, top=0.9):
    return lambda rate: top - 0.1 * abs(math.log10(rate / best))


def test_a_grid_is_widened_until_both_arms_are_inside():
    """It grows from 0.1 and 0.3 down past the best of one arm and up past that of the other, by the root of ten."""
    s = dataclasses.replace(study.BASE, learning_rates=(0.1, 0.3))
    scores = {"none": peak(0.003), "batch": peak(3.0)}
    here = Fake(lambda arm, rate, steps: scores[arm](rate))
    found = search.widened(here, "part", s, ("none", "batch"), untrained)
    assert found["grid"][0] < 0.003 < 3.0 < found["grid"][-1]
    for arm, best in (("none", 0.003), ("batch", 3.0)):
        at, _ = search.at_best(found[arm])
        assert 0 < at < len(found["grid"]) - 1
        assert abs(math.log10(found["grid"][at] / best)) < 0.3
        assert intervals.at_edge(found["grid"], **{arm: found["grid"][at]}) == ""
    assert np.all(np.diff(found["grid"]) > 0)


def test_a_grid_ends_at_its_limits():
    s = dataclasses.replace(study.BASE, learning_rates=(0.1, 0.3))
    found = search.widened(Fake(lambda arm, rate, steps: 0.9 - rate), "part", s, ("none",), untrained)
    assert search.LOWEST <= found["grid"][0] < search.LOWEST * search.FACTOR


@pytest.mark.parametrize(
    ("by_steps", "moved"),
    [({500: 0.1, 1000: 0.8, 2000: 0.8}, [70, 0]), ({500: 0.1, 1000: 0.5, 2000: 0.8, 4000: 0.9}, [40, 30, 10])],
)
def test_a_budget_is_doubled_until_the_plain_arm_rests(by_steps, moved):
    """It ends when the second half moves the arm by less than its interval; at most twice."""
    s = dataclasses.replace(study.BASE, learning_rates=(0.01, 0.1, 1.0))
    here = Fake(lambda arm, rate, steps: peak(0.1, by_steps[steps])(rate))
    found = search.search(here, "part", s, ("none", "batch"), untrained)
    assert found["steps"] == max(by_steps)
    np.testing.assert_allclose(found["moved"], moved, atol=1e-9)


def test_a_budget_is_doubled_while_the_plain_arm_learns_nothing():
    """Twice as many steps add nothing at chance, and that is no reason to stop."""
    s = dataclasses.replace(study.BASE, learning_rates=(0.01, 0.1, 1.0), steps=1000)
    found = search.search(Fake(lambda arm, rate, steps: 0.1), "part", s, ("none", "batch"), untrained)
    assert (found["steps"], found["moved"]) == (4000, [0, 0, 0])


@pytest.mark.parametrize("how", [search.search, search.checked])
def test_a_check_of_the_grid_goes_beyond_the_grid_that_was_found(how):
    """It asks for all that the measurement does, and then for three times lower and larger rates."""
    s = dataclasses.replace(study.BASE, learning_rates=(0.3, 1.0), steps=1000)
    plain, wider = (Fake(lambda arm, rate, steps: peak(0.1)(rate), vary) for vary in ("", "grid"))
    first, second = (how(here, "part", s, ("none",), untrained) for here in (plain, wider))
    asked = list(dict.fromkeys(wider.trained))  # those that are asked for again are not trained again
    assert asked[:-1] == plain.trained
    low, high = first["grid"][0], first["grid"][-1]
    assert asked[-1][1] == (low / study.WIDER, high * study.WIDER)
    assert second["grid"] == sorted([*first["grid"], *asked[-1][1]])
    assert second["steps"] == first["steps"]


@pytest.mark.parametrize(("how", "published"), [(search.search, 2000), (search.checked, 1000)])
def test_a_check_of_the_steps_doubles_the_published_budget(how, published):
    """It doubles a budget that was doubled before, too, at rates near the best of the published ones."""
    s = dataclasses.replace(study.BASE, learning_rates=(0.001, 0.01, 0.1, 1.0, 10.0), steps=1000)
    scores = {500: 0.1, 1000: 0.8, 2000: 0.8, 4000: 0.8}
    plain, longer = (Fake(lambda arm, rate, steps: peak(0.1, scores[steps])(rate), vary) for vary in ("", "steps"))
    assert how(plain, "part", s, ("none",), untrained)["steps"] == published
    here = Fake(lambda arm, rate, steps: peak(0.1, scores[steps])(rate), "machine")
    assert how(here, "part", s, ("none",), untrained)["steps"] == published
    assert how(longer, "part", s, ("none",), untrained)["steps"] == 2 * published
    assert longer.trained[-1] == (2 * published, (0.01, 0.1, 1.0))


@pytest.mark.parametrize(
    ("vary", "rates", "steps"),
    [
        ("grid", (0.1, 0.3, 1.0, 3.0), 8),
        ("steps", (0.3, 1.0), 16),
        ("split", (0.3, 1.0), 8),
        ("machine", (0.3, 1.0), 8),
    ],
)
def test_a_check_of_what_is_not_searched(vary, rates, steps):
    here = Fake(None, vary)
    s = here.varied(here.settings(study.BASE, learning_rates=(0.3, 1.0), steps=8, log_every=4))
    assert s.learning_rates == pytest.approx(rates)
    assert s.steps == steps


def test_a_check_runs(tmp_path, capsys):
    """Small; what it finds is compared, and means nothing."""
    given = ["--only", "normalizes", "--smoke", "--check", "grid", "--out", str(tmp_path)]
    assert command.main(given, Interrupt()) == 0
    assert judged.SMOKE in capsys.readouterr().out
    assert (tmp_path / "check-grid" / "normalizes" / "result.json").is_file()
    assert command.main(["--only", "normalizes", "--out", str(tmp_path)], Interrupt()) == 2
    assert "must hold a run of the same kind" in capsys.readouterr().err


def changed():
    """Return the record of claim 1, and it with correlations a hundredth as large: its first case then holds."""
    record = judged.read(CLAIMS, CONFIGS)[0]
    other = record | {"measured": json.loads(json.dumps(record["measured"]))}
    other["measured"]["batch"]["all"] = (0.01 * np.array(other["measured"]["batch"]["all"])).tolist()
    return record, other


def test_a_check_compares_answers(capsys):
    """A record agrees with itself; a case that is answered otherwise is named and counted."""
    record, other = changed()
    assert checks.compare(CONFIGS[0], "grid", record, record) == 0
    assert "before" not in capsys.readouterr().out
    assert checks.compare(CONFIGS[0], "grid", other, record) == 1
    assert f"{CONFIGS[0].criteria[0].scope}: fails before, holds in the check" in capsys.readouterr().out


def test_a_case_that_a_check_changes_is_undecided(tmp_path):
    """The outcome of a check is kept beside those of others; a case that came out otherwise is not called decided."""
    record, other = changed()
    claim, scope = CONFIGS[0], CONFIGS[0].criteria[0].scope
    checks.keep(tmp_path, "grid", claim, record, record)
    checks.keep(tmp_path, "split", claim, other, record)
    kept = disk.read_checked(tmp_path / "checks.json", "")
    found = judged.judge(claim, record | {"checks": kept})
    assert found.parts[0].verdict == "undecided"
    assert f"undecided, as a check changes it, for {scope}." in found.answer
    assert any("fails here and holds with other splits" in row[-1] for row in found.rows())
    again = checks.alone(claim, other).estimates[claim.criteria[0].key]
    assert found.apart(claim.criteria[0].key) == [f"{judged.number(again, brief=True)} with other splits"]
    stale = judged.judge(claim, record | {"checks": kept, "program": "another"})
    assert stale.parts[0].verdict == "fails"  # they were of another record
    stricter = dataclasses.replace(
        claim, criteria=(dataclasses.replace(claim.criteria[0], at_most=0.02), *claim.criteria[1:])
    )
    assert judged.judge(stricter, record | {"checks": kept}).parts[0].verdict == "fails"  # by another criterion
    row = checks.stood([found]).splitlines()[2]
    decided = sum(bool(c.scope) for c in claim.criteria)
    assert [cell.strip() for cell in row.split("|")[2:5]] == [
        f"{decided} of {decided}",
        "not measured",
        f"{decided - 1} of {decided}",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "otherwise"), [("initialization", "grid"), ("normalizes", "split")])
def test_an_answer_stands_when_it_is_measured_otherwise(name, otherwise, tmp_path, capsys):
    """Claims 6 and 1, the quickest, whole: with rates three times lower and larger, and on other splits."""
    out = ["--out", str(tmp_path / "checked")]
    assert command.main(["--only", name, "--check", otherwise, *out], Interrupt()) == 0
    assert "All decided cases stand." in capsys.readouterr().out
