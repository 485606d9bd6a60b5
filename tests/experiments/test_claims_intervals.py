"""Intervals cover the truth as often as they say, and verdicts and answers follow from them by the rule."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from experiments.claims._lib import intervals, verdict
from experiments.claims._lib.intervals import Estimate
from experiments.claims._lib.verdict import Criterion

SEEDS, SAMPLES = 8, 1000
DRAWN = {"normal": stats.norm(), "uniform": stats.uniform(), "logistic": stats.logistic()}


@pytest.mark.parametrize("law", DRAWN)
@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_coverage_at_eight_seeds(statistic, law):
    """The coverage is 93 to 97%: of 1,000 samples the standard error is 0.7 of a percentage point."""
    values = DRAWN[law].rvs((SAMPLES, SEEDS), random_state=np.random.default_rng(0))
    found = [getattr(intervals, statistic)(v) for v in values]
    covered = np.mean([e.low <= DRAWN[law].median() <= e.high for e in found])
    assert 0.93 <= covered <= 0.97


@pytest.mark.parametrize(
    ("offsets", "own"),
    [((0.0, 0.5, -0.5), 0.1), ((0.0, 0.5, 0.45), 0.3), ((0.0, 0.0, 0.0), 1.0)],
    ids=["one clearly", "two nearly", "none"],
)
def test_coverage_with_a_choice_of_rate(offsets, own, monkeypatch):
    """Cover a difference at the best of three rates, where a seed is good at all rates or bad, or each has noise."""
    monkeypatch.setattr(intervals, "RESAMPLES", 600)
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(SAMPLES // 2):
        shapes = ((1.0, (SEEDS, 1)), (own, (SEEDS, 3)))
        values = [offsets + sum(size * rng.standard_normal(shape) for size, shape in shapes) for _ in range(2)]
        scores = [v + 0.3 * rng.standard_normal(v.shape) for v in values]
        e = intervals.tuned(scores, values, lambda a, b: a - b)
        covered.append(e.low <= 0 <= e.high)
    assert 0.93 <= np.mean(covered) <= 0.97


def test_a_ratio_at_chosen_rates():
    """The geometric mean at the fastest rate of each arm; the median where one of them never gets there."""
    steps = np.array([[400.0, 200.0], [200.0, 100.0], [math.inf, 100.0]])
    ours = steps / 2
    e = intervals.tuned([-steps, -ours], [steps, ours], np.divide, log=True)
    assert (e.value, e.n) == (pytest.approx(2.0), 3)
    assert e.low == pytest.approx(2.0)
    never = np.full((3, 2), math.inf)
    assert intervals.tuned([-never, -ours], [never, ours], np.divide, log=True).value == math.inf


def test_coverage_over_splits():
    """Five splits of eight seeds that share their split's offset: the interval is that over the splits."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((SAMPLES, 5, 1)) + 0.3 * rng.standard_normal((SAMPLES, 5, SEEDS))
    found = [intervals.mean(v) for v in values]
    assert 0.93 <= np.mean([e.low <= 0 <= e.high for e in found]) <= 0.97
    assert found[0].n == 5 * SEEDS


def test_intervals_are_those_of_scipy_and_of_the_tables():
    values = np.array([3.0, 1.0, 4.0, 1.5, 9.0, 2.6, 5.0, 3.5])
    e, expected = intervals.mean(values), stats.ttest_1samp(values, 1.0)
    np.testing.assert_allclose([e.low, e.high], expected.confidence_interval(0.95))
    assert e.p(1.0) == pytest.approx(expected.pvalue)
    # Hettmansperger and Sheather: for n = 8 between the extremes and the next, 0.064 from the latter.
    m, v = intervals.median(values), np.sort(values)
    np.testing.assert_allclose([m.low, m.high], [0.064 * v[0] + 0.936 * v[1], 0.064 * v[7] + 0.936 * v[6]], atol=2e-3)
    assert m.p(0.0) == pytest.approx(2 / 256)
    assert intervals.geometric([1.0, 4.0]).value == pytest.approx(2.0)
    shares = [intervals.mean(v, "%") for v in ([90.0, 100.0], [0.0, 10.0])]
    assert [shares[0].high, shares[1].low] == [100.0, 0.0]


