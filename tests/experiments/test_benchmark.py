"""The benchmark: it computes what it says it times, and counts what it says it counts.

No time is tested here: a clock shows what it is given.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from experiments.benchmark import (
    accuracy,
    clock,
    collectives,
    memory,
    training,
)
from experiments.benchmark.layers import PROGRAMS, contender, present
from experiments.benchmark.networks import NORMS
from experiments.benchmark.sizes import CONTENDERS, EPILOGUES, OURS, Case

# Other libraries are measured as they are used: with JAX's own rules of promotion.
pytestmark = pytest.mark.usefixtures("ordinary_promotion")


# All contenders compute the same thing


DENSE, IMAGES = Case((6, 4), "float32", "none"), Case((2, 3, 3, 4), "float32", "residual+relu")


@pytest.mark.slow
@pytest.mark.parametrize("case", [DENSE, IMAGES], ids=lambda case: case.size)
@pytest.mark.parametrize("name", present((*CONTENDERS, "jaxbn.linen")))
def test_contenders_agree_with_the_oracle(name, case):
    """Outputs, new running mean, and every gradient, from parameters and statistics that are not trivial."""
    host = accuracy.inputs(case, 1.0)
    it = contender(name, case, host)
    kinds = PROGRAMS if case is IMAGES else PROGRAMS[1:]
    got = {kind: it.calls[kind].run() for kind in kinds}
    added = 0 if host.residual is None else host.residual.astype(np.float64)
    forward = oracle.training(host.x, host.scale, host.bias)
    evaluated = oracle.evaluation(host.x, host.mean, host.var, host.scale, host.bias) + added
    y, g = forward.y + added, host.g.astype(np.float64)
    if case.relu:
        y, evaluated, g = np.maximum(y, 0), np.maximum(evaluated, 0), np.where(y > 0, g, 0)
    dx, d_scale, d_bias = oracle.gradients(host.x, g, host.scale)

    # A few values of size 1: some units in the last place of float32, more in PyTorch, which folds its factors.
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-5)
    close(it.read(got["evaluation"]["y"], 4), evaluated)
    for kind in kinds[:-1]:
        close(it.read(got[kind]["y"], 4), y)
    both = got["forward+backward"]
    close(it.read(both["dx"], 4), dx)
    close(it.read(both["d_params"]["scale"], 4), d_scale)
    close(it.read(both["d_params"]["bias"], 4), d_bias)
    assert (both["d_residual"] is None) == (not case.residual)
    if case.residual:
        close(it.read(both["d_residual"], 4), g)
    if not name.startswith("torch"):
        mean = 0.99 * host.mean + 0.01 * forward.mean
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(both["state"])]
        assert any(leaf.shape == mean.shape and np.allclose(leaf, mean, rtol=0, atol=1e-6) for leaf in leaves)


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_exact_is_the_oracle(epilogue):
    """The checked features of a large array, written once more without loops."""
    case = Case((3, 2, 2, 9), "float32", epilogue)
    host = accuracy.inputs(case, 1e3)
    exact = accuracy.exact(case, host)
    y = oracle.training(host.x, host.scale, host.bias).y + (0 if host.residual is None else host.residual)
    g = np.where(y > 0, host.g, 0) if case.relu else host.g
    y = np.maximum(y, 0) if case.relu else y
    for got, wanted in zip(exact[2:], oracle.gradients(host.x, g, host.scale), strict=True):
        np.testing.assert_allclose(got, wanted[..., : accuracy.FEATURES], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(exact.y, y[..., : accuracy.FEATURES], rtol=1e-9, atol=1e-9)


def test_errors_are_distances():
    ones = np.ones((4, 2))
    assert accuracy.largest(ones + np.array([0.5, -2.0]), ones) == 2.0
    assert accuracy.relative(1.5 * ones, ones) == pytest.approx(0.5)
    assert accuracy.largest(ones * np.nan, ones) == accuracy.relative(ones * np.inf, ones) == "not finite"


# The clock


class Shown:
    """A clock that shows a given time; calls that take the time that they say, and a while longer at first."""

    def __init__(self, monkeypatch):
        self.now, self.log = 0.0, []
        monkeypatch.setattr(clock.time, "perf_counter", lambda: self.now)

    def call(self, name, seconds, **options):
        def run():
            self.log.append(name)
            self.now += seconds
            return name

        return clock.Call(run, lambda out: None, **options)


def test_times_are_those_of_a_call_and_ratios_those_of_a_round(monkeypatch):
    shown = Shown(monkeypatch)
    sampled = clock.interleaved({"slow": shown.call("slow", 0.5), "fast": shown.call("fast", 1 / 4096)}, rounds=3)
    np.testing.assert_allclose(sampled["slow"], 0.5, rtol=1e-12)
    np.testing.assert_allclose(sampled["fast"], 1 / 4096, rtol=1e-9)
    assert clock.quartiles(sampled["fast"] / sampled["slow"])["median"] == pytest.approx(1 / 2048)


def test_contenders_take_turns_in_alternating_order(monkeypatch):
    """Each sample after a call that is not timed, with as many calls as make it long enough."""
    shown = Shown(monkeypatch)
    clock.interleaved({"a": shown.call("a", 1.0), "b": shown.call("b", clock.SAMPLE / 1.5)}, rounds=2)
    there, back = ["a"] * 2 + ["b"] * 3, ["b"] * 3 + ["a"] * 2
    calibration = ["a"] * 2 + ["b"] * 2
    assert shown.log == calibration + (back + there) * ((clock.WARM_UP + 2) // 2)


@pytest.mark.parametrize(("queued", "waits"), [(False, 5), (True, 1)])
def test_an_accelerator_is_awaited_once_for_all_calls(monkeypatch, queued, waits):
    shown, waited = Shown(monkeypatch), []
    call = shown.call("a", 1.0, queued=queued)._replace(wait=waited.append)
    clock._many(call, 5)
    assert len(shown.log) == 5
    assert waited[-1:] == ["a"]
    assert len(waited) in (waits, waits + 1)  # waiting again for what is done costs nothing


# What is counted


@pytest.mark.compiler
def test_temporary_memory_is_what_xla_says():
    """None for what is done in place; what a loop stacks for its backward pass, and that it grows with the loop."""
    x = jnp.ones((64, 64))

    def temporary(f):
        return memory.temporary_bytes(jax.jit(f).lower(x).compile())

    assert temporary(lambda x: 2 * x + 1) == 0

    def stacking(length, x):
        return jnp.sum(jax.lax.scan(lambda x, _: (jnp.sin(x), None), x, length=length)[0])

    few, many = (temporary(jax.grad(partial(stacking, length))) for length in (4, 12))
    assert many - few == 8 * x.nbytes


KEPT = {OURS: 4, "flax": 13, "torch, channels_last": 8}


@pytest.mark.parametrize("name", present(tuple(KEPT)))
def test_bytes_kept_in_float32_with_relu(name):
    kept = memory.kept(name, Case((512, 16), "float32", "relu"))
    assert KEPT[name] <= kept < KEPT[name] + 0.5  # some vectors of a value per feature, 512 times smaller than x


@pytest.mark.compiler
@pytest.mark.parametrize("way", collectives.WAYS)
def test_collectives_of_flax(way):
    """Two in all: one forward, one backward. The same instrument finds four in its stable variant under shard_map."""
    assert collectives.count(collectives.text("flax", way)) == 2
    if way == "shard_map":
        assert collectives.count(collectives.text("flax, stable", way)) == 4


def test_collectives_in_a_program():
    """Begun or not, each once; those in a branch or a loop are rare."""
    text = """
