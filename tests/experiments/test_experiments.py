"""The trainer: arms are paired, devices do not change the training, and a run leaves what it should.

Nothing here says that a scientific claim holds; only that what is measured is what is said to be measured.
"""

import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_runs import QUICKSTART, ROOT, ROUNDING, TINY, digits, same, tiny, trajectory

from experiments.interrupt import Interrupt
from experiments.training import command, networks, parallel, record, train
from jaxbn import BatchNormState

# Models


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_both_arms_start_from_the_same_weights(model):
    """Every kernel is equal; the biases of normalized layers are left away."""
    settings, key = tiny(model=model, widths=(4,)), jax.random.key(3)
    kernels = []
    for norm in ("batch", "none"):
        params, _ = jax.jit(networks.build(settings, norm).init)(key)
        kernels.append([leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1])
    assert len(kernels[0]) == 2
    chex.assert_trees_all_equal(*kernels)
    assert np.std(kernels[0][0]) > 0


# Devices


WAYS = [("jit", 2, 1), ("jit", 8, 2), ("explicit", 4, 1), ("explicit", 8, 4), ("shard_map", 8, 4), ("pmap", 8, 1)]
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("way", "devices", "groups"), [("shard_map", 8, 1), *(pytest.param(*w, marks=SLOW) for w in WAYS)]
)
def test_with_global_statistics_any_number_of_devices_trains_alike(way, devices, groups):
    """The losses, the accuracies, the parameters and the running statistics are those of one device under jit."""
    one, many = trajectory(way="jit", devices=1), trajectory(way=way, devices=devices, groups=groups)
    chex.assert_trees_all_close(many, one, **ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["jit", "explicit", "shard_map", "pmap"])
def test_a_padded_batch_trains_alike_on_eight_devices(way):
    """Of 61 examples and three that do not count: on some devices fewer are counted than on others."""
    padded = {"last_batch": "pad", "steps": 36, "log_every": 18}
    one, many = trajectory(way="jit", devices=1, **padded), trajectory(way=way, devices=8, **padded)
    chex.assert_trees_all_close(many, one, rtol=2e-5, atol=2e-5)
    assert not same(one, trajectory(way="jit", devices=1, steps=36, log_every=18), rtol=1e-3, atol=1e-3)


def test_what_pads_a_batch_does_not_count():
    """A step on a padded batch is that of its examples alone: parameters, statistics, loss; whatever pads it."""
    settings = tiny(way="jit", devices=1, batch_size=8, log_every=1, steps=1)
    model = networks.build(settings, "batch")
    short = train.compile_arm(dataclasses.replace(settings, batch_size=5), model)
    padded = train.compile_arm(settings, model)
    few = short.feed(0, digits())
    cut = [(0, 0), (0, 0), (0, 3)]
    more = few._replace(
        images=np.pad(few.images, [*cut, (0, 0)], constant_values=1e6),
        labels=np.pad(few.labels, cut),
        mask=np.ones((2, 1, 5), bool),
    )
    more = more._replace(mask=np.pad(more.mask, cut))
    made = [
        arm.step(arm.start(), np.int32(0), chunk, digits().validation) for arm, chunk in ((short, few), (padded, more))
    ]
    chex.assert_trees_all_close(made[1], made[0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["jit", "shard_map"])
def test_the_batch_is_really_divided(way):
    """The compiled program knows 37 examples, not all 74: else the agreement above would be that of copies."""
    settings = tiny(way=way, devices=2, batch_size=74, seeds=3, learning_rates=(0.1,))
    arm = train.compile_arm(settings, networks.build(settings, "batch"))
    chunk = arm.feed(0, digits())
    program = arm.step.lower(arm.start(), np.int32(0), chunk, digits().validation).compile().as_text() or ""
    assert re.search(r"f32\[[\d,]*\b37\b", program)
    assert not re.search(r"f32\[[\d,]*\b74\b", program)


@pytest.mark.slow
def test_the_cnn_trains_alike_on_eight_devices():
    """Through the linen module."""
    cnn = {"model": "cnn", "widths": (4,), "init": "he", "init_scale": 1.0, "learning_rates": (0.05, 0.2)}
    one, many = trajectory(way="jit", devices=1, **cnn), trajectory(way="shard_map", devices=8, **cnn)
    chex.assert_trees_all_close(many, one, **ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "statistics", "groups"),
    [
        ("jit", "per_device", 1),
        ("explicit", "per_device", 1),
        ("pmap", "per_device", 1),
        ("jit", "groups", 2),
        ("explicit", "groups", 2),
    ],
)
def test_all_ways_agree_on_statistics_of_parts_which_are_not_global_ones(way, statistics, groups):
    """So that the tests above can fail: the tolerance tells the two statistics apart."""
    scope = {"devices": 8, "statistics": statistics, "groups": groups}
    this, by_shard_map = (trajectory(way=w, **scope) for w in (way, "shard_map"))
    chex.assert_trees_all_close(by_shard_map, this, **ROUNDING)
    (state,) = this[2]
    assert state.mean.shape == (2, 2, 8 if groups == 1 else 2, 8)  # seeds, rates, parts, features
    assert np.median(np.std(state.mean, axis=2)) > 1e-3
    log, params, _ = this
    assert not same((log, params), trajectory(way="jit", devices=8)[:2], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "record_of", [lambda m, v: BatchNormState(m, v, jnp.full(2, 7)), lambda m, v: {"mean": m, "var": v}]
)
def test_states_of_devices_are_pooled_for_evaluation(record_of):
    """The variance between the devices counts: the law of total variance."""
    way = parallel.way(tiny(statistics="per_device", devices=2))
    state = {"layer": record_of(jnp.array([[0.0], [2.0]]), jnp.array([[1.0], [3.0]]))}
    pooled = parallel.pooled_state(way, state)["layer"]
    chex.assert_trees_all_close(pooled, jax.tree.map(jnp.asarray, _expected(pooled)), rtol=1e-6)


