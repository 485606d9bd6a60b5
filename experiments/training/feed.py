"""Batches from the host: each process reads the examples of its own devices, a chunk of steps at a time."""

from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from experiments.training import data
from experiments.training.config import Settings
from experiments.training.data import Split


class Feed(NamedTuple):
    """The examples of a chunk, `[seeds, steps, batch, ...]`, sharded over the devices along the batch.

    Attributes:
        images, labels: the examples.
        mask: which of them count; None if all do.
    """

    images: Any
    labels: Any
    mask: Any


def make(settings: Settings, split: Split, first: int, sharding: NamedSharding) -> Feed:
    """Read the chunk of `log_every` steps that begins with step `first`; each device's part is read where it is."""
    which = order(settings, len(split.labels), first)
    masked = settings.last_batch == "pad" and len(split.labels) % settings.batch_size
    at = np.maximum(which, 0)

    def array(shape: tuple[int, ...], value: Any) -> jax.Array:
        return jax.make_array_from_callback(shape, sharding, value)

    return Feed(
        array((*which.shape, split.images.shape[1]), lambda index: data.read(split, at[index[:3]])),
        array((*which.shape, *split.labels.shape[1:]), lambda index: np.asarray(split.labels)[at[index[:3]]]),
        array(which.shape, lambda index: which[index] >= 0) if masked else None,
    )


def order(settings: Settings, examples: int, first: int) -> np.ndarray:
    """Return the indices of the examples of each seed and step, `[seeds, steps, batch]`; -1 where a batch is padded.

    A function of the seed and the step alone: each epoch is a fresh permutation cut into whole batches. The few
    examples left over sit that epoch out, or with `last_batch = "pad"` are a short last batch.
    """
    size, short = settings.batch_size, settings.last_batch == "pad"
    in_epoch = -(-examples // size) if short else examples // size
    steps = first + np.arange(settings.log_every)
    rows = []
    for step in steps:
        epoch, at = divmod(int(step), in_epoch)
        drawn = _permutations(settings.seeds, epoch, examples)[:, at * size : (at + 1) * size]
        rows.append(np.pad(drawn, ((0, 0), (0, size - drawn.shape[1])), constant_values=-1))
    return np.stack(rows, 1)


@lru_cache(maxsize=2)
def _permutations(seeds: int, epoch: int, examples: int) -> np.ndarray:
    return np.asarray(_permute(jnp.arange(seeds, dtype=jnp.int32), np.int32(epoch), examples))


@partial(jax.jit, static_argnums=2)
def _permute(seeds: jax.Array, epoch: jax.Array, examples: int) -> jax.Array:
    return jax.vmap(lambda seed: data.permutation(seed, epoch, examples))(seeds)
