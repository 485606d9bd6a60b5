"""Checkpoints: a run that is killed ends as one that is not; what cannot be resumed from is refused by name."""

import gc
import json
import random
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from training_runs import SMALL, finish, last_carry, start

from experiments.interrupt import Interrupt
from experiments.training import command, networks, record, train
from experiments.training.checkpoint import Checkpoints
from experiments.training.saved import numbers


def run(folder, *more):
    return command.main([*SMALL, "--steps", "20", "--out", str(folder), *more], Interrupt())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of a whole run of 20 steps on two devices."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert run(folder) == 0
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """Copy it, so that the last checkpoint is that of step 10."""
    shutil.copytree(finished, tmp_path / "run")
    for number in (15, 20):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(number))
    return tmp_path / "run"


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "steps"), [(2, 150), (20, 1500)])
def test_a_run_that_is_killed_ends_as_one_that_is_not(kills, steps, tmp_path):
    """The log, the parameters, the running statistics and the optimizer's state are equal to the bit."""
    rng, given = random.Random(0), ("--steps", str(steps), "--optimizer", "momentum")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    printed, codes = finish(start(whole, *given))
    assert codes == [0], printed
    alive = 0
    for _ in range(kills):
        process = start(killed, *given, *(["--resume"] if numbers(killed) else ["--replace"]))
        began = time.monotonic()
        log, before = killed / record.LOG, (killed / record.LOG).stat().st_mtime_ns if numbers(killed) else 0
        while time.monotonic() < began + 120 and process.poll() is None:
            if log.exists() and log.stat().st_mtime_ns != before:
                break
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1.5))
        alive += process.poll() is None
        process.kill()
        process.communicate()
    assert alive >= kills / 2  # else nothing was tested
    printed, codes = finish(start(killed, *given, "--resume" if numbers(killed) else "--replace"))
    assert codes == [0], printed
    assert (killed / record.LOG).read_bytes() == (whole / record.LOG).read_bytes()
    for a, b in zip(last_carry(killed), last_carry(whole), strict=True):
        np.testing.assert_array_equal(a, b)
    summaries = [json.loads((f / "summary.json").read_text()) for f in (killed, whole)]
    assert summaries[0]["arms"][0]["test_accuracy"] == summaries[1]["arms"][0]["test_accuracy"]