def _expected(like):
    """Mean (0 + 2) / 2, variance (1 + 3) / 2 + 1."""
    if isinstance(like, BatchNormState):
        return BatchNormState(jnp.array([1.0]), jnp.array([3.0]), jnp.array(7))
    return {"mean": jnp.array([1.0]), "var": jnp.array([3.0])}


def test_too_many_devices_are_refused_with_a_remedy():
    """JAX has started here, with eight."""
    with pytest.raises(ValueError, match=r"must not exceed the 8 cpu devices there are; got 9. Pass `--devices 8`"):
        parallel.require_devices(9)


# Runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of a whole run through the command line, at a small learning rate and at one that diverges."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    arguments = [
        str(QUICKSTART),
        *TINY,
        "--learning-rates",
        "0.1",
        "1e30",
        "--activation",
        "relu",
        "--out",
        str(folder),
    ]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert command.main(arguments, Interrupt()) == 0
    (folder.parent / "printed").write_text(printed.getvalue())
    return folder


def test_a_run_leaves_a_complete_log_in_which_divergence_is_null(finished):
    """One line for each arm, seed, learning rate and chunk."""
    rows = record.read(finished / "metrics.jsonl")
    keys = {(r["arm"], r["seed"], r["learning_rate"], r["step"]) for r in rows}
    assert len(rows) == len(keys) == 16
    assert keys == {(a, s, lr, t) for a in ("batch", "none") for s in (0, 1) for lr in (0.1, 1e30) for t in (5, 10)}
    for row in rows:
        measured = [row[m] for m in train.Metrics._fields]
        assert None not in measured or row["learning_rate"] == 1e30
    assert any(r["val_loss"] is None for r in rows)
    assert "NaN" not in (finished / "metrics.jsonl").read_text()


def test_a_run_leaves_a_figure_a_summary_and_what_it_ran_on(finished):
    """All there, nothing half written, and the test accuracy is that of the rate chosen by validation."""
    assert {p.name for p in finished.iterdir()} == {*record.FILES, "checkpoints"}
    picture = (finished / "figure.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert 20_000 < len(picture) < 500_000
    ran = json.loads((finished / "config.json").read_text())
    assert ran["settings"]["steps"] == 10
    assert ran["versions"]["jax"] == jax.__version__
    assert ran["hardware"]["platform"] == "cpu"
    assert len(ran["git"].split()[0]) == 40
    speed = record.read(finished / "performance.jsonl")
    assert [(r["arm"], r["step"]) for r in speed] == [("batch", 5), ("batch", 10), ("none", 5), ("none", 10)]
    for r in speed:
        assert r["examples_per_second"] == pytest.approx(64 * r["steps_per_second"])
        assert r["steps_per_second"] == pytest.approx(5 / r["seconds"])
        assert 1e8 < r["memory_bytes"] < 1e11
    results = json.loads((finished / "summary.json").read_text())
    assert results["complete"]
    assert [a["arm"] for a in results["arms"]] == ["batch", "none"]
    for arm in results["arms"]:
        assert arm["learning_rate"] == 0.1
        assert len(arm["test_accuracy"]) == len(arm["steps_to_target"]) == 2
        assert all(round(360 * v, 3).is_integer() for v in arm["test_accuracy"])
        assert arm["steps_to_target"] == [None, None]
    printed = (finished.parent / "printed").read_text()
    assert all(name in printed for name in ("batch norm", "no norm", ">10 (>10 to >10)", f"Written to {finished}"[:30]))


def test_a_folder_is_replaced_only_by_a_valid_run(finished):
    """A refused command line leaves all as it was."""
    before = {p.name: p.stat().st_mtime_ns for p in finished.iterdir()}
    assert command.main([str(QUICKSTART), "--steps", "-1", "--out", str(finished), "--replace"], Interrupt()) == 2
    assert {p.name: p.stat().st_mtime_ns for p in finished.iterdir()} == before


def test_a_run_that_is_stopped_before_its_first_chunk_leaves_what_it_has(tmp_path):
    """The config; and no crash for want of data. A former run is gone: the folder is of this one."""
    folder, interrupt = tmp_path / "run", Interrupt()
    interrupt.requested = True
    for more in ([], ["--replace"]):
        assert command.main([str(QUICKSTART), *TINY, "--out", str(folder), *more], interrupt) == 130
        assert sorted(p.name for p in folder.iterdir()) == ["checkpoints", "config.json"]
        (folder / "metrics.jsonl").write_text("of the former run")


@pytest.mark.slow
def test_ctrl_c_ends_a_run_cleanly_with_what_it_has(tmp_path):
    """Exit code 130, no traceback, and whole files for the steps that were done."""
    folder = tmp_path / "run"
    arguments = [str(QUICKSTART), *TINY, "--steps", "1000000", "--learning-rates", "0.1", "--out", str(folder)]
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not (folder / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert "Interrupted" in output
    rows = record.read(folder / "metrics.jsonl")
    assert {r["arm"] for r in rows} == {"batch"}
    assert len(rows) == 2 * max(r["step"] for r in rows) / 5
    results = json.loads((folder / "summary.json").read_text())
    assert not results["complete"]
    assert results["arms"][0]["steps"] == max(r["step"] for r in rows)
    assert (folder / "figure.png").read_bytes()[:4] == b"\x89PNG"
