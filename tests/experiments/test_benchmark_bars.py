"""The bars of the benchmark, judged from results that are made up."""

import math
from collections import Counter

import pytest

from experiments.benchmark import bars, report, sizes
from experiments.benchmark.layers import PROGRAMS
from experiments.benchmark.sizes import OURS


def made_up(platform="cpu", **ratios):
    """Results of two sizes, two dtypes and one epilogue; every ratio is 0.5 but those given, by peer."""
    times = [
        {
            "size": size,
            "dtype": dtype,
            "epilogue": "relu",
            "program": program,
            "contender": peer,
            "ours_to_theirs": {"median": 1.0 if peer == OURS else ratios.get(peer.split(",")[0], 0.5) * factor},
        }
        for size, factor in (("8x4x4x2", 2.0), ("8x2x2x2", 0.5))
        for dtype in ("float32", "bfloat16")
        for program in PROGRAMS
        for peer in (OURS, "flax", "flax, stable", "haiku", "torch, channels_last")
    ]
    each = [(OURS, 2.0), ("flax", 10.0)]
    found = [
        {"measure": measure, "contender": name, "value": v, "dtype": dtype, "epilogue": "relu"}
        for measure in ("kept", "temporary, scan", "temporary, scan, rematerialized")
        for dtype in ("float32", "bfloat16")
        for name, v in each
    ]
    found += [{"measure": "compile time", "contender": n, "part": "trace + compile", "value": v} for n, v in each]
    found += [{"measure": "dispatch", "contender": n, "call": "jitted", "value": v} for n, v in each]
    for measure in ("step time, ResNet", "peak, ResNet"):
        found += [{"measure": measure, "contender": n, "value": v} for n, v in each]
    found += [{"measure": "collectives", "contender": OURS, "way": way, "value": 2} for way in ("jit", "pmap")]
    plan = {"deep": 50, "scanned": 16, "stages": list(sizes.RESNET_50)}
    return {"hardware": {"platform": platform}, "plan": plan, "times": times, "measures": found}


def verdicts(results):
    return {row["bar"]: row["verdict"] for row in bars.bars(results)}


def test_bars_of_the_other_platform_are_not_measured():
    """Nothing is guessed: on a CPU the GPU's bars, on a GPU the CPU's, and those that have no measurement yet."""
    for platform, other in (("cpu", "GPU"), ("gpu", "CPU")):
        found = verdicts(made_up(platform))
        missing = {bar for bar, verdict in found.items() if verdict == "not measured"}
        assert missing >= {bar for bar in found if bar.startswith(other)}
        assert not any(bar.startswith(platform.upper()) for bar in missing)
        assert Counter(found.values())["missed"] == 0


def test_a_bar_is_judged_where_it_is_worst():
    """The value is the worst dtype's geometric mean over the sizes: a better dtype does not make up for a worse one."""
    results = made_up(flax=0.6)
    for row in results["times"]:
        if (row["contender"], row["dtype"]) == ("flax", "bfloat16"):
            row["ours_to_theirs"]["median"] *= 1.25
        if (row["contender"], row["dtype"]) == ("flax", "float32"):
            row["ours_to_theirs"]["median"] *= 0.8
    found = {row["bar"]: row for row in bars.bars(results)}
    over_flax = found["CPU, forward+backward over flax: worst dtype and epilogue"]
    assert (over_flax["verdict"], over_flax["where"]) == ("met", "bfloat16, relu")
    assert over_flax["value"] == pytest.approx(0.75)
    # Over both dtypes it is kept; at one of the sizes it was twice that, though the means say nothing of it.
    assert found["CPU, forward+backward over flax"]["verdict"] == "met"
    assert found["CPU, forward+backward over flax"]["value"] == pytest.approx(0.6)
    assert found["CPU, forward in training over flax, float32"]["value"] == pytest.approx(0.48)
    assert found["CPU, forward+backward over flax: worst size"]["verdict"] == "missed"
    assert found["CPU, forward+backward over flax: worst size"]["where"] == "bfloat16, relu, 8x4x4x2"


def test_evaluation_is_compared_with_the_best_peer():
    found = {row["bar"]: row for row in bars.bars(made_up(haiku=1.2))}
    assert found["CPU, evaluation over the best peer, haiku"]["verdict"] == "missed"


@pytest.mark.parametrize(
    ("value", "limit", "verdict"),
    [
        (0.85, 0.85, "met"),
        (0.8549, 0.85, "met"),  # printed as 0.85
        (0.8551, 0.85, "missed"),
        (math.inf, 2.0, "missed"),
        (None, 1.0, "not measured"),
    ],
)
def test_verdict(value, limit, verdict):
    assert bars.verdict(value, limit) == verdict


def test_a_way_that_fails_misses_the_bar():
    results = made_up()
    results["measures"][-1]["value"] = None
    (row,) = [row for row in bars.bars(results) if row["bar"].startswith("collectives")]
    assert (row["verdict"], row["value"], row["where"]) == ("missed", None, "pmap")


def test_a_row_shows_the_libraries_in_the_order_of_the_columns():
    """Times relative to ours, and more is slower."""
    results = made_up(flax=0.25)
    assert report._slower(results, "forward", "float32", "flax") == pytest.approx(4.0)
    assert report._slower(results, "forward", "float32", OURS) == pytest.approx(1.0)
    assert report._slower(results, "forward", "float32", "equinox") is None
