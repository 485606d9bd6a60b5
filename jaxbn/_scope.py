"""Floor 0: whose values share statistics: along which axes, on which devices."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.typing import ArrayLike

from jaxbn import _check
from jaxbn._moments import Moments, about, filled, from_layout, local, pooled, rounded, settled, split

# Up to this many devices, each sends its own row of moments to all others: one collective of 4 numbers a device and
# feature. Beyond, the rows would outgrow what is normalized, and pooling takes two collectives of 2 numbers a feature.
MAX_ROWS = 64
AUTO = AxisType.Auto


class Scope(NamedTuple):
    """Which entries share statistics: those along `reduced`, on all members of `names`, or of my own group of them."""

    reduced: tuple[int, ...]
    names: tuple[str, ...] = ()
    groups: tuple[tuple[int, ...], ...] | None = None


def moments(x: ArrayLike, *, axis: int | Sequence[int] = -1, mask: ArrayLike | None = None) -> Moments:
    """Count, mean and biased variance of each feature of `x`.

    Computed about a pivot m0 near the mean, so that little cancels: with `d = x - m0`, `mean = m0 + mean(d)` and
    `var = mean(d^2) - mean(d)^2`. The pivot is the mean of the first sixty-fourth of the values, or of all where there
    is a mask. Differentiable in every mode.

    Args:
        x: values, floating point, any shape. Sums are in float32, or float64 for float64.
        axis: the feature axis or axes; all others are reduced.
        mask: True where a value counts, broadcastable to `x`. What lies under False may be anything, NaN too.

    Returns:
        `Moments` of shape `[x.shape[a] for a in axis]`. A feature without values has count, mean and variance 0.

    Raises:
        TypeError: `x` is not floating point.
        ValueError: `axis` is out of range or repeated, or `mask` does not broadcast to `x`.

    Example:
        >>> import jax.numpy as jnp, jaxbn
        >>> m = jaxbn.moments(jnp.array([[1.0, 5.0], [3.0, 5.0]]))
        >>> print(m.count, m.mean, m.var)
        [2. 2.] [2. 5.] [1. 0.]

    The variance is the biased one (divided by the count, as in `jnp.var`), not the sample variance.
    """
    x = _check.floating("x", x)
    features = _check.axes(axis, x.ndim)
    keep = None if mask is None else _check.mask(mask, x.shape)
    reduced = tuple(a for a in range(x.ndim) if a not in features)
    m, _ = moments_over(Scope(reduced), x, keep)
    return jax.tree.map(lambda v: from_layout(v, features), m)


def pool_named(
    m: Moments,
    axis_name: str | Sequence[str],
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Moments:
    """Moments of the union of the groups that the members of a named axis hold.

    The formula of `pool`. Up to 64 members it takes one collective (each member sends its own row, and pools them
    all), beyond that two smaller ones. Works under `jax.shard_map`, `jax.pmap` and `jax.vmap(axis_name=...)`; the
    result is the same on every member, and `shard_map` knows that it is.

    Args:
        m: this member's moments.
        axis_name: the named axis, or several to pool over their product.
        axis_index_groups: a partition of the member indices; each member gets the pool of its own part.

    Returns:
        The pooled moments, of the same shape.

    Raises:
        ValueError: an axis name is not bound, or the groups are not a partition.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbn
        >>> shards = jnp.array([[[1.0], [2.0]], [[3.0], [6.0]]])
        >>> print(jax.vmap(lambda x: jaxbn.pool_named(jaxbn.moments(x), "d").var, axis_name="d")(shards))
        [[3.5]
         [3.5]]
    """
    names = _check.axis_names(axis_name)
    return settled(across(Scope((), names, _check.groups(axis_index_groups, names)), filled(m)))


def moments_over(scope: Scope, x: jax.Array, mask: jax.Array | None) -> tuple[Moments, Moments]:
    """Moments of `x` over `scope`, in two forms; the reduced axes stay, of size 1.

    First as they are. Then with the pivot that they were computed about in the place of the mean, and with the whole
    rest of the mean as tail: what subtracts that pivot from x next shares the work with the statistics.
    """
    parts = 1 if scope.names or not scope.reduced else _parts(x, scope.reduced[0])
    if parts > 1:
        m = _over_parts(scope.reduced, parts, x, mask)
        return settled(m), m
    own = local(scope.reduced, x, mask)
    if not scope.names:
        return settled(own), own
    m = settled(across(scope, own))
    pivot = jnp.where(own.count > 0, own.mean, m.mean)
    return m, Moments(m.count, pivot, m.var, (m.mean - pivot) + m.tail)


def moments_of_groups(scope: Scope, axis: int, x: jax.Array, mask: jax.Array | None) -> tuple[Moments, Moments]:
    """Moments of `x`, which `split` has divided into groups along `axis`: of all of it, and of each group.

    As `moments_over`, but the second are each group's own, on this member alone; the first are without `axis`.
    """
    own = local(scope.reduced, x, mask)
    return settled(across(scope, _union(own, axis))), own


def _over_parts(reduced: tuple[int, ...], parts: int, x: jax.Array, mask: jax.Array | None) -> Moments:
    """Moments part by part, as if each were on a device of its own, and then pooled.

    Where the compiler spreads the array over devices, it needs one collective for that, which sums the rows of moments.
    A pivot of the whole array would need another before it.
    """
    axis, within = reduced[0], tuple(a + 1 for a in reduced)
    each = local(within, split(x, axis, parts), None if mask is None else split(mask, axis, parts))
    return _union(each, axis)


def _union(each: Moments, axis: int) -> Moments:
    """The pool of the groups along `axis`, without it."""
    parts = each.var.shape[axis]
    if not 1 < parts <= MAX_ROWS or jax.device_count() == 1:
        return pooled(each, (axis,))
    m = jnp.stack(each)
    mine = jnp.eye(parts, dtype=bool).reshape(parts, *[1] * (axis + 1), parts, *[1] * (m.ndim - axis - 2))
    # A sum of rows that are zero but for one's own, as between the members of a named axis: it ends up on every device.
    rows = jnp.sum(jnp.where(mine, m[None], 0), axis + 2)
    return pooled(Moments(*jnp.moveaxis(rows, 1, 0)), (0,))


def _parts(x: jax.Array, axis: int) -> int:
    """Of how many parts along `axis` the compiler may put each on another device; a multiple of how many it puts."""
    size, mesh = x.shape[axis], jax.typeof(x).sharding.mesh
    if not isinstance(size, int) or not size:
        return 1
    told = shards(x, axis)
    if mesh.axis_types:
        untold = math.prod(mesh.shape[a] for a, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == AUTO)
        parts = math.gcd(size, told * untold)
    else:
        # The arrays may come from a mesh of some of the devices: any number of them that divides the batch.
        parts = math.gcd(size, math.lcm(*range(1, min(jax.device_count(), MAX_ROWS) + 1)))
        parts = parts if parts <= MAX_ROWS else math.gcd(size, jax.device_count())
    return parts if parts <= MAX_ROWS else told if told <= MAX_ROWS else 1


def shards(x: jax.Array, axis: int) -> int:
    """Over how many devices x is spread along `axis`, as far as its type says so: where the mesh is explicit."""
    sharding = jax.typeof(x).sharding
    names = sharding.spec[axis] or ()
    return math.prod(sharding.mesh.shape[a] for a in ((names,) if isinstance(names, str) else names))


def across(scope: Scope, m: Moments) -> Moments:
    """The pool of the moments that the members of `scope` hold."""
    size = lax.axis_size(scope.names) if scope.names else 1
    if size > MAX_ROWS:
        n, total = group_sum(scope, jnp.stack([m.count, m.count * m.mean]))
        at_least_one = jnp.where(n > 0, n, 1)
        pivot = rounded(lax.stop_gradient(total / at_least_one))
        d = (m.mean - pivot) + m.tail
        shift, square = group_sum(scope, jnp.stack([m.count * d, m.count * (m.var + d * d)])) / at_least_one[None]
        return about(pivot, n, shift, square)
    if scope.names:
        # A sum of rows that are zero but for one's own, not a gather: only a sum is known to be the same everywhere.
        me = lax.axis_index(scope.names)
        count, mean, var, tail = jnp.moveaxis(_sum_of_rows(scope.names, size, me, jnp.stack(m)), 1, 0)
        if scope.groups is not None:
            part = _part_of(scope.groups)
            mine = part == part[me]
            count = jnp.where(mine.reshape(-1, *[1] * (count.ndim - 1)), count, 0)
        m = pooled(Moments(count, mean, var, tail), (0,))
    return m


def group_sum(scope: Scope, v: jax.Array) -> jax.Array:
    """The sum of `v` over the members of `scope`."""
    if not scope.names:
        return v
    _check.still_bound(scope.names)
    if scope.groups is None:
        return lax.psum(v, scope.names)
    # `lax.psum` takes no groups under `shard_map(check_vma=True)`.
    mine = _part_of(scope.groups)[lax.axis_index(scope.names)]
    rows = _sum_of_rows(scope.names, len(scope.groups), mine, v)
    return lax.dynamic_index_in_dim(rows, mine, keepdims=False)


def _sum_of_rows(names: tuple[str, ...], rows: int, mine: jax.Array, v: jax.Array) -> jax.Array:
    """`[rows, *v.shape]`: row i is the sum of `v` over the members whose row is i."""
    at = (jnp.arange(rows, dtype=mine.dtype) == mine).reshape(-1, *[1] * v.ndim)
    return lax.psum(jnp.where(at, v[None], jnp.zeros((), v.dtype)), names)


def _part_of(groups: tuple[tuple[int, ...], ...]) -> jax.Array:
    """The number of the group that each member is in."""
    of = {member: i for i, part in enumerate(groups) for member in part}
    return jnp.asarray([of[member] for member in range(len(of))], jnp.int32)
