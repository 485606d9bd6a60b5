"""The programs that are compiled, and the bars that they are held to, judged from made-up records."""

import pytest
from compiled_records import X, made_up

from experiments.compiled import bars, cases, targets
from experiments.compiled.cases import ALONE, FLAX, NET, NONE, OURS, Case, list_cases


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
    assert missed[0].where == bad.name


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
    assert unknown["alone, TPU: moved, over flax"] == gone._replace(contender=OURS).name
