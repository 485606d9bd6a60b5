"""Ghost batches: parts of a batch that are normalized separately, with one update of the state."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType

from jaxbn._core.moments import Moments, pool, pool_named
from jaxbn._core.reduction import Reduction


def divide_batch(ghost_batches: int, r: Reduction, x: jax.Array) -> tuple[int, Reduction]:
    """Return the number of parts into which each member divides its shard of x, and which entries share statistics."""
    parts, divided = _share_parts(ghost_batches, r)
    size, shards = (x.shape[r.axes[0]], _count_shards(x, r.axes[0])) if r.axes else (1, 1)
    if parts > 1 and not isinstance(size, int):
        raise ValueError(f"`ghost_batches` must be 1 where the size of the batch is symbolic; got {parts} for {size}.")
    if parts > 1 and (size % parts or parts % shards):
        member = " on each member" if r.names else ""
        spread = f" over {shards} devices, whose number must divide it" if shards > 1 else ""
        raise ValueError(
            f"`ghost_batches` must divide the first axis of `x` that is not a feature axis, which has {size} entries"
            f"{member}{spread}; got {ghost_batches}."
        )
    return parts, divided


def _share_parts(ghost_batches: int, r: Reduction) -> tuple[int, Reduction]:
    if ghost_batches == 1 or not r.names:
        return ghost_batches, r
    groups = r.groups or (tuple(range(lax.axis_size(r.names))),)
    size = len(groups[0])
    if all(len(group) == size for group in groups):
        if ghost_batches % size == 0:
            return ghost_batches // size, r._replace(names=(), groups=None)
        if size % ghost_batches == 0:
            n = size // ghost_batches
            return 1, r._replace(groups=tuple(group[i : i + n] for group in groups for i in range(0, size, n)))
    raise ValueError(
        "`ghost_batches` counts the parts of the whole batch, and must be a multiple or a divisor of the number of "
        f"members of `axis_name` that share statistics, all groups of one size; got {ghost_batches} for "
        f"{'groups' if r.groups else 'a group'} of {sorted({len(group) for group in groups})}."
    )


def map_parts(
    layer: Callable[..., tuple[jax.Array, Moments]], parts: int, r: Reduction, x: jax.Array, *others: Any
) -> tuple[jax.Array, Moments]:
    """Return the output of `layer(x, *others)` on each part of a batch, joined again, and the moments of each part.

    An array of size 1 along the batch axis is the same for all parts.
    """
    if parts == 1:
        return layer(x, *others)
    axis = r.axes[0]
    in_axes = [None if v is None or v.shape[axis] == 1 else axis for v in (x, *others)]
    split = [v if a is None else _split_axis(v, axis, parts) for v, a in zip((x, *others), in_axes, strict=True)]
    y, m = jax.vmap(layer, in_axes=in_axes, out_axes=(axis, 0))(*split)
    return lax.reshape(y, x.shape, out_sharding=_explicit_sharding(jax.typeof(x).sharding)), m


def pool_parts(m: Moments, parts: int, whole: Reduction, r: Reduction) -> Moments:
    """Return the moments of the whole batch from those of its parts."""
    if parts > 1:
        m = pool(m)
    if whole == r or not whole.names:
        return m
    if r.groups:  # each part was on several members
        m = m._replace(count=m.count / len(r.groups[0]))
    return pool_named(m, whole.names, whole.groups)


def _split_axis(x: jax.Array, axis: int, parts: int) -> jax.Array:
    shape = (*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :])
    sharding = jax.typeof(x).sharding
    spec = (*sharding.spec[: axis + 1], None, *sharding.spec[axis + 1 :])
    return lax.reshape(x, shape, out_sharding=_explicit_sharding(sharding.update(spec=spec)))


def _explicit_sharding(sharding):
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def _count_shards(x: jax.Array, axis: int) -> int:
    """Return over how many devices x is sharded along `axis`, which its type says where the mesh is explicit."""
    sharding = jax.typeof(x).sharding
    names = sharding.spec[axis] or ()
    return math.prod(sharding.mesh.shape[a] for a in ((names,) if isinstance(names, str) else names))
