"""The experiments: that configs are refused by name, that arms are paired, that devices do not change the training.

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
from functools import cache
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.interrupt import Interrupt
from experiments.training import command, config, data, networks, parallel, record, summary, train
from jaxbn import BatchNormState

ROOT = Path(__file__).parents[2]
# The claims have a command and tests of their own.
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.toml") if p.parent.name != "claims")
QUICKSTART = ROOT / "configs" / "quickstart.toml"
CLAIM = "".join(f'{f.name} = "words"\n' for f in dataclasses.fields(config.Claim))
TINY = ["--widths", "8", "--steps", "10", "--log-every", "5", "--seeds", "2", "--devices", "2"]


def tiny(**changes) -> config.Settings:
    """Settings of a run of six steps."""
    small = {"widths": (8,), "steps": 6, "log_every": 3, "seeds": 2, "learning_rates": (0.1, 1.0), "activation": "relu"}
    return dataclasses.replace(config.load(QUICKSTART).settings, **small | changes)


@cache
def digits() -> data.Data:
    """The data, loaded once."""
    return data.digits()


@cache
def trajectory(norm="batch", **changes):
    """The metrics of each chunk of a tiny run, and the parameters and the evaluated state at its end."""
    settings, log = tiny(**changes), []
    arm = train.compile_arm(settings, networks.build(settings, norm))
    end = train.train(settings, arm, digits(), lambda step, metrics, carry: log.append(metrics))
    return jax.device_get((log, end.carry.params, end.carry.state))


def same(a, b, **tolerance):
    """Whether two trajectories agree within the tolerance."""
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.allclose(x, y, **tolerance) for x, y in leaves)


# Sums over the batch are taken in another order on another number of devices: an error of a unit or two in the last
# place of float32 (1e-7) at each of six steps, which these well-conditioned runs do not amplify much.
ROUNDING = {"rtol": 3e-6, "atol": 3e-6}


# Configs


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.name != "base.toml"], ids=lambda p: p.stem)
def test_every_config_is_a_claim_that_loads(path):
    """It is complete, says how to run itself, and needs no more devices than there are in the tests."""
    loaded = config.load(path)
    assert loaded.claim.command == f"python -m experiments {path.relative_to(ROOT)}"
    assert loaded.settings.devices <= 8


def test_the_ways_over_several_devices_all_have_a_config():
    """Each way with each scope of statistics that it has; and 1, 2, 4 and 8 devices, and meshes of two axes."""
    found = [config.load(p).settings for p in CONFIGS if p.parent.name == "multi_device"]
    ways = {(s.way, s.statistics) for s in found}
    named = {(w, s) for w in ("jit", "explicit", "shard_map") for s in ("global", "groups", "per_device")}
    assert ways == named | {("pmap", "global"), ("pmap", "per_device")}
    assert {s.devices for s in found} == {1, 2, 4, 8}
    assert any(s.groups > 1 and s.statistics == "global" for s in found)


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("learning_rate = [0.1]", ValueError, "unknown key `learning_rate`. Did you mean `learning_rates`?"),
        ("zzz = 1", ValueError, "unknown key `zzz`. The keys are question, "),
        ('steps = "many"', TypeError, "`steps`: input should be a valid integer; got 'many'"),
        ("steps = true", TypeError, "`steps`: input should be a valid integer; got True"),
        ("steps = 100.0", TypeError, "`steps`: input should be a valid integer; got 100.0"),
        ("learning_rates = 0.1", TypeError, "`learning_rates`: input should be a valid tuple; got 0.1"),
        (
            'learning_rates = [0.1, "a"]',
            TypeError,
            "`learning_rates`, entry 1: input should be a valid number; got 'a'",
        ),
        ("learning_rates = [0.1, 0.1]", ValueError, "`learning_rates` must not hold a value twice"),
        ("learning_rates = [inf]", ValueError, "`learning_rates`, entry 0: input should be a finite number; got inf"),
        ("steps = 0", ValueError, "`steps`: input should be greater than 0; got 0"),
        ("bn_momentum = 1.5", ValueError, "`bn_momentum`: input should be less than or equal to 1; got 1.5"),
        ('model = "resnet"', ValueError, "`model`: input should be 'mlp', 'cnn' or 'lstm'; got 'resnet'"),
        ("steps = 30", ValueError, "`steps` must be a multiple of `log_every`"),
        ("batch_size = 60", ValueError, "`batch_size` must be a multiple of `devices`"),
        ("groups = 3", ValueError, "`groups` must divide `devices`"),
        ('statistics = "groups"', ValueError, "be 2 at least where `statistics` are theirs; got 1 and 8"),
        ('way = "pmap"\ngroups = 2', ValueError, "has one axis, and so one group; got 2"),
        ('way = "explicit"\nmodel = "cnn"', ValueError, "is for the MLP on several devices; got cnn"),
        ('last_batch = "pad"\narms = ["whiten"]', ValueError, "needs norms that take masks"),
        ("steps = = 1", ValueError, "a config must be TOML"),
    ],
)
def test_what_is_wrong_with_a_config_is_named(tmp_path, text, kind, words):
    """The file, the key, what came and what is expected."""
    (tmp_path / "c.toml").write_text(f'{CLAIM}\nbase = "{QUICKSTART}"\n{text}\n')
    with pytest.raises(kind) as error:
        config.load(tmp_path / "c.toml")
    assert str(error.value).startswith(f"{tmp_path / 'c.toml'}: ")
    assert words in str(error.value)


def test_what_is_wrong_with_a_base_is_named(tmp_path):
    """Missing, circular, not a string; a wrong key in a base is blamed on the base; words are not inherited."""
    path, other = tmp_path / "c.toml", tmp_path / "other.toml"
    for text, kind, words in [
        ('base = "none.toml"', ValueError, "c.toml: `base` must name a config relative to this file; got 'none.toml'"),
        (
            'base = "other.toml"',
            ValueError,
            "other.toml: `base` must not lead back to where it came from; got 'c.toml'",
        ),
        ("base = 1", TypeError, "c.toml: `base` must be a path"),
        ("steps = 5", ValueError, "c.toml: `arms` is missing; it must be given here or in a base"),
    ]:
        path.write_text(CLAIM + text)
        other.write_text('base = "c.toml"')
        with pytest.raises(kind, match=words):
            config.load(path)
    path.write_text(CLAIM + 'base = "other.toml"')
    other.write_text("stepz = 5")
    with pytest.raises(ValueError, match=r"other.toml: unknown key `stepz`. Did you mean `steps`"):
        config.load(path)
    path.write_text(f'base = "{QUICKSTART}"')
    with pytest.raises(ValueError, match=r"`question` is missing; it must be given here: words are not inherited"):
        config.load(path)
    with pytest.raises(ValueError, match="must be a readable file"):
        config.load(tmp_path / "gone.toml")


def test_the_command_line_overrides_a_config_and_is_validated_like_it():
    """What is not named stays."""
    given = config.load(QUICKSTART)
    arguments = [str(QUICKSTART), "--steps", "50", "--learning-rates", "0.1", "0.3", "--out", "there", "--replace"]
    changed, given_command = command.parse(arguments)
    assert changed.settings == dataclasses.replace(given.settings, steps=50, learning_rates=(0.1, 0.3))
    where = (command.folder_of(given_command, changed), given_command.replace)
    assert (changed.claim, changed.name, where) == (given.claim, "quickstart", (Path("there"), True))
    assert changed.overridden == ("learning_rates", "steps")
    plain, given_command = command.parse([str(QUICKSTART)])
    assert (plain, command.folder_of(given_command, plain)) == (given, Path("runs/quickstart"))
    assert not given_command.replace
    for arguments, words in [
        (["--steps", "-5"], "command line: `steps`: input should be greater than 0; got -5"),
        (["--steps", "30"], "command line: `steps` must be a multiple of `log_every`"),
    ]:
        with pytest.raises(ValueError, match=words):
            command.parse([str(QUICKSTART), *arguments])
    with pytest.raises(ValueError, match="first argument must be a config"):
        command.parse([])


def test_help_describes_every_setting(capsys):
    """By its docstring."""
    with pytest.raises(SystemExit) as end:
        command.parse([str(QUICKSTART), "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert all(f"--{f.name.replace('_', '-')} " in text for f in dataclasses.fields(config.Settings))
    assert "training steps." in text


# Data


def test_the_split_is_disjoint_complete_and_stratified():
    """Each part has every digit in proportion, to within one image."""
    parts = digits()
    assert [len(p.labels) for p in parts] == [data.TRAIN, data.VALIDATION, data.TEST]
    assert all(p.images.dtype == np.float32 and p.images.min() == 0 and p.images.max() == 1 for p in parts)
    counts = np.array([np.bincount(p.labels, minlength=10) for p in parts])
    whole = counts.sum(0)
    for count, part in zip(counts, parts, strict=True):
        np.testing.assert_allclose(count, whole * len(part.labels) / whole.sum(), atol=1.5)
    rows = np.concatenate([p.images for p in parts])
    assert len(np.unique(rows, axis=0)) == len(rows) == 1797  # no image twice, so no image in two parts


def test_the_order_is_a_permutation_each_epoch_and_a_function_of_seed_and_step():
    """However the steps are cut into chunks; epochs and seeds differ."""
    order = jax.jit(data.batches, static_argnames=("steps", "batch_size", "examples"))
    sizes = {"batch_size": 6, "examples": 20}  # three steps an epoch, two examples sit it out

    def steps(seed, first, count):
        return np.asarray(order(jnp.asarray(seed), jnp.asarray(first), steps=count, **sizes))

    whole = steps(0, 0, 12)
    epochs = whole.reshape(4, 18)
    assert all(len(set(e)) == 18 and set(e) <= set(range(20)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 4
    for first in range(8):
        np.testing.assert_array_equal(steps(0, first, 4), whole[first : first + 4])
    assert not np.array_equal(steps(1, 0, 12), whole)


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
    """The folder of a whole run through the command line, at a small learning rate and at one that diverges."""
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


# Summary


def rows_of(arm, rate, accuracies, loss: float | None = 1.0):
    """Log lines: one run for each seed, `accuracies[seed][chunk]`."""
    return [
        {"arm": arm, "seed": seed, "learning_rate": rate, "step": 5 * (i + 1), "val_accuracy": a, "val_loss": loss}
        for seed, run in enumerate(accuracies)
        for i, a in enumerate(run)
    ]


def test_an_arm_is_judged_at_its_best_rate():
    """By the median over seeds; a tie goes to the lower loss, and a run that diverged has none."""
    rows = rows_of("batch", 0.1, [[0.2, 0.8]] * 3) + rows_of("batch", 0.3, [[0.9, 0.9], [0.1, 0.9], [0.1, 0.1]])
    rows += rows_of("batch", 0.5, [[0.2, 0.9]] * 3, loss=None) + rows_of("batch", 1.0, [[1.0, 0.7]] * 3)
    finished = {"batch": {"seconds": [9.0, 1.0, 3.0], "test_accuracy": [0.5, 0.6, 0.7]}}
    (result,) = summary.summarize(rows, 0.85, finished, chunk=5)
    assert (result["learning_rate"], result["test_accuracy"]) == (0.3, [0.5, 0.6, 0.7])
    assert result["steps_to_target"] == [5, 10, None]
    assert (result["seconds_per_step"], result["seconds_to_compile"]) == (0.4, 7.0)
    assert (summary.count(float("inf"), 10), summary.count(7.25, 10)) == (">10", "7")


def test_quartiles_are_numpys_where_finite_and_infinite_where_censored():
    """Infinity and NaN are larger than all."""
    values = np.random.default_rng(0).normal(size=(6, 3))
    chex.assert_trees_all_close(tuple(summary.quartiles(values)), tuple(np.quantile(values, [0.5, 0.25, 0.75], axis=0)))
    q = summary.quartiles(np.array([1.0, 2.0, 3.0, np.inf, np.nan]))
    assert (float(q.low), float(q.median), float(q.high)) == (2.0, 3.0, np.inf)
    assert float(summary.quartiles(np.array([1.0, np.inf])).median) == np.inf
