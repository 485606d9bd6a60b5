"""Measure claims, as many at a time as there are cores, and write a record of each."""

import contextlib
import dataclasses
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import disk
from experiments.claims._lib import judged, program, study
from experiments.claims._lib.config import ClaimConfig
from experiments.claims._lib.values import differing, numbers, plain
from experiments.interrupt import SIGNALS, Interrupt
from experiments.training import record

# Two claims on a core each are done sooner than one after the other on both.
ONE_CORE = "--xla_cpu_multi_thread_eigen=false"
_stopped: Callable[[], bool] = bool


def measure(
    wanted: list[ClaimConfig], conditions: study.Study, name: str, kept: Path, former: Path, interrupt: Interrupt
) -> bool:
    """Measure the claims `wanted`, that which took longest before others; return False if interrupted.

    `name` is that of the data; records go to `kept`, and those of a former measurement are in `former`.
    """
    todo = sorted(wanted, key=lambda config: _former(former, config).get("seconds", math.inf), reverse=True)
    with Console().status("starting") as status, _workers(len(todo), interrupt) as (pool, stop):
        # A process that begins would hear Ctrl-C before it knows not to; its parent hears it a moment later.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        running = {pool.submit(measure_one, config, conditions, name, kept, former): config.name for config in todo}
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        done: set[Future[bool]] = set()
        while len(done) < len(running):
            done, going = wait(running, timeout=0.5, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()  # an error ends all
            if interrupt.requested:
                stop()
            parts = sum(1 for _ in conditions.folder.glob("*.json"))
            now = ", ".join(sorted(running[future] for future in going if future.running()))
            status.update(f"{len(done)} of {len(todo)} claims and {parts} parts done; at work: {now}")
    return all(future.result() for future in running)


def measure_one(config: ClaimConfig, conditions: study.Study, name: str, kept: Path, former: Path) -> bool:
    """Measure a claim, and write its record; return False if interrupted."""

    def tick() -> None:
        if _stopped():
            raise study.StoppedError

    own: dict[str, Any] = {"source": program.source_hash(config.name), "tick": tick, "seconds": {}, "asked": {}}
    here = dataclasses.replace(conditions, **own)
    try:
        measured = judged.module(config, "measure").measure(here, config.settings)
    except study.StoppedError:
        return False
    made = {
        "data": name,
        "smoke": here.smoke,
        "seconds": sum(here.seconds.values()),
        "versions": record.versions(),
        "hardware": record.hardware(),
        "program": here.source,
        "settings": dataclasses.asdict(config.settings),
        "asked": differing(here.asked, config.settings),
        "measured": measured,
    }
    made = plain(made)
    made["first"] = judged.judge(config, numbers(made)).outcome()
    if name == "digits" and not here.smoke:  # the outcome by the first rule stays beside those by later ones
        made["first"] = _former(former, config).get("first", made["first"])
    (kept / config.name).mkdir(parents=True, exist_ok=True)
    disk.write_checked(kept / config.name / judged.RESULT, plain(made))
    return True


def _former(folder: Path, config: ClaimConfig) -> dict[str, Any]:
    path = folder / config.name / judged.RESULT
    return disk.read_checked(path, judged.REMEDY) if path.is_file() else {}


@contextlib.contextmanager
def _workers(claims: int, interrupt: Interrupt) -> Iterator[tuple[Executor, Callable[[], object]]]:
    """Start a process for each core, or a thread for one claim; and give what stops them."""
    count = min(claims, os.cpu_count() or 1)
    if count == 1:
        pool: Executor = ThreadPoolExecutor(1, initializer=_begin, initargs=(lambda: interrupt.requested,))
        stop: Callable[[], object] = bool
    else:
        spawn = multiprocessing.get_context("spawn")  # JAX does not survive a fork
        event = spawn.Event()
        pool, stop = ProcessPoolExecutor(count, spawn, _begin_process, (event,)), event.set
    try:
        yield pool, stop
    finally:
        stop()
        pool.shutdown(cancel_futures=True)


def _begin(stopped: Callable[[], bool]) -> None:
    global _stopped
    _stopped = stopped


def _begin_process(stop: Event) -> None:
    """Begin a process: Ctrl-C is for its parent, and it ends if that is killed; a file is whole whenever it does."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {ONE_CORE}"
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    _begin(stop.is_set)


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)