def test_what_was_never_reached_is_larger_than_all_others():
    steps = intervals.first_step([10, 20, 30], [[0.1, 0.5, 0.9], [0.6, 0.2, 0.7], [0.1, 0.2, 0.3]], 0.5)
    assert steps == [20.0, 10.0, math.inf]
    assert intervals.first_step([10, 20], [[0.1, 0.5], [0.1, 0.5]], [0.1, 0.6]) == [10.0, math.inf]
    assert intervals.ratio([20, math.inf, 10, math.inf], [10, 10, math.inf, math.inf]).tolist() == [
        2.0,
        math.inf,
        0.0,
        1.0,
    ]
    assert intervals.median([1.0, math.inf, math.inf]).value == math.inf
    assert intervals.median([1.0, 2.0, 3.0, math.inf, math.inf]).value == 3.0
    late = intervals.median([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, math.inf])
    assert (late.low > 1.0, late.high) == (True, math.inf)
    assert intervals.geometric([2.0, math.inf, 3.0]).value == 3.0
    with pytest.raises(ValueError, match="numbers"):
        intervals.mean([1.0, math.nan])


def test_rounding_is_no_difference():
    """Accuracies are kept with six digits: what these leave of equal counts is zero, and one image is not."""
    dust = intervals.mean([3e-5, -1e-5, 0.0, 0.05], "pp")
    assert dust.value == pytest.approx(0.0125)
    assert intervals.mean([27.7778 - 27.7777, -1e-5], "pp").value == 0.0
    assert intervals.mean([3e-5, 1e-5]).value == 2e-5  # of other numbers every digit counts


def test_edges_of_a_grid():
    grid = (0.1, 0.3, 1.0)
    assert intervals.at_edge(grid, no_norm=0.3) == ""
    assert intervals.at_edge(grid, no_norm=0.1, batch_norm=0.3).endswith(": 0.1 no norm")
    assert intervals.at_edge((0.1,), no_norm=0.1) == ""  # one rate was no choice


def estimate(value, p, **more):
    """Make an estimate with the same p at every bound."""
    return Estimate(value, value - 1, value + 1, 8, p=lambda bound: p, **more)


@pytest.mark.parametrize(
    ("value", "p", "least", "most", "expected"),
    [
        (2.0, 0.01, 1.0, None, "holds"),
        (2.0, 0.1, 1.0, None, "undecided"),
        (0.0, 0.01, 1.0, None, "fails"),
        (0.0, 0.01, None, 1.0, "holds"),
        (2.0, 0.01, None, 1.0, "fails"),
        (2.0, 0.01, 1.0, 3.0, "holds"),
        (4.0, 0.01, 1.0, 3.0, "fails"),
        (4.0, 0.01, None, None, None),
    ],
)
def test_a_part_is_judged_by_its_bounds(value, p, least, most, expected):
    c = Criterion("k", "text", at_least=least, at_most=most, scope="it")
    (part,) = verdict.judge([c], {"k": estimate(value, p)})
    assert part.verdict == expected


def test_what_decides_is_judged_together_by_holms_procedure():
    """0.01 < 0.05 / 3, but 0.03 > 0.05 / 2: it and all after it are open; what decides nothing stands by itself."""
    criteria = [Criterion(k, "text", at_least=0.0, scope=k) for k in "abc"] + [Criterion("d", "text", at_least=0.0)]
    ps = {"a": 0.03, "b": 0.01, "c": 0.04, "d": 0.04}
    found = verdict.judge(criteria, {k: estimate(1.0, p) for k, p in ps.items()})
    assert [part.verdict for part in found] == ["undecided", "holds", "undecided", "holds"]