%rare (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %r = f32[4]{0} all-reduce(%p), to_apply=%add
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %a = f32[4]{0} all-reduce(%x), to_apply=%add
  %b = (f32[4]{0}, /*index=1*/f32[2]{0}) all-gather-start(%a), dimensions={0}
  %c = f32[4]{0} all-gather-done(%b)
  %all-reduce.1 = f32[4]{0} add(%a, %all-reduce)
  %d = f32[4]{0} while(%c), condition=%never, body=%rare
  ROOT %e = f32[4]{0} conditional(%d), branch_computations={%rare, %other}
}
"""
    assert collectives.count(text) == 2
    assert collectives.count(text.replace("body=%rare", "body=%other").replace("{%rare, ", "{")) == 3


def test_a_way_that_fails_is_a_result(monkeypatch):
    def broken(features, axis_name):
        raise TypeError("no such way\nat all")

    monkeypatch.setitem(collectives.LAYERS, "flax", broken)
    monkeypatch.setattr(collectives, "MODULES", ["flax"])
    rows = list(collectives.rows())
    assert [row["way"] for row in rows] == list(collectives.WAYS)
    assert all(row["value"] is None and row["error"] == "no such way" for row in rows)


# Whole networks


def test_the_contenders_train_the_same_network():
    ours, *others = (training.compile_step(norm, training.SMALLEST)[1].run() for norm in NORMS)
    for other in others:
        assert jax.tree.structure(other) == jax.tree.structure(ours)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), other, ours)


def test_there_is_a_row_for_each_measure_and_contender():
    found = list(training.resnet_20_rows(training.SMALLEST, rounds=2, compilations=1))
    keys = [(row["measure"], row["contender"], row.get("part")) for row in found]
    parts = ["trace", "compile", "trace + compile"]
    wanted = [("peak, ResNet-20", name, None) for name in NORMS]
    wanted += [("step time, ResNet-20", name, None) for name in NORMS]
    wanted += [("compile time, ResNet-20", name, part) for name in NORMS for part in parts]
    assert sorted(keys, key=str) == sorted(wanted, key=str)
    assert all(row["value"] > 0 and row["problem"]["stages"] == [1] for row in found)
    assert {
        row["ours_to_theirs"]["median"] for row in found if row["contender"] == "jaxbn" and "step" in row["measure"]
    } == {1}
