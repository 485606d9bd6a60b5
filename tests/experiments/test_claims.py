"""The measurements of the claims: arms are paired, each seed has a split of its own, and finished parts are kept."""

import ast
import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.claims._lib import config, program, search, study, trained, values
from experiments.claims.learning_rates import measure as learning_rates
from experiments.training import data, layers
from experiments.training.models import gaussian, mlp

pytestmark = pytest.mark.usefixtures("ordinary_promotion")

ROOT = Path(__file__).parents[2]
CLAIMS = ROOT / "experiments" / "claims"
CONFIGS = config.load_all(CLAIMS)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Make a study of two seeds, and settings of four steps."""
    here = study.Study(data.digits(), smoke=False, folder=tmp_path_factory.mktemp("parts"))
    changes = {"widths": (4,), "seeds": 2, "steps": 4, "log_every": 2, "learning_rates": (1e-30, 0.1)}
    return here, here.settings(study.BASE, **changes)


def network(norm, seen=None):
    layer = layers.plain(jnp.tanh) if norm == "none" else layers.batch_norm(activation=jnp.tanh)

    def apply(params, state, x, run):
        if seen is not None and run.train:
            jax.debug.callback(lambda v: seen.append(np.array(v)), x)
        return layer.apply(params, state, x, run)

    return mlp([layers.Layer(layer.init, apply)], (4,), gaussian(0.3, he=False))


@pytest.mark.slow
def test_arms_share_weights_and_batches(tiny):
    """The input of the hidden layer is the batch times the first weights: with a learning rate that moves nothing it
    is the same in both arms at all steps, and differs between seeds and between steps."""
    here, s = tiny
    s = dataclasses.replace(s, learning_rates=(1e-30,))
    entered = {}
    for norm in ("none", "batch"):
        seen = []
        here.fit(s, network(norm, seen))
        jax.effects_barrier()
        entered[norm] = {v.tobytes() for v in seen}
        assert len(entered[norm]) == s.seeds * s.steps
    assert entered["none"] == entered["batch"]


def test_each_seed_may_have_a_split_of_its_own(tiny):
    """All at once the same numbers as one after the other, up to rounding in another order."""
    here, s = tiny
    splits = [data.digits(0), data.digits(1)]
    both = here.fit(s, network("batch"), data=splits)
    learned = here.learned(both, splits)
    for at, split in enumerate(splits):
        alone = here.fit(s, network("batch"), data=split)
        for name in ("train_loss", "val_loss", "val_accuracy", "test_accuracy"):
            found, expected = (getattr(done.log, name)[at] for done in (both, alone))
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(learned[at], here.learned(alone, split)[at], atol=1e-6)


def test_each_seed_has_weights_and_a_split_of_its_own(tiny):
    """A seed's results are those of its split alone, trained from its weights."""
    here, s = tiny
    here = dataclasses.replace(here, split=data.digits)

    def read(done):
        return {"end": jax.device_get(done.carry.params["kernels"][0])}

    found = search.results(here, s, lambda one: network("none"), read=read)
    assert found["test"].shape == found["validation_half"].shape == (2, 2)
    assert np.max(np.abs(found["end"][0, 0] - found["end"][1, 0])) > 0.1  # the rate moves nothing: initial weights
    one = dataclasses.replace(s, seeds=1)
    alone = here.fit(one, network("none"), data=data.digits(1), first_seed=1)
    # The first of two batch orders and the second differ, and a rate that moves nothing has none.
    np.testing.assert_allclose(found["end"][1, 0], alone.carry.params["kernels"][0][0, 0], rtol=1e-6)
    np.testing.assert_allclose(found["train"][1, 0], here.learned(alone, data.digits(1))[0, 0], atol=1e-6)


def test_a_run_is_tested_at_its_best_step_by_validation():
    flat = np.zeros((2, 3, 2))
    accuracy = flat.copy()
    log = trained.Log(np.array([1, 2]), flat, flat, accuracy, flat)
    accuracy[0, 1], accuracy[1, 1] = [0.95, 0.9], [0.9, 0.95]
    tests = flat.copy()
    tests[:, 1] = [[0.1, 0.2], [0.3, 0.4]]
    assert trained.tested(log._replace(test_accuracy=tests), 1).tolist() == [0.1, 0.4]


def test_a_finished_part_is_not_measured_again(tiny):
    here, _ = tiny
    calls = []

    def measure():
        calls.append(1)
        return {"number": np.float32(0.1), "none": None, "curve": np.arange(3), "never": math.inf, "name": "nan-like"}

    first = here.part("part", {"steps": 1}, measure)
    assert first == {"number": 0.1, "none": None, "curve": [0, 1, 2], "never": math.inf, "name": "nan-like"}
    assert here.part("part", {"steps": 1}, measure) == first
    assert len(calls) == 1
    others = [
        (here, {"steps": 2}),
        (dataclasses.replace(here, smoke=True), {"steps": 1}),
        (dataclasses.replace(here, source="other"), {"steps": 1}),
        (dataclasses.replace(here, data=data.digits(1)), {"steps": 1}),
    ]
    for number, (other, asked) in enumerate(others):
        other.part("part", asked, measure)
        assert len(calls) == number + 2  # anything else that it depends on makes it another part


@pytest.mark.parametrize("name", [c.name for c in CONFIGS])
def test_a_part_depends_on_all_that_measures_it(name):
    """All that a measurement imports, at any remove, is in the hash that its parts are kept under."""
    hashed, found = set(program.source_files(name)), set()
    todo = [CLAIMS / name / "measure.py"]
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("experiments"):
                for module in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                    there = ROOT / module.replace(".", "/")
                    todo += [p for p in (there.with_suffix(".py"), there / "__init__.py") if p.is_file()]
    assert len(found) > 10
    assert found <= hashed
    assert ROOT / "jaxbn" / "_core" / "batch_norm.py" in hashed


def test_only_the_code_that_measures_makes_another_program(tmp_path, monkeypatch):
    path, hashes = tmp_path / "measure.py", []
    monkeypatch.setattr(program, "source_files", lambda name: [path])
    for text in (
        "def f(x):\n    return x\n",
        'def f( x ):\n    """Return x."""\n    return x  # itself\n',
        "def f(x):\n    return 2 * x\n",
    ):
        path.write_text(text)
        hashes.append(program.source_hash("any"))
    assert hashes[0] == hashes[1] != hashes[2]


def test_what_a_part_was_asked():
    """A record holds the settings that differ from the config's, and all else in full."""
    given = CONFIGS[0].settings
    changed = dataclasses.replace(given, steps=7)
    network = learning_rates.Network(rates=slice(1, 2))
    asked = {"part": {"settings": changed, "network": network, "rates": (1.0, 2)}}
    assert values.differing(asked, given) == {
        "part": {
            "settings": {"steps": 7},
            "network": {"depth": 10, "rates": "slice(1, 2, None)", "batch_size": None},
            "rates": [1.0, 2],
        }
    }
