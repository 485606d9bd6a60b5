"""Several processes that train together: how they find each other, agree, and end when one of them is gone."""

import ctypes
import dataclasses
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from experiments.training.saved import FOLDER, numbers

HEARTBEAT = 15  # seconds without a sign of life after which a process counts as gone
LOST = 3  # the exit code of a process that another one left alone
WORKER = "JAXBN_WORKER"  # set in the environment of the process that computes
FLAGS = ("--coordinator", "--cluster")
CAUSES = (
    (r"stopped sending heartbeats\):\s*((?:\d+\s*)+)", "process {} is gone"),
    (r"(leader task|Socket closed)", "process 0, which coordinates, is gone"),
    (r"(Gloo|NCCL|Connection)", "another process is gone"),
)


def several(arguments: list[str]) -> bool:
    """Return whether a command line or the environment asks for several processes."""
    named = any(argument.split("=")[0] in FLAGS for argument in arguments)
    return named or "JAX_COORDINATOR_ADDRESS" in os.environ


@dataclasses.dataclass(frozen=True)
class Together:
    """The processes that train together, as a command line says it.

    Attributes:
        coordinator: host and port of process 0, where several processes train together; by default
            JAX_COORDINATOR_ADDRESS.
        processes: how many there are; by default JAX_NUM_PROCESSES.
        process: which of them this is, from 0; by default JAX_PROCESS_ID.
        cluster: `auto`, or a cluster that JAX knows (slurm, ompi, k8s, ...), whose environment says the three above.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    cluster: str | None = None


def initialize(given: Together, devices: int) -> None:
    """Join the other processes, before JAX starts; on the CPU each simulates its share of the `devices`.

    Raises:
        ValueError: something is missing, or the others cannot be reached.
    """
    import jax

    from experiments.training import parallel

    coordinator, count, index = given.coordinator, given.processes, given.process
    if given.cluster is None:
        coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
        count = int(os.environ.get("JAX_NUM_PROCESSES", 0)) if count is None else count
        index = int(os.environ.get("JAX_PROCESS_ID", -1)) if index is None else index
        if not coordinator or count < 1 or not 0 <= index < count:
            raise ValueError(
                "several processes need `--coordinator HOST:PORT --processes N --process I`, or "
                f"JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID, "
                f"I from 0 to N - 1; got {coordinator}, {count}, {index}."
            )
        if devices % count:
            raise ValueError(f"`devices` must be a multiple of the {count} processes; got {devices}.")
        parallel.simulate_devices(devices // count)
    # JAX would take SIGTERM for itself; here it is a wish to stop, as on one process.
    jax.config.update("jax_enable_preemption_service", False)
    method = None if given.cluster == "auto" else given.cluster
    try:
        jax.distributed.initialize(
            coordinator,
            count or None,
            index,
            cluster_detection_method=method,
            heartbeat_timeout_seconds=HEARTBEAT,
            initialization_timeout=60,
        )
    except (RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"the processes must reach each other through {coordinator or method}; {said}.") from None


def first() -> bool:
    """Return whether this process writes; one does."""
    import jax

    return jax.process_index() == 0


def any_of(flag: bool) -> bool:
    """Return whether `flag` is true in any process, the same in all of them."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def supervise(arguments: list[str]) -> int:
    """Compute in a process of its own, which JAX aborts when another one is gone; say what happened and how to go on.

    Returns:
        The exit code: that of the process, or `LOST`.
    """

    def end_with_me() -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing computes on without its starter

    command = [sys.executable, *(f"-W{w}" for w in sys.warnoptions), "-m", "experiments", *arguments]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both
    worker = subprocess.Popen(
        command,
        env=os.environ | {WORKER: "1"},
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        preexec_fn=end_with_me,
    )
    signal.signal(signal.SIGTERM, lambda number, _: worker.send_signal(number))
    said: list[str] = []
    assert worker.stderr is not None
    with worker.stderr as lines:
        for line in lines:
            said = [*said[-200:], line]
            if not re.match(r"[EF]\d{4} |    @ |\*\*\* |\[Gloo\]|LOST ", line):
                sys.stderr.write(line)
                sys.stderr.flush()
    code = worker.wait()
    if code not in (-signal.SIGABRT, LOST):
        return 128 - code if code < 0 else code
    text, cause = "".join(said), "JAX ended this process"
    for pattern, words in CAUSES:
        if found := re.search(pattern, text):
            cause = words.format(", ".join(found[1].split()))
            break
    # A broken connection does not say whose it was; of two processes it was the other's.
    if cause.startswith("another") and (found := re.search(r"^Process ([01]) of 2,", text, re.MULTILINE)):
        cause = f"process {1 - int(found[1])} is gone"
    print(f"Error: {cause}, and the others cannot go on without it. {_remedy(text)}", file=sys.stderr)
    return LOST


def _remedy(text: str) -> str:
    """Say from which checkpoint to go on; the worker has said where it writes."""
    found = re.search(r"^Process \d+ of \d+, writing to (.*)\.$", text, re.MULTILINE)
    there = numbers(Path(found[1])) if found else []
    if not found or not there:
        return "There is no checkpoint yet: start all of them again with `--replace`."
    return f"Start all of them again with `--resume`, from {Path(found[1]) / FOLDER / str(there[-1])}."
