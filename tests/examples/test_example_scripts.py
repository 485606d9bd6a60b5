"""The examples run, and do what their docstrings say; each for some steps of a small network."""

import ast
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import accumulate
import crossq
import functional
import images
import jax
import jax.numpy as jnp
import lstm_lengths
import numpy as np
import optax
import pytest
import resnet_linen
import resnet_nnx
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

FOLDER = Path(resnet_linen.__file__).parent
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "images")
pytestmark = pytest.mark.usefixtures("ordinary_promotion")


def assert_equal(got, wanted):
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def assert_near(got, wanted, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), got, wanted)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_says_how_to_run_it_and_is_short(name):
    text = (FOLDER / f"{name}.py").read_text()
    docstring = ast.get_docstring(ast.parse(text)) or ""
    assert f"python examples/{name}.py" in docstring
    assert "EXPECTED" not in docstring
    assert 80 <= len(text.splitlines()) <= 160


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_from_the_command_line(name):
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--smoke"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_batches_are_an_epoch_each_and_the_same_again():
    data = images.Images(np.arange(10), np.arange(10) % 3)
    epochs = [np.concatenate([images.batch_at(data, e * 5 + i, 2).x for i in range(5)]) for e in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert list(epochs[0]) != list(epochs[1])
    assert_equal(images.batch_at(data, 7, 2), images.batch_at(data, 7, 2))
    assert [len(b.y) for b in images.batches(data, 4)] == [4, 4, 2]


@pytest.fixture(scope="module")
def linen_run():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return resnet_linen.main(resnet_linen.Config(smoke=True))


@pytest.mark.slow
def test_linen_on_eight_devices_is_as_on_one_and_survives_folding_and_export(linen_run):
    assert linen_run["state"].params["conv1"]["kernel"].sharding.num_devices == 8
    alone = resnet_linen.main(resnet_linen.Config(smoke=True, devices=1))
    np.testing.assert_allclose(linen_run["losses"], alone["losses"], rtol=1e-4)
    for name in ("params", "batch_stats", "ema"):
        assert_near(getattr(linen_run["state"], name), getattr(alone["state"], name), 2e-3)
    assert linen_run["difference, exported"] < 1e-4
    assert linen_run["test accuracy, exported"] == linen_run["test accuracy, averaged weights"]


@pytest.mark.slow
def test_linen_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(linen_run, tmp_path, monkeypatch):
    config = resnet_linen.Config(smoke=True, folder=tmp_path / "run")

    def interrupted(data, step, size):
        if step == 2:
            raise KeyboardInterrupt
        return images.batch_at(data, step, size)

    with monkeypatch.context() as patch:
        patch.setattr(resnet_linen, "batch_at", interrupted)
        with pytest.raises(KeyboardInterrupt):
            resnet_linen.main(config)
    resumed = resnet_linen.main(config)
    assert len(resumed["losses"]) == 1
    for name in ("step", "params", "batch_stats", "ema", "opt_state"):
        assert_equal(getattr(resumed["state"], name), getattr(linen_run["state"], name))


@pytest.mark.slow
def test_nnx_on_eight_devices_is_as_on_one_and_goes_on_from_a_checkpoint(tmp_path):
    config = resnet_nnx.Config(smoke=True, folder=tmp_path / "run")
    run, alone = resnet_nnx.main(config), resnet_nnx.main(resnet_nnx.Config(smoke=True, devices=1))
    assert run["training"].model.conv1.kernel[...].sharding.num_devices == 8
    np.testing.assert_allclose(run["losses"], alone["losses"], rtol=1e-4)
    assert run["difference, exported"] < 1e-4
    again = resnet_nnx.main(config)
    assert len(again["losses"]) == 0
    assert_equal(*(nnx.to_pure_dict(nnx.state(r["training"])) for r in (again, run)))


@pytest.mark.slow
def test_networks_under_vmap_are_trained_as_each_alone():
    config = functional.Config(smoke=True)
    found = functional.main(config)
    assert found["losses"].shape == (5, 4, 3)
    assert found["accuracies"].shape == (5, 4)
    data, test = (v._replace(x=v.x.reshape(len(v.y), -1)) for v in images.load_images())
    batches = jax.tree.map(lambda *v: np.stack(v), *(images.batch_at(data, i, 16) for i in range(3)))
    losses, accuracy = functional.train(jnp.int32(2), jnp.float32(0.1), batches, test, (data.x.shape[1], 8, 8, 10))
    np.testing.assert_allclose(found["losses"][2, 1], losses, rtol=1e-3)
    np.testing.assert_allclose(found["accuracies"][2, 1], accuracy, atol=2e-3)


def test_the_critic_is_compared_with_the_returns_of_rollouts():
    data = crossq.collect(20, 0)
    state, returns = data.following[:, :2].astype(np.float64), data.reward.astype(np.float64)
    for t in range(1, 300):
        action = -state @ crossq.K.T
        returns -= crossq.DISCOUNT**t * ((state**2).sum(1) + 0.1 * (action**2).sum(1))
        state = state @ crossq.A.T + action @ crossq.B.T
    np.testing.assert_allclose(crossq.true_values(data), returns, rtol=1e-5)


@pytest.mark.slow
def test_the_critic_learns_and_its_statistics_are_of_both_kinds_of_pairs():
    config = crossq.Config(steps=240, batch=64, width=16, transitions=500)
    joint, separate = crossq.main(config), crossq.main(crossq.Config(smoke=True, joint=False))
    assert joint["errors"][-1] < 0.8 * joint["errors"][0]
    assert int(joint["batch_stats"]["norm_0"]["count"]) == 240
    assert int(separate["batch_stats"]["norm_0"]["count"]) == 4
    data = crossq.collect(500, 0)
    both = np.concatenate([data.now, data.following]).mean(0) * (1 - 0.99**240)
    np.testing.assert_allclose(joint["batch_stats"]["norm_0"]["mean"], both, atol=0.02)
    assert abs(data.now.mean(0) - data.following.mean(0)).max() < 0.2  # else the mean says little
    spread = np.concatenate([data.now, data.following]).var(0)[2]
    assert abs(data.now.var(0)[2] / spread - 1) > 0.1  # the actions' spread differs between the two
    var = joint["batch_stats"]["norm_0"]["var"][2] - 0.99**240
    np.testing.assert_allclose(var / (1 - 0.99**240), spread, rtol=0.05)


@pytest.mark.slow
def test_accumulation_is_the_same_on_both_meshes_and_skips_steps_that_overflow():
    found = accumulate.main(accumulate.Config(smoke=True))
    np.testing.assert_allclose(found["Auto"]["losses"], found["Explicit"]["losses"], rtol=1e-2)
    assert found["Auto"]["skipped"] == found["Explicit"]["skipped"]
    assert 0 < found["Auto"]["skipped"] < 8


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_microbatches_stay_on_their_devices_and_make_one_update(kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    sharding = P("data") if kind is AxisType.Explicit else None
    x = np.random.default_rng(0).standard_normal((32, 2, 3, 1)).astype(np.float32)
    data = images.Images(x, np.arange(32, dtype=np.int32) % 10)
    model, optimizer = accumulate.Perceptron(8), optax.sgd(0.1)
    with jax.set_mesh(mesh):
        batch = jax.device_put(data, NamedSharding(mesh, P("data")))
        parts = jax.jit(lambda x: accumulate.split(x, 2, sharding))
        np.testing.assert_array_equal(parts(batch.x), np.stack([x[0::2], x[1::2]]))
        if kind is AxisType.Explicit:
            with pytest.raises(Exception, match="reshape is not supported"):
                jax.jit(lambda x: jnp.reshape(x, (2, 16, *x.shape[1:])))(batch.x)
        program = parts.lower(batch.x).compile().as_text()
        assert not any(name in program for name in ("all-to-all", "all-gather", "collective-permute"))

        variables = jax.jit(partial(model.init, train=False))(jax.random.key(0), x)
        start = (variables["params"], variables["batch_stats"], optimizer.init(variables["params"]))
        start = jax.device_put(start, NamedSharding(mesh, P()))

        @jax.jit
        def step(scale, batch):
            training = accumulate.Training(*start, scale, jnp.int32(0))
            return accumulate.train_step(training, batch, model, optimizer, 2, sharding)[0]

        fine, overflowed = step(jnp.float32(8), batch), step(jnp.float32(2.0**40), batch)
    assert_equal(jax.device_get(overflowed[:3]), jax.device_get(start))
    assert float(overflowed.scale) == 2.0**39
    # The first layer's inputs do not depend on how the batch is divided.
    whole_step = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))
    _, whole = whole_step(jax.device_get(variables), x)
    first = "BatchNorm_0"
    assert_near(jax.device_get(fine.batch_stats[first]), jax.device_get(whole["batch_stats"][first]), 1e-5)


