"""Measurements while a run trains: speed, memory, and how far each norm's statistics are apart.

`performance.jsonl` holds a line for each chunk; the gaps go into the log; all of it to TensorBoard on request.
"""

import dataclasses
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import disk
from experiments.training import networks, parallel, processes
from experiments.training.config import Settings
from experiments.training.data import Data, read
from experiments.training.shapes import Tree
from experiments.training.train import Carry, Metrics

SPEED = "performance.jsonl"
PROBED = 256  # validation images, by which the gaps are measured


class Observer:
    """A context manager, which writes to the folder of a run; only the first process writes."""

    def __init__(self, folder: Path, settings: Settings, data: Data, *, tensorboard: bool):
        """Observe a run on `data`."""
        self._path, self._settings, self._data = folder / SPEED, settings, data
        self._writes, self._board = processes.first(), None
        if tensorboard and self._writes:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise ValueError(
                    "`--tensorboard` needs the package tensorboardX; run `pip install tensorboardX`."
                ) from None
            self._board = SummaryWriter(str(folder / "tensorboard"))

    def __enter__(self) -> "Observer":
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close what is open."""
        if self._board:
            self._board.close()

    def watch(self, arm: str) -> Callable[[int, Metrics, Carry], list[dict[str, Any]]]:
        """Return what is called after each chunk of `arm`; it returns what to add to each line of the log."""
        s, gaps, before = self._settings, gauge(self._settings, arm, self._data), time.perf_counter()

        def after(step: int, metrics: Metrics, carry: Carry) -> list[dict[str, Any]]:
            nonlocal before
            found = {layer: np.asarray(gap) for layer, gap in (gaps(carry) if gaps else {}).items()}
            now = time.perf_counter()
            seconds, before = now - before, now
            if self._writes:
                self._write(arm, step, seconds, metrics, found)
            runs = np.ndindex(s.seeds, len(s.learning_rates))
            return [{"gaps": {k: _number(v[run]) for k, v in found.items()}} if found else {} for run in runs]

        return after

    def _write(self, arm: str, step: int, seconds: float, metrics: Metrics, gaps: dict[str, np.ndarray]) -> None:
        s = self._settings
        speed = s.log_every / seconds
        line = {"arm": arm, "step": step, "seconds": seconds, "steps_per_second": speed}
        line |= {"examples_per_second": speed * s.batch_size, "memory_bytes": memory()}
        disk.append(self._path, json.dumps(line) + "\n")
        if not self._board:
            return
        for name in ("steps_per_second", "examples_per_second", "memory_bytes"):
            self._board.add_scalar(f"{name}/{arm}", line[name], step)
        for name, values in (*metrics._asdict().items(), *((f"gap/{k}", v) for k, v in gaps.items())):
            for at, rate in enumerate(s.learning_rates):
                self._board.add_scalar(f"{name}/{arm}_rate_{rate:g}", float(np.median(values[:, at])), step)


def gauge(settings: Settings, arm: str, data: Data) -> Callable[[Carry], dict[str, jax.Array]] | None:
    """Return a function that measures, for each norm of a run, how far batch and running statistics are apart.

    The gap of a layer is the root mean square, over its features, of the distance of a batch's mean from the running
    mean, in running standard deviations. The batch is of validation images. None where a network has no such norm.
    """
    # With momentum 0 the state that a batch leaves is its moments.
    probing = dataclasses.replace(settings, bn_momentum=0.0, ghost_batches=1)
    images = data.validation.images
    model = networks.build(
        probing, "batch" if arm in ("ghost", "renorm") else arm, images.shape[1], data.shape, data.classes
    )
    way = parallel.way(settings)
    n = min(PROBED, len(data.validation.labels)) // 2 * 2
    probe = read(data.validation, np.arange(n))

    def records(state: Any) -> dict[str, Any]:
        flat, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_record)
        return {_name(path): node for path, node in flat if _is_record(node)}

    def one(params: Tree, state: Tree, probe: jax.Array) -> dict[str, jax.Array]:
        state = parallel.pooled_state(way, state)
        _, new = model.apply(params, state, probe, True, None)
        seen, kept = records(new), records(state)
        return {
            name: jnp.sqrt(jnp.mean((_field(seen[name], "mean") - _field(r, "mean")) ** 2 / (_field(r, "var") + 1e-5)))
            for name, r in kept.items()
        }

    shape = jax.eval_shape(model.init, jax.random.key(0))[1]
    if not records(shape) or settings.way == "explicit":
        return None
    everywhere = jax.sharding.NamedSharding(way.mesh, jax.sharding.PartitionSpec())
    run = jax.jit(jax.vmap(jax.vmap(one, (0, 0, None)), (0, 0, None)), out_shardings=everywhere)
    return lambda carry: jax.device_get(run(carry.params, carry.state, probe))


def memory() -> int:
    """Return the peak of memory in bytes: on the first device, or on a CPU of this process."""
    if stats := jax.local_devices()[0].memory_stats():
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _is_record(node: Any) -> bool:
    names = node.keys() if isinstance(node, dict) else getattr(node, "_fields", ())
    return {"mean", "var"} <= set(names)


def _field(node: Any, name: str) -> Any:
    return node[name] if isinstance(node, dict) else getattr(node, name)


def _name(path: Any) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _number(value: Any) -> float | None:
    return float(f"{value:.6g}") if np.isfinite(value) else None
