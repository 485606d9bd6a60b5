"""The benchmark's rows for whole networks."""

import jax
import numpy as np
import pytest

from experiments.benchmark.whole_networks import CONTENDERS, SMALLEST, rows, training_step

pytestmark = pytest.mark.usefixtures("ordinary_promotion")


def test_the_contenders_train_the_same_network():
    ours, *others = (step.run(step.start()) for step in (training_step(norm, SMALLEST) for norm in CONTENDERS.values()))
    for other in others:
        assert jax.tree.structure(other) == jax.tree.structure(ours)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), other, ours)


def test_there_is_a_row_for_each_measure_and_contender():
    found = list(rows(SMALLEST, rounds=2, compilations=1))
    keys = [(row["measure"], row["contender"], row.get("part")) for row in found]
    parts = ["trace", "compile", "trace + compile"]
    wanted = [("peak, ResNet-20", name, None) for name in CONTENDERS]
    wanted += [("step time, ResNet-20", name, None) for name in CONTENDERS]
    wanted += [("compile time, ResNet-20", name, part) for name in CONTENDERS for part in parts]
    assert sorted(keys, key=str) == sorted(wanted, key=str)
    assert all(row["value"] > 0 and row["problem"]["stages"] == [1] for row in found)
    assert {
        row["ours_to_theirs"]["median"] for row in found if row["contender"] == "jaxbn" and "step" in row["measure"]
    } == {1}