def test_sequences_are_read_with_their_lengths(tmp_path):
    path = tmp_path / "some.ts"
    path.write_text("@classLabel true 1 2\n@data\n1,2,3:4,5,6:2\n7,8:9,10:1\n")
    found = lstm_lengths.read_ts(path)
    np.testing.assert_array_equal(found.x, [[[1, 4], [2, 5], [3, 6]], [[7, 9], [8, 10], [0, 0]]])
    assert (found.lengths.tolist(), found.y.tolist()) == ([3, 2], [1, 0])


@pytest.mark.slow
def test_the_lstm_does_not_see_padding():
    data = lstm_lengths.load_digit_rows()
    assert set(data[0].lengths) == {5, 6, 7, 8}

    def padded(s):
        beyond = np.arange(s.x.shape[1])[None, :, None] >= s.lengths[:, None, None]
        return s._replace(x=np.where(beyond, np.float32(1e6), s.x))

    config = lstm_lengths.Config(epochs=1, batch=150, hidden=8)
    plain, other = lstm_lengths.main(config, data), lstm_lengths.main(config, tuple(map(padded, data)))
    assert plain["losses"] == other["losses"]
    assert plain["accuracy"] == other["accuracy"]
    assert_equal(plain["batch_stats"], other["batch_stats"])