def test_a_caveat_decides_nothing():
    c = Criterion("k", "text", at_least=0.0, scope="it")
    (part,) = verdict.judge([c], {"k": estimate(9.0, 1e-9, caveat="a rate is at the edge: 1")})
    assert part.verdict == "undecided"
    assert verdict.answer([c], [part], {"k": estimate(9.0, 1e-9, caveat="a rate is at the edge: 1")}) == (
        "Undecided, as a rate is at the edge, for it."
    )
    (part,) = verdict.judge([c], {"k": None})
    assert verdict.answer([c], [part], {"k": None}) == "Undecided, as not measured yet, for it."


@pytest.mark.parametrize(
    ("low", "high", "unit", "bound", "expected"),
    [
        (-0.9, 0.8, "pp", 0.0, "no difference"),
        (-0.9, 1.1, "pp", 0.0, "undecided"),
        (-0.9, 0.8, "%", 0.0, "undecided"),  # a share is no difference
        (-0.9, 0.8, "pp", 0.5, "undecided"),  # nor is one about another bound
        (0.85, 1.2, "", 1.0, "no difference"),
        (0.75, 1.2, "", 1.0, "undecided"),
        (0.85, 1.3, "", 1.0, "undecided"),
    ],
)
def test_a_small_difference_is_none(low, high, unit, bound, expected):
    """Neither side is shown, and the interval lies within a point, or a factor of 1.25."""
    e = Estimate(0.99 * bound, low, high, 8, unit, p=lambda _: 0.5)
    c = Criterion("k", "text", at_least=bound, scope="it")
    (part,) = verdict.judge([c], {"k": e})
    assert part.verdict == expected
    assert (expected == "undecided") == verdict.answer([c], [part], {"k": e}).startswith("Undecided")
    (part,) = verdict.judge([c], {"k": dataclasses.replace(e, p=lambda _: 0.001)})
    assert part.verdict == ("holds" if bound == 0 else "fails")  # where a side is shown, it is said


def test_the_answer_names_the_scopes():
    criteria = [Criterion(k, "text", at_least=0.0, scope=k) for k in ("one", "two", "three", "four")]
    estimates = {"one": estimate(9.0, 1e-9), "two": estimate(8.0, 1e-9), "three": estimate(-9.0, 1e-9)}
    estimates["four"] = estimate(0.5, 0.5)
    parts = verdict.judge(criteria, estimates)
    assert verdict.answer(criteria, parts, estimates) == (
        "Holds for one and two; fails for three; undecided for four (about n = 125 needed)."
    )
    assert verdict.overall(criteria, parts) == "in part"
    assert verdict.overall(criteria[:2], parts[:2]) == "holds"
    assert verdict.overall(criteria[2:3], parts[2:3]) == "fails"
    assert verdict.overall(criteria[2:], parts[2:]) == "not shown"


@pytest.mark.parametrize(
    ("scopes", "said"),
    [
        (["one"], "one"),
        (["steps on digits", "steps on MNIST"], "steps on digits and MNIST"),
        (["steps with tanh", "a cost", "steps with ReLU (few)"], "steps with tanh and ReLU (few), and a cost"),
        (
            ["a net of 5 layers", "a net of 9 layers", "one (on two)", "two"],
            "a net of 5 layers and 9 layers, one (on two), and two",
        ),
        (["a mean of 0", "whitening"], "a mean of 0 and whitening"),
    ],
)
def test_scopes_that_begin_alike_say_so_once(scopes, said):
    assert verdict.grouped(scopes) == said


def test_as_many_seeds_as_needed_find_the_effect():
    """The number that is said to be needed finds an effect of that size in four of five runs, within a tenth."""
    rng, error = np.random.default_rng(1), 1 / math.sqrt(40)
    first = Estimate(0.2, 0.2 - 2 * error, 0.2 + 2 * error, 40, p=lambda bound: 0.2)  # of a standard deviation of 1
    c = Criterion("k", "text", at_least=0.0, scope="it")
    (part,) = verdict.judge([c], {"k": first})
    again = [intervals.mean(0.2 + rng.standard_normal(part.needs)).p(0.0) < 0.05 for _ in range(300)]
    assert 0.7 < np.mean(again) < 0.9
