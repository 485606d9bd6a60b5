"""Measurements while a run trains: speed, memory, and how far each norm's statistics are apart."""

import contextlib
import dataclasses
import json
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from experiments import disk
from experiments.training import networks, parallel, processes
from experiments.training.config import Settings
from experiments.training.data import Data, read
from experiments.training.shapes import Tree
from experiments.training.train import Carry, Metrics

SPEED = "performance.jsonl"
PROBED = 256  # validation images, by which the gaps are measured
Gaps = dict[str, Any]  # of each layer, `[seeds, rates]`


@contextlib.contextmanager
def open_logs(folder: Path, s: Settings, *, tensorboard: bool) -> Iterator[Callable[..., None]]:
    """Give a function that writes a chunk's speed and memory; on request also its metrics and gaps, to TensorBoard.

    Only the first process writes.
    """
    with contextlib.ExitStack() as opened:
        board: Any = None
        if tensorboard and processes.first():
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise ValueError(
                    "`--tensorboard` needs the package tensorboardX; run `pip install tensorboardX`."
                ) from None
            board = opened.enter_context(SummaryWriter(str(folder / "tensorboard")))

        def write(arm: str, step: int, seconds: float, metrics: Metrics, gaps: Gaps) -> None:
            speed = s.log_every / seconds
            found = {"steps_per_second": speed, "examples_per_second": speed * s.batch_size, "memory_bytes": memory()}
            if processes.first():
                line = {"arm": arm, "step": step, "seconds": seconds} | found
                disk.append(folder / SPEED, json.dumps(line) + "\n")
            if board is None:
                return
            for name, value in found.items():
                board.add_scalar(f"{name}/{arm}", value, step)
            for name, values in (metrics._asdict() | {f"gap/{layer}": gap for layer, gap in gaps.items()}).items():
                for at, rate in enumerate(s.learning_rates):
                    board.add_scalar(f"{name}/{arm}_rate_{rate:g}", float(np.median(values[:, at])), step)

        yield write


def gauge(settings: Settings, arm: str, data: Data) -> Callable[[Carry], Gaps] | None:
    """Return a function that measures, for each norm of a run, how far batch and running statistics are apart.

    The gap of a layer is the root mean square, over its features, of the distance of a batch's mean from the running
    mean, in running standard deviations. The batch is of validation images. None where a network has no such norm.
    """
    # With momentum 0 the state that a batch leaves is its moments.
    probing = dataclasses.replace(settings, bn_momentum=0.0, ghost_batches=1)
    model = networks.build(probing, "batch" if arm in ("ghost", "renorm") else arm, data)
    way = parallel.way(settings)
    probe = read(data.validation, np.arange(min(PROBED, len(data.validation.labels)) // 2 * 2))

    def norms(state: Any) -> dict[str, dict[str, Any]]:
        flat, _ = tree_flatten_with_path(state, is_leaf=lambda node: bool(parallel.fields_of(node)))
        found = {keystr(path, simple=True, separator="/"): parallel.fields_of(node) for path, node in flat}
        return {name: fields for name, fields in found.items() if fields}

    def one(params: Tree, state: Tree, probe: jax.Array) -> Gaps:
        state = parallel.pooled_state(way, state)
        _, new = model.apply(params, state, probe, True, None)
        seen, kept = norms(new), norms(state)
        return {n: jnp.sqrt(jnp.mean((seen[n]["mean"] - r["mean"]) ** 2 / (r["var"] + 1e-5))) for n, r in kept.items()}

    if settings.way == "explicit" or not norms(jax.eval_shape(model.init, jax.random.key(0))[1]):
        return None
    everywhere = jax.sharding.NamedSharding(way.mesh, jax.sharding.PartitionSpec())
    run = jax.jit(jax.vmap(jax.vmap(one, (0, 0, None)), (0, 0, None)), out_shardings=everywhere)
    return lambda carry: jax.device_get(run(carry.params, carry.state, probe))


def memory() -> int:
    """Return the peak of memory in bytes: on the first device, or on a CPU of this process."""
    if stats := jax.local_devices()[0].memory_stats():
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
