"""Memory that a run cannot do without, compared with what there is before anything is computed."""

import math
import os
from pathlib import Path
from typing import Any

import jax

from experiments.training import networks, train
from experiments.training.config import Settings
from experiments.training.data import Data

MEMINFO, LIMIT = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")


def require(settings: Settings, data: Data) -> None:
    """Raise ValueError if there is less memory than a run cannot do without."""
    need = max(needed(settings, norm, data) for norm in settings.arms)
    there = available()
    if there is not None and need > there:
        raise ValueError(
            f"the weights, their gradients and the optimizer's state must fit into memory; {settings.seeds} seeds at "
            f"{len(settings.learning_rates)} learning rates of a network of widths {list(settings.widths)} on "
            f"{settings.devices} devices need {_gigabytes(need)} at least, and there are {_gigabytes(there)}. Take "
            "smaller `widths`, fewer `seeds` or `learning_rates`, or a smaller `log_every`."
        )


def needed(settings: Settings, norm: str, data: Data) -> int:
    """Return a lower bound on the bytes that an arm takes: on all devices if they are a CPU's, else on each."""
    chunk = 4 * settings.seeds * settings.log_every * settings.batch_size * (data.pixels + 1)  # of examples and labels
    # Which takes more than there is where nothing of it can be known without making it.
    if chunk > 1 << 50:
        return chunk
    carry = train.compile_arm(settings, networks.build(settings, norm, data)).shapes()
    each = 2 * _bytes(carry.params) + _bytes(carry.optimizer)  # twice: the gradients
    on_cpu = jax.default_backend() == "cpu"
    return chunk // (1 if on_cpu else settings.devices) + each * (settings.devices if on_cpu else 1)


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def available() -> int | None:
    """Return the bytes available on a device, or on the machine where devices are its CPU's; None if unknown."""
    if stats := jax.local_devices()[0].memory_stats():
        return stats.get("bytes_limit")
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    if MEMINFO.is_file():
        found += [1024 * int(line.split()[1]) for line in MEMINFO.read_text().splitlines() if "MemAvailable" in line]
    if LIMIT.is_file() and (limit := LIMIT.read_text().strip()).isdecimal():
        found.append(int(limit))
    return min(found)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"
