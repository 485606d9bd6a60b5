"""The trainer's arms and evaluations for the variants: each does what its name says."""

import dataclasses
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from experiments.interrupt import Interrupt
from experiments.training import check, config, layers, networks, statistics, train, variants
from experiments.training.data import digits

CONFIGS = Path(__file__).parents[2] / "configs" / "variants"
pytestmark = pytest.mark.usefixtures("ordinary_promotion")


def settings(name, **changes):
    small = {"steps": 10, "log_every": 5, "seeds": 2, "learning_rates": (0.1,)}
    return config.settings(dataclasses.asdict(config.load(CONFIGS / f"{name}.toml").settings) | small | changes, name)


@pytest.fixture(scope="module")
def accuracies():
    """Return the accuracies of all evaluations of one short training."""
    s = settings("adapt", evaluations=check.EVALUATIONS["mlp"])
    arm = train.compile_arm(s, networks.build(s, "batch"))
    trained = train.train(s, arm, digits(), lambda *_: None)
    return statistics.accuracies(s, arm, trained.carry, digits())


@pytest.mark.slow
def test_evaluations(accuracies):
    assert list(accuracies) == list(check.EVALUATIONS["mlp"])
    # A network without norms that classifies every image as the one with them does.
    assert accuracies["folded"] == accuracies["running"]
    # Ten steps of an average that keeps 0.9 are too few: the moments themselves are better.
    assert np.mean(accuracies["recalibrated"]) > np.mean(accuracies["running"])
    assert np.mean(accuracies["shifted"]) < np.mean(accuracies["running"])
    assert accuracies["adapted"] != accuracies["shifted"] != accuracies["shrunk"]


def test_every_evaluation_has_a_name_and_a_model():
    assert set(statistics.NAMES) == {name for names in check.EVALUATIONS.values() for name in names}


@pytest.mark.slow
def test_evaluations_of_the_cnn():
    s = settings("weigh", widths=(4, 8), steps=40, log_every=20)
    arm = train.compile_arm(s, networks.build(s, "batch"))
    trained = train.train(s, arm, digits(), lambda *_: None)
    found = statistics.accuracies(s, arm, trained.carry, digits())
    assert list(found) == list(s.evaluations)
    assert min(np.mean(found["running"]), np.mean(found["own"])) > max(
        np.mean(found["shifted"]), np.mean(found["weighed"])
    )
    assert found["own"] != found["running"]
    assert found["weighed"] != found["shifted"]


def test_an_image_has_a_say_in_its_statistics():
    """Evaluation is that of `apply_with_example_weight`; in training the network is the one without."""
    s, x = settings("weigh", widths=(3,)), jnp.asarray(digits().test.images[:6])
    plain, weighed = (networks.build(s, arm) for arm in ("batch", "weighed"))
    params, state = jax.jit(plain.init)(jax.random.key(0))
    state = jax.tree.map(lambda v: v + 0.5, state)
    images, sides = x.reshape(-1, 8, 8, 1), ("NHWC", "HWIO", "NHWC")
    h = jax.lax.conv_general_dilated(images, params["Conv_0"]["kernel"], (1, 1), "SAME", dimension_numbers=sides)
    norm = (
        jaxbn.BatchNormParams(**params["BatchNorm_0"]),
        jaxbn.BatchNormState(**state["BatchNorm_0"], count=jnp.array(1)),
    )
    h = nn.max_pool(jax.nn.relu(jaxbn.statistics.apply_with_example_weight(*norm, h, layers.OWN)), (2, 2), (2, 2))
    wanted = h.reshape(6, -1) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    got, without = (
        jax.jit(net.apply, static_argnums=(3, 4))(params, state, x, False, None)[0] for net in (weighed, plain)
    )
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert np.max(np.abs(got - without)) > 0.01
    got, without = (
        jax.jit(net.apply, static_argnums=(3, 4))(params, state, x, True, None)[0] for net in (weighed, plain)
    )
    np.testing.assert_array_equal(got, without)


def layer(arm, x, **changes):
    s = settings("domains" if arm in ("domains", "conditional") else arm, **changes)
    made = layers.of(s, arm)
    return made.apply(*made.init(x.shape[1]), jnp.asarray(x), layers.Pass(train=True))


