"""A run reports gaps between statistics, TensorBoard events, and runs side by side."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_runs import SMALL, digits, tiny

from experiments.interrupt import Interrupt
from experiments.training import command, compare, networks, observe, record, train


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs, of 10 and 20 steps; the second writes for TensorBoard."""
    folder = tmp_path_factory.mktemp("runs")
    for name, more in (("short", ["--steps", "10"]), ("long", ["--steps", "20", "--tensorboard"])):
        assert command.main([*SMALL, "--out", str(folder / name), *more], Interrupt()) == 0
    return folder


def test_a_gap_is_the_distance_of_the_means_in_running_standard_deviations():
    """Computed by hand for the first layer; 0 where the running statistics are those of the batch."""
    s = tiny(way="jit", devices=1, learning_rates=(0.1,))
    model = networks.build(s, "batch")
    arm = train.compile_arm(s, model)
    carry = train.train(s, arm, digits(), lambda *_: None).carry
    gaps = observe.gauge(s, "batch", digits())
    probe = digits().validation.images[: observe.PROBED]
    found = gaps(carry)
    assert list(found) == ["0"]
    for seed in range(2):
        entering = probe @ np.asarray(carry.params["kernels"][0][seed, 0])
        mean, var = (np.asarray(getattr(carry.state[0], f)[seed, 0]) for f in ("mean", "var"))
        wanted = np.sqrt(np.mean((entering.mean(0) - mean) ** 2 / (var + 1e-5)))
        assert found["0"][seed, 0] == pytest.approx(wanted, rel=1e-4)
        assert wanted > 0.01
    exact = dataclasses.replace(s, bn_momentum=0.0)
    apply = networks.build(exact, "batch").apply
    renewed = jax.vmap(jax.vmap(lambda p, st: apply(p, st, jnp.asarray(probe), True, None)[1]))(
        carry.params, carry.state
    )
    assert np.max(gaps(carry._replace(state=renewed))["0"]) < 1e-4


@pytest.mark.parametrize(
    ("changes", "arm", "layers"),
    [
        ({"statistics": "per_device", "devices": 2}, "batch", 1),
        ({"model": "lstm", "widths": (4,)}, "batch", 3),
        ({"model": "cnn", "widths": (4, 4)}, "renorm", 2),
        ({"arms": ("ghost",), "ghost_batches": 8}, "ghost", 1),
    ],
)
def test_every_network_with_running_statistics_has_a_gauge(changes, arm, layers):
    s = tiny(**{"devices": 1, "learning_rates": (0.1,)} | changes)
    carry = train.compile_arm(s, networks.build(s, arm)).start()
    found = observe.gauge(s, arm, digits())(carry)
    assert len(found) == layers
    assert all(np.shape(v) == (2, 1) and np.all(np.isfinite(v)) for v in found.values())


def test_networks_without_running_statistics_have_none():
    assert observe.gauge(tiny(), "none", digits()) is None
    assert observe.gauge(tiny(model="cnn", widths=(4,)), "group", digits()) is None


def test_the_log_has_the_gaps(runs):
    rows = record.read(runs / "short" / record.LOG)
    assert all(list(row["gaps"]) == ["0", "1", "2"][:1] for row in rows)
    assert all(0 < row["gaps"]["0"] < 100 for row in rows)


def test_tensorboard_is_written_on_request(runs):
    assert not (runs / "short" / "tensorboard").exists()
    (events,) = (runs / "long" / "tensorboard").iterdir()
    raw = events.read_bytes()
    for name in (
        "val_accuracy/batch_rate_0.3",
        "gap/0/batch_rate_0.3",
        "steps_per_second/batch",
        "memory_bytes/batch",
    ):
        assert name.encode() in raw


def test_runs_are_drawn_together_and_tabulated(runs, tmp_path, capsys):
    """A row for each arm of each run, with the settings that differ."""
    out = tmp_path / "both.png"
    assert compare.main([str(runs / "short"), str(runs / "long"), "--out", str(out)]) == 0
    assert out.read_bytes()[:4] == b"\x89PNG"
    head, _, *rows = capsys.readouterr().out.splitlines()[:4]
    assert head.startswith("| run | steps | arm | rate | n |")
    assert [row.split(" | ")[0] for row in rows] == ["| short", "| long"]
    assert [row.split(" | ")[1] for row in rows] == ["10", "20"]
    for name, row in zip(("short", "long"), rows, strict=True):
        accuracies = [r["val_accuracy"] for r in record.read(runs / name / record.LOG)][-2:]
        assert f"{100 * np.median(accuracies):.1f} (" in row


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda f: None, "config.json must be a file that can be read"),
        (lambda f: (f / "config.json").write_text("{}"), "is of none"),
        (
            lambda f: (f / "config.json").write_text('{"claim":1,"settings":{},"versions":1,"hardware":1}'),
            "logged something",
        ),
    ],
)
def test_a_folder_without_a_run_is_one_line(write, words, tmp_path, capsys):
    write(tmp_path)
    assert compare.main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not (tmp_path.parent / "comparison.png").exists()
