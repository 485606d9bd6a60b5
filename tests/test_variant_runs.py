"""The trainer's arms and evaluations for the variants: each does what its name says."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from experiments import config, layers, networks, statistics, train
from experiments.data import digits

CONFIGS = Path(__file__).parent.parent / "configs" / "variants"
pytestmark = pytest.mark.usefixtures("ordinary_promotion")


def settings(name, **changes):
    small = {"steps": 10, "log_every": 5, "seeds": 2, "learning_rates": (0.1,)}
    return config.settings(dataclasses.asdict(config.load(CONFIGS / f"{name}.toml").settings) | small | changes, name)


@pytest.fixture(scope="module")
def accuracies():
    """Of all evaluations of one short training."""
    s = settings("adapt", evaluations=tuple(statistics.NAMES))
    arm = train.compile_arm(s, networks.build(s, "batch"))
    trained = train.train(s, arm, digits(), lambda *_: None)
    return statistics.accuracies(s, arm, trained.carry, digits())


@pytest.mark.slow
def test_evaluations(accuracies):
    assert list(accuracies) == list(statistics.NAMES)
    # A network without norms that classifies every image as the one with them does.
    assert accuracies["folded"] == accuracies["running"]
    # Ten steps of an average that keeps 0.9 are too few: the moments themselves are better.
    assert np.mean(accuracies["recalibrated"]) > np.mean(accuracies["running"])
    assert np.mean(accuracies["shifted"]) < np.mean(accuracies["running"])
    assert accuracies["adapted"] != accuracies["shifted"] != accuracies["shrunk"]


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
        ("domains", {"domains": "digits"}, "inverted"),
        ("domains", {"model": "cnn", "widths": (4,)}, "MLP"),
        ("whiten", {"whiten_size": 7}, "whiten_size"),
        ("adapt", {"arms": ("batch", "none")}, "evaluations"),
        ("lstm", {"widths": (4, 4)}, "widths"),
        ("renorm", {"r_max": 0.5}, "r_max"),
    ],
)
def test_settings_that_do_not_fit_are_refused(name, changes, words):
    with pytest.raises(ValueError, match=words):
        settings(name, **changes)