@pytest.mark.parametrize("arm", ["ghost", "renorm", "conditional", "domains", "whiten"])
def test_an_arm_is_not_the_plain_layer(arm):
    """But equals it where its option is trivial, or where both domains are alike."""
    x = np.random.default_rng(0).standard_normal((32, 20)).astype(np.float32) * 2 + 1
    plain = jax.nn.relu(jaxbn.bn_apply(*jaxbn.bn_init(20), x, True)[0])
    y, _ = layer(arm, x)
    trivial = {"ghost": {"ghost_batches": 1}, "renorm": {"r_max": 1.0, "d_max": 0.0}}
    if arm == "conditional":  # which begins so
        np.testing.assert_allclose(y, plain, atol=1e-5)
    else:
        assert np.max(np.abs(y - plain)) > 0.01
    if arm in trivial:
        np.testing.assert_allclose(layer(arm, x, **trivial[arm])[0], plain, atol=1e-5)
    if arm == "domains":
        same = np.repeat(x[:16], 2, axis=0)
        wanted = jax.nn.relu(jaxbn.bn_apply(*jaxbn.bn_init(20), same, True)[0])
        np.testing.assert_allclose(layer(arm, same)[0], wanted, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["batch", "none"])
def test_both_lstms_learn(arm):
    s = settings("lstm", steps=60, log_every=30, learning_rates=(0.03,))
    losses = []
    compiled = train.compile_arm(s, networks.build(s, arm))
    train.train(s, compiled, digits(), lambda step, metrics, carry: losses.append(np.mean(metrics.val_loss)))
    assert losses[1] < losses[0] < 2.4  # ln 10 is that of guessing


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("ghost", {"ghost_batches": 7}, "ghost_batches"),
        ("ghost", {"ghost_batches": 2, "devices": 4, "statistics": "per_device"}, "multiple of `devices` where statis"),
        ("ghost", {"ghost_batches": 4, "devices": 6, "batch_size": 24}, "or divide them; got 4 and 6"),
        ("domains", {"domains": "digits"}, "inverted"),
        ("domains", {"model": "cnn", "widths": (4,)}, "MLP"),
        ("whiten", {"whiten_size": 7}, "whiten_size"),
        ("adapt", {"arms": ("batch", "none")}, "evaluations"),
        ("adapt", {"evaluations": ("running", "weighed")}, "model mlp; got weighed. Own and weighed need images"),
        ("weigh", {"evaluations": ("folded",)}, "model cnn; got folded"),
        ("lstm", {"evaluations": ("shifted",), "arms": ("batch",)}, "among running for model lstm; got shifted"),
        ("weigh", {"devices": 2}, "on one device"),
        ("lstm", {"widths": (4, 4)}, "widths"),
        ("renorm", {"r_max": 0.5}, "r_max"),
    ],
)
def test_settings_that_do_not_fit_are_refused(name, changes, words):
    with pytest.raises(ValueError, match=words):
        settings(name, **changes)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Return the page and the record in a folder of their own, and the list of the configs that ran, all made up."""
    ran, page, record = [], tmp_path / "page.md", tmp_path / "record.json"
    page.write_text("\n".join(variants.MARKS))
    monkeypatch.setattr(variants, "PAGE", page)
    monkeypatch.setattr(variants, "RECORD", record)
    monkeypatch.setattr(variants, "results", lambda name: {"new": [1.0]})
    monkeypatch.setattr(variants.command, "main", lambda given, _: ran.append(Path(given[0]).stem) or 0)
    return page, record, ran


def test_configs_that_are_named_run_again_and_the_record_keeps_the_others(table, capsys):
    page, record, ran = table
    known = variants.names()
    record.write_text(json.dumps({name: {"old": [0.5]} for name in known if name != "weigh"}))
    assert variants.main(["adapt"], Interrupt()) == 0
    assert ran == ["adapt", "weigh"]  # what the record lacks runs too
    found = json.loads(record.read_text())
    assert list(found) == known
    assert found == {name: {"new": [1.0]} if name in ran else {"old": [0.5]} for name in known}
    assert variants.table(found) in page.read_text()
    ran.clear()
    assert variants.main([], Interrupt()) == 0
    assert ran == known
    assert variants.main(["adapt", "adpat"], Interrupt()) == 2
    assert "must be one of adapt, " in (said := capsys.readouterr().err)
    assert "got adpat" in said


def test_a_variant_that_fails_ends_the_table_as_it_was(table, monkeypatch):
    page, record, _ = table
    monkeypatch.setattr(variants.command, "main", lambda *_: 130)
    before = page.read_text()
    assert variants.main([], Interrupt()) == 130
    assert page.read_text() == before
    assert not record.exists()
