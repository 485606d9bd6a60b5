"""Several processes over gloo on one machine: they train as one does, and end together."""

import json
import os
import re
import signal
import socket
import subprocess
import time

import numpy as np
import pytest
from training_runs import finish, last_carry, start

from experiments.training import processes, record

GIVEN = ("--steps", "20", "--devices", "4", "--last-batch", "pad", "--batch-size", "100", "--optimizer", "momentum")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def together(folder, n, *more):
    """Start `n` processes of one run: the first by flags, the others by the environment."""
    address = f"127.0.0.1:{free_port()}"
    flags = ("--coordinator", address, "--processes", str(n), "--process", "0")
    known = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(n)}
    others = [start(folder, *more, environment=known | {"JAX_PROCESS_ID": str(i)}) for i in range(1, n)]
    return [start(folder, *more, *flags), *others]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return the folder of a run by one process with four devices."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    printed, codes = finish(start(folder, *GIVEN))
    assert codes == [0], printed
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_several_processes_train_as_one_does(n, alone, tmp_path):
    """Each feeds its own part of every batch, the last of an epoch padded; the first alone writes."""
    printed, codes = finish(*together(tmp_path / "run", n, *GIVEN))
    assert codes == [0] * n, printed
    for a, b in zip(last_carry(tmp_path / "run"), last_carry(alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    mine, theirs = (record.read(f / record.LOG) for f in (tmp_path / "run", alone))
    assert len(mine) == len(theirs) == 8
    for a, b in zip(mine, theirs, strict=True):
        assert (a["step"], a["seed"]) == (b["step"], b["seed"])
        for name in ("train_loss", "val_loss", "val_accuracy"):
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-6)
    ran = json.loads((tmp_path / "run" / "config.json").read_text())
    assert ran["hardware"]["processes"] == n
    tested = [
        json.loads((f / "summary.json").read_text())["arms"][0]["test_accuracy"] for f in (tmp_path / "run", alone)
    ]
    assert tested[0] == pytest.approx(tested[1])
    assert sum("Written to" in text for text in printed) == 1


def slurm(job, i):
    """Return what `srun` sets for task `i` of two on this machine."""
    counts = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "localhost"}
    return counts | {"SLURM_JOB_ID": str(job), "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}


def open_mpi(job, i):
    """Return what `mpirun -n 2` sets for rank `i`."""
    ranks = {"OMPI_COMM_WORLD_RANK": str(i), "OMPI_COMM_WORLD_LOCAL_RANK": str(i), "OMPI_COMM_WORLD_SIZE": "2"}
    return ranks | {"OMPI_MCA_orte_hnp_uri": f"{job * 2**12}.0;tcp://127.0.0.1:1"}


@pytest.mark.slow
@pytest.mark.parametrize("cluster", [slurm, open_mpi])
def test_a_cluster_says_who_takes_part(cluster, tmp_path):
    """JAX reads the environment of the launcher; the port follows from the number of the job."""
    job, given = free_port() % 2**12, (*GIVEN, "--devices", "2", "--cluster", "auto")
    started = [start(tmp_path / "run", *given, environment=cluster(job, i)) for i in range(2)]
    printed, codes = finish(*started)
    assert codes == [0, 0], printed
    assert json.loads((tmp_path / "run" / "config.json").read_text())["hardware"]["processes"] == 2


def workers(started):
    """Return the process that computes, of each that was started."""
    found = []
    for p in started:
        listed = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(p.pid)], capture_output=True, text=True
        ).stdout.split()
        found.append(int(listed[0]))
    return found


def wait_for(path, seconds=240):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("gone", [0, 1])
def test_when_one_process_dies_the_others_say_so_and_end(gone, tmp_path):
    """Within 60 seconds, with the cause and the checkpoint to resume from; and the run is resumed by one process."""
    folder = tmp_path / "run"
    started = together(folder, 2, *GIVEN[2:], "--steps", "1000000", "--checkpoint-every", "50")
    try:
        wait_for(folder / "checkpoints" / "50")
        os.kill(workers(started)[gone], signal.SIGKILL)
        began = time.monotonic()
        printed, codes = finish(*started, timeout=60)
    finally:
        for p in started:
            p.kill()
    assert time.monotonic() - began < 60
    assert codes[1 - gone] == processes.LOST, printed
    said = printed[1 - gone]
    assert f"process {gone}" in re.search("Error: (.*)", said)[1], said
    last = max(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdecimal())
    assert f"with `--resume`, from {folder / 'checkpoints' / str(last)}." in " ".join(said.split())
    assert "Traceback" not in said


@pytest.mark.slow
def test_all_stop_when_one_is_asked_to(tmp_path):
    """They stop after the same chunk, with a checkpoint of it."""
    folder = tmp_path / "run"
    started = together(folder, 2, *GIVEN[2:], "--steps", "1000000", "--checkpoint-every", "50")
    wait_for(folder / "checkpoints" / "50")
    started[1].send_signal(signal.SIGTERM)
    printed, codes = finish(*started, timeout=120)
    assert codes == [130, 130], printed
    steps = {row["step"] for row in record.read(folder / record.LOG)}
    assert (folder / "checkpoints" / str(max(steps))).is_dir()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            ("--coordinator", "127.0.0.1:1"),
            "several processes need `--coordinator HOST:PORT --processes N --process I`",
        ),
        (("--coordinator", "127.0.0.1:1", "--processes", "2", "--process", "2"), "I from 0 to N - 1"),
        (("--coordinator", "127.0.0.1:1", "--processes", "3", "--process", "0"), "a multiple of the 3 processes"),
    ],
    ids=str,
)
def test_what_is_missing_is_one_line(more, words, tmp_path, capsys):
    """It is said before any process waits for another."""
    from training_runs import SMALL

    from experiments.interrupt import Interrupt
    from experiments.training import command

    assert command.main([*SMALL, "--out", str(tmp_path / "run"), *more], Interrupt()) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()