@pytest.mark.parametrize(
    "more",
    [
        ("--devices", "1", "--way", "jit"),
        pytest.param(("--devices", "4"), marks=pytest.mark.slow),
        pytest.param(("--devices", "8", "--groups", "2"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_a_run_goes_on_with_other_devices(more, copied, finished):
    """The result is that of a run without interruption, to rounding."""
    assert run(copied, "--resume", *more) == 0
    for a, b in zip(last_carry(copied), last_carry(finished), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    steps = [row["step"] for row in record.read(copied / record.LOG)]
    assert steps == [row["step"] for row in record.read(finished / record.LOG)]


def test_the_last_checkpoints_are_kept(finished):
    assert numbers(finished) == [10, 15, 20]


# Of an array that cannot be read, the reader leaves the reads of others to the garbage collector, which warns.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["flip", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("half", "gone"))])
def test_a_damaged_checkpoint_is_refused_by_name_or_restored_exactly(damage, finished, tmp_path):
    """Each file of it; the one before is offered."""
    shutil.copytree(finished, tmp_path / "run")
    folder, refused = tmp_path / "run", {}
    s = command.parse(list(SMALL))[0].settings
    shapes = train.compile_arm(s, networks.build(s, "batch")).shapes()
    identity = record.identity(folder)
    with Checkpoints(finished, identity, 3) as checkpoints:
        wanted = jax.tree.leaves(checkpoints.restore(20, shapes))
    for path in sorted(p for p in (folder / "checkpoints" / "20").rglob("*") if p.is_file()):
        raw = path.read_bytes()
        half = len(raw) // 2
        if damage == "gone":
            path.unlink()
        else:
            path.write_bytes(
                raw[:half] if damage == "half" else raw[:half] + bytes([raw[half] ^ 255]) + raw[half + 1 :]
            )
        try:
            with Checkpoints(folder, identity, 3) as checkpoints:
                assert checkpoints.record(20)["step"] == 20
                for a, b in zip(jax.tree.leaves(checkpoints.restore(20, shapes)), wanted, strict=True):
                    np.testing.assert_array_equal(a, b)  # nothing is read from this file
        except ValueError as error:
            refused[path.name] = str(error)
        path.write_bytes(raw)
    gc.collect()
    assert len(refused) >= 3
    assert "manifest.ocdbt" in refused
    for said in refused.values():
        assert f"{folder / 'checkpoints' / '20'} " in said
        assert "Pass `--resume --checkpoint 15` to go on from the one before" in said


def test_the_one_before_goes_on_and_what_is_later_is_set_aside(copied, finished, capsys):
    shutil.copytree(finished / "checkpoints" / "15", copied / "checkpoints" / "15")
    for path in (copied / "checkpoints" / "15" / "carry" / "d").iterdir():
        path.write_text("damaged")
    before = sorted(copied.rglob("*"))
    assert run(copied, "--resume") == 2
    said = capsys.readouterr().err
    assert "Pass `--resume --checkpoint 10` to go on from the one before" in said
    assert said.count("\n") == 1
    assert sorted(copied.rglob("*")) == before
    assert run(copied, "--resume", "--checkpoint", "10") == 0
    for a, b in zip(last_carry(copied), last_carry(finished), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [p.name for p in (copied / "set_aside").iterdir()] == ["15"]


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_checkpoint_of_another_run_is_refused(finished, copied, capsys):
    shutil.copytree(finished / "checkpoints" / "15", copied / "checkpoints" / "15")
    edit_config(copied, run="another")
    assert run(copied, "--resume") == 2
    said = capsys.readouterr().err
    assert "is of another run" in said
    assert "--checkpoint 10" in said


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--resume", "--batch-size", "32"), "needs the settings that"),
        (("--resume", "--checkpoint", "7"), "holds no 7, but 10"),
        (("--resume", "--replace"), "exclude each other"),
        (("--checkpoint", "5"), "pass `--resume`, too"),
        (("--checkpoint-every", "7"), "a multiple of `log_every`"),
        (("--keep", "0"), "must be 1 at least"),
        ((), "Pass `--replace`"),
    ],
    ids=str,
)
def test_what_cannot_be_resumed_is_one_line(more, words, copied, capsys):
    before = {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()}
    assert run(copied, *more) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()} == before


def test_nothing_is_resumed_where_nothing_is(tmp_path, capsys):
    assert run(tmp_path / "new", "--resume") == 2
    assert "needs a checkpoint" in capsys.readouterr().err


def test_a_run_with_statistics_for_each_device_keeps_its_devices(copied, capsys):
    settings = json.loads((copied / "config.json").read_text())["settings"]
    edit_config(copied, settings=settings | {"statistics": "per_device"})
    assert run(copied, "--statistics", "per_device", "--resume", "--devices", "4") == 2
    assert "devices was 2, and is 4" in capsys.readouterr().err


def test_an_interrupted_run_goes_on(tmp_path, finished):
    """It continues from the step at which it stopped."""

    class Soon(Interrupt):
        asked = 0

        @property
        def requested(self):
            self.asked += 1
            return self.asked > 3

    folder = tmp_path / "run"
    assert command.main([*SMALL, "--steps", "20", "--out", str(folder)], Soon()) == 130
    steps = numbers(folder)[-1]
    assert 0 < steps < 20
    assert run(folder, "--resume") == 0
    assert (folder / record.LOG).read_bytes() == (finished / record.LOG).read_bytes()
    assert Path(folder / "summary.json").is_file()


def test_a_run_goes_on_with_the_next_arm(tmp_path):
    """The second arm starts from its own weights after the last checkpoint of the first."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    given = ("--arms", "none", "batch", "--steps", "10", "--keep", "9")
    assert run(whole, *given) == 0
    shutil.copytree(whole, cut)
    for number in numbers(cut)[2:]:
        shutil.rmtree(cut / "checkpoints" / str(number))
    assert run(cut, *given, "--resume") == 0
    assert (cut / record.LOG).read_bytes() == (whole / record.LOG).read_bytes()


def test_a_checkpoint_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    """The disk is full."""
    import orbax.checkpoint as ocp

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    assert run(tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert said.count("\n") == 1
