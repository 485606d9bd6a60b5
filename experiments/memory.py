"""Memory that a run cannot do without, compared with what there is before anything is computed."""

import math
import os
from pathlib import Path
from typing import Any

import jax

from experiments.training import networks, train
from experiments.training.config import Settings

MEMINFO, LIMIT = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")


def require(settings: Settings) -> None:
    """Check that there is as much memory as a run cannot do without.

    Raises:
        ValueError: there is less.
    """
    need = max(needed(settings, norm) for norm in settings.arms)
    there = available()
    if there is not None and need > there:
        raise ValueError(
            f"the weights, their gradients and the optimizer's state must fit into memory; {settings.seeds} seeds at "
            f"{len(settings.learning_rates)} learning rates of a network of widths {list(settings.widths)} on "
            f"{settings.devices} devices need {_gigabytes(need)} at least, and there are {_gigabytes(there)}. Take "
            "smaller `widths`, or fewer `seeds` or `learning_rates`."
        )


def needed(settings: Settings, norm: str) -> int:
    """A lower bound on the bytes that training an arm takes: on all devices if they are a CPU's, else on each."""
    # Each seed's examples of a chunk are among it, two words each: where they stand, and the order they come from.
    order = 8 * settings.seeds * settings.log_every * settings.batch_size
    carry: train.Carry = jax.eval_shape(train.compile_arm(settings, networks.build(settings, norm)).start)
    each = 2 * _bytes(carry.params) + _bytes(carry.optimizer)  # twice: the gradients
    return order + each * (settings.devices if jax.default_backend() == "cpu" else 1)


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def available() -> int | None:
    """The bytes that can be had: on a device, or where devices are a CPU's of the machine; None if nobody knows."""
    if stats := jax.devices()[0].memory_stats():
        return stats.get("bytes_limit")
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    if MEMINFO.is_file():
        found += [1024 * int(line.split()[1]) for line in MEMINFO.read_text().splitlines() if "MemAvailable" in line]
    if LIMIT.is_file() and (limit := LIMIT.read_text().strip()).isdecimal():
        found.append(int(limit))
    return min(found)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"
