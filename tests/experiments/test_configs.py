"""Configs, data and summaries: each config is a claim that loads, and a wrong key or value is named."""

import dataclasses
from pathlib import Path

import chex
import numpy as np
import pytest
from training_runs import QUICKSTART, ROOT, digits

from experiments.training import command, config, data, summary

# The claims have a command and tests of their own.
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.toml") if p.parent.name != "claims")
CLAIM = "".join(f'{f.name} = "words"\n' for f in dataclasses.fields(config.Claim))


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
        ("base = 1", ValueError, "c.toml: `base` must name a config relative to this file; got 1"),
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
    """Settings that are not named stay."""
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
    """The help is the docstring of the setting."""
    with pytest.raises(SystemExit) as end:
        command.parse([str(QUICKSTART), "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert all(f"--{f.name.replace('_', '-')} " in text for f in dataclasses.fields(config.Settings))
    assert "training steps." in text


# Data


def test_the_split_is_disjoint_complete_and_stratified():
    """Each part has every digit in proportion, to within one image."""
    parts = digits()[:3]
    assert [len(p.labels) for p in parts] == [data.TRAIN, data.VALIDATION, data.TEST]
    assert all(p.images.dtype == np.float32 and p.images.min() == 0 and p.images.max() == 1 for p in parts)
    counts = np.array([np.bincount(p.labels, minlength=10) for p in parts])
    whole = counts.sum(0)
    for count, part in zip(counts, parts, strict=True):
        np.testing.assert_allclose(count, whole * len(part.labels) / whole.sum(), atol=1.5)
    rows = np.concatenate([p.images for p in parts])
    assert len(np.unique(rows, axis=0)) == len(rows) == 1797  # no image twice, so no image in two parts


# Summary


def rows_of(arm, rate, accuracies, loss: float | None = 1.0):
    """Log lines: one run for each seed, `accuracies[seed][chunk]`."""
    return [
        {"arm": arm, "seed": seed, "learning_rate": rate, "step": 5 * (i + 1), "val_accuracy": a, "val_loss": loss}
        for seed, run in enumerate(accuracies)
        for i, a in enumerate(run)
    ]


def test_an_arm_is_judged_at_its_best_rate():
    """The best rate has the best median over seeds; a tie goes to the lower loss, and a run that diverged has none."""
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
