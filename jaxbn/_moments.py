"""Floor 0: the moments of a group of values, and how groups pool."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType
from jax.typing import ArrayLike

from jaxbn import _check

# Up to this many devices, each sends its own row of moments to all others: one collective of 4 numbers a device and
# feature. Beyond, the rows would outgrow what is normalized, and pooling takes two collectives of 2 numbers a feature.
MAX_ROWS = 64


class Moments(NamedTuple):
    """Count, mean and biased variance of a group of values, one entry per feature.

    A batch, a device's shard, a microbatch and a calibration set are all such groups, and `pool` joins any number of
    them exactly. The group without members has count 0.

    Attributes:
        count: how many values each feature has, `[*features]`, floating point.
        mean: their mean, `[*features]`, float32 (float64 for float64 values).
        var: their biased variance, `E[(x - mean)^2]`, `[*features]`.
        tail: what rounding took from the mean, `[*features]`: `mean + tail` has twice the digits of `mean`.
            Normalization subtracts both, so that it is exact even for a mean of a million standard deviations.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    mean: jax.Array
    var: jax.Array
    tail: jax.Array = 0.0  # pyright: ignore[reportAssignmentType]


class Scope(NamedTuple):
    """Which entries share statistics: those along `reduced`, on all members of `names`, or of my own group of them."""

    reduced: tuple[int, ...]
    names: tuple[str, ...] = ()
    groups: tuple[tuple[int, ...], ...] | None = None


def moments(x: ArrayLike, *, axis: int | Sequence[int] = -1, mask: ArrayLike | None = None) -> Moments:
    """Count, mean and biased variance of each feature of `x`.

    Computed about a pivot m0 near the mean (that of the first sixty-fourth of the values), so that little cancels: with
    `d = x - m0`, `mean = m0 + mean(d)` and `var = mean(d^2) - mean(d)^2`. Differentiable in every mode.

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
    x = x.astype(_check.working(x.dtype))
    reduced = tuple(a for a in range(x.ndim) if a not in features)
    m, _ = moments_over(Scope(reduced), x, keep)
    return jax.tree.map(lambda v: from_layout(v, features), m)


def pool(m: Moments, axis: int | Sequence[int] = 0) -> Moments:
    """Moments of the union of groups that lie along an axis of the arrays of `m`.

    `n = sum n_i`, `mean = sum n_i mean_i / n`, `var = sum n_i (var_i + (mean_i - mean)^2) / n`
    (Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance"). Exact for any sizes, associative
    and commutative; an empty group changes nothing, whatever its mean and variance say.

    Args:
        m: the groups, for example `[groups, features]`. `count` and `tail` may be anything that broadcasts to `mean`.
        axis: the axis or axes of the groups.

    Returns:
        The pooled moments, without `axis`.

    Raises:
        ValueError: `axis` is out of range or repeated.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbn
        >>> halves = jnp.array([[[1.0], [2.0]], [[3.0], [6.0]]])
        >>> print(jaxbn.pool(jax.vmap(jaxbn.moments)(halves)).var, jnp.var(halves))
        [3.5] 3.5
    """
    m = _filled(m)
    return _settled(_pool(m, _check.axes(axis, m.mean.ndim)))


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
    return _settled(across(Scope((), names, _check.groups(axis_index_groups, names)), _filled(m)))


def to_layout(v: jax.Array, features: tuple[int, ...], ndim: int) -> jax.Array:
    """A per-feature array, laid out to broadcast against an array of `ndim` dimensions."""
    ascending = sorted(features)
    v = lax.transpose(v, [features.index(a) for a in ascending])
    return lax.expand_dims(v, [a for a in range(ndim) if a not in features])


def from_layout(v: jax.Array, features: tuple[int, ...]) -> jax.Array:
    """The inverse of `to_layout`."""
    v = lax.squeeze(v, [a for a in range(v.ndim) if a not in features])
    return lax.transpose(v, [sorted(features).index(a) for a in features])


def moments_over(scope: Scope, x: jax.Array, mask: jax.Array | None) -> tuple[Moments, Moments]:
    """Moments of float32 or float64 `x` over `scope`, in two forms; the reduced axes stay, of size 1.

    First as they are. Then with the pivot that they were computed about in the place of the mean, and with the whole
    rest of the mean as tail: what subtracts that pivot from x next shares the work with the statistics.
    """
    parts = 1 if scope.names or not scope.reduced else _parts(x, scope.reduced[0])
    if parts > 1:
        m = _over_parts(scope.reduced, parts, x, mask)
        return _settled(m), m
    own = _local(scope.reduced, x, mask)
    if not scope.names:
        return _settled(own), own
    m = _settled(across(scope, own))
    return m, Moments(m.count, own.mean, m.var, (m.mean - own.mean) + m.tail)


def _over_parts(reduced: tuple[int, ...], parts: int, x: jax.Array, mask: jax.Array | None) -> Moments:
    """Moments part by part, as if each were on a device of its own, and then pooled.

    Where the compiler spreads the array over devices, it needs one collective for that, which sums the rows of moments.
    A pivot of the whole array would need another before it.
    """
    axis = reduced[0]
    each = _local(
        tuple(a + 1 for a in reduced), _split(x, axis, parts), None if mask is None else _split(mask, axis, parts)
    )
    # The count may be spread over devices otherwise than the sums.
    m = jnp.stack(each._replace(count=each.count + jnp.zeros_like(each.var)))
    mine = jnp.eye(parts, dtype=bool).reshape(parts, *[1] * (axis + 1), parts, *[1] * (m.ndim - axis - 2))
    # A sum of rows that are zero but for one's own, as between the members of a named axis: it ends up on every device.
    rows = jnp.sum(jnp.where(mine, m[None], 0), axis + 2)
    return _pool(Moments(*jnp.moveaxis(rows, 1, 0)), (0,))


def _parts(x: jax.Array, axis: int) -> int:
    """Of how many parts along `axis` the compiler may put each on another device."""
    size, mesh = x.shape[axis], jax.typeof(x).sharding.mesh
    on_one_device = mesh.axis_types and all(t == AxisType.Manual for t in mesh.axis_types)
    parts = 1 if on_one_device or not isinstance(size, int) else math.gcd(size, jax.device_count())
    return parts if 0 < parts <= MAX_ROWS else 1


def _split(x: jax.Array, axis: int, parts: int) -> jax.Array:
    """`x` with `axis` as two axes: the parts, and what is in each."""
    size = x.shape[axis]
    shape = (*x.shape[:axis], *((1, 1) if size == 1 else (parts, size // parts)), *x.shape[axis + 1 :])
    sharding = jax.typeof(x).sharding
    spec = (*sharding.spec[: axis + 1], None, *sharding.spec[axis + 1 :])
    explicit = AxisType.Explicit in sharding.mesh.axis_types
    return lax.reshape(x, shape, out_sharding=sharding.update(spec=spec) if explicit else None)


def _local(reduced: tuple[int, ...], x: jax.Array, mask: jax.Array | None) -> Moments:
    """Moments over the axes `reduced` of what this device holds, about a pivot."""
    size = math.prod(x.shape[a] for a in reduced)
    shape = [1 if a in reduced else x.shape[a] for a in range(x.ndim)]
    if mask is None:
        count = jnp.full(shape, size, x.dtype)
    else:
        # Axes that the mask does not vary along are not summed but counted. A float32 sum of ones is exact below 2^24,
        # and under sharded `jit` shares its collective with the sums of x; above, it might stop growing.
        repeats = math.prod(x.shape[a] for a in reduced if mask.shape[a] == 1)
        varying = math.prod(mask.shape[a] for a in reduced)
        ones = mask.astype(jnp.int32 if isinstance(varying, int) and varying > 2**24 else x.dtype)
        count = jnp.sum(ones, reduced, keepdims=True).astype(x.dtype) * jnp.full((), repeats, x.dtype)
        count = jnp.broadcast_to(count, shape)

    def counted(values):
        return values if mask is None else jnp.where(mask, values, 0)

    def mean(values):
        return jnp.sum(values, reduced, keepdims=True) / jnp.maximum(count, 1)

    pivot = _mean_of_sample(reduced, x) if mask is None else None
    pivot = lax.stop_gradient(_rounded(mean(counted(x))) if pivot is None else pivot)
    d = counted(x - pivot)
    return _about(pivot, count, mean(d), mean(d * d))


def _mean_of_sample(reduced: tuple[int, ...], x: jax.Array) -> jax.Array | None:
    """The mean of a power of two of entries along the axes `reduced`, at least one in 64; or None.

    The mean of a k-th of the values is at most `sqrt(k - 1)` standard deviations from the mean of all, however they are
    arranged; so the mean square about it is at most 64 times the variance, and 6 bits at most cancel. Dividing by a
    power of two is exact, so that it needs no rounding (see `_rounded`), which would be repeated for every entry.
    """
    sizes = {a: x.shape[a] for a in reduced}
    if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes.values()):
        return None
    spec = jax.typeof(x).sharding.spec
    keep = {a: 1 << (size.bit_length() - 1) for a, size in sizes.items()}
    if any(spec[a] is not None and keep[a] != sizes[a] for a in reduced):
        return None  # what is sharded is not sliced
    while math.prod(keep.values()) * 32 >= math.prod(sizes.values()):
        a = next((a for a in reduced if keep[a] > 1 and spec[a] is None), None)
        if a is None:
            break
        keep[a] //= 2
    for a in reduced:
        x = lax.slice_in_dim(x, 0, keep[a], axis=a)
    return jnp.sum(x, reduced, keepdims=True) * (1 / math.prod(keep.values()))


def across(scope: Scope, m: Moments) -> Moments:
    """The pool of the moments that the members of `scope` hold."""
    size = lax.axis_size(scope.names) if scope.names else 1
    if size > MAX_ROWS:
        n, total = group_sum(scope, jnp.stack([m.count, m.count * m.mean]))
        at_least_one = jnp.where(n > 0, n, 1)
        pivot = _rounded(lax.stop_gradient(total / at_least_one))
        d = (m.mean - pivot) + m.tail
        shift, square = group_sum(scope, jnp.stack([m.count * d, m.count * (m.var + d * d)])) / at_least_one[None]
        return _about(pivot, n, shift, square)
    if scope.names:
        # A sum of rows that are zero but for one's own, not a gather: only a sum is known to be the same everywhere.
        me = lax.axis_index(scope.names)
        count, mean, var, tail = jnp.moveaxis(_sum_of_rows(scope.names, size, me, jnp.stack(m)), 1, 0)
        if scope.groups is not None:
            part = _part_of(scope.groups)
            mine = part == part[me]
            count = jnp.where(mine.reshape(-1, *[1] * (count.ndim - 1)), count, 0)
        m = _pool(Moments(count, mean, var, tail), (0,))
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


def _pool(m: Moments, axes: tuple[int, ...]) -> Moments:
    """`pool` after its checks; sums over `axes` and drops them."""

    def total(v):
        return jnp.sum(v, axes, keepdims=True)

    n = total(m.count)
    weight = m.count / jnp.where(n > 0, n, 1)
    mean, var, tail = (jnp.where(m.count > 0, v, 0) for v in m[1:])
    pivot = _rounded(lax.stop_gradient(total(weight * mean)))
    d = jnp.where(m.count > 0, (mean - pivot) + tail, 0)
    pooled = _about(pivot, n, total(weight * d), total(weight * (var + d * d)))
    return jax.tree.map(lambda v: lax.squeeze(v, axes), pooled)


def _about(pivot: jax.Array, count: jax.Array, shift: jax.Array, square: jax.Array) -> Moments:
    """Moments from `shift = E[x - pivot]` and `square = E[(x - pivot)^2]`, with the shift as tail."""
    var = square - shift * shift
    # Only rounding can make it negative. (A maximum with 0 would halve second derivatives at 0.)
    return Moments(count, pivot, jnp.where(var < 0, 0, var), shift)


def _settled(m: Moments) -> Moments:
    """`m` with a tail that only holds what rounding takes from the mean."""
    shift = _rounded(m.tail)
    mean = m.mean + shift
    return Moments(m.count, mean, m.var, shift - (mean - m.mean))


def _rounded(v: jax.Array) -> jax.Array:
    """`v` to one bit less, and so the same number for all who use it.

    A compiler that fuses the product or quotient behind `v` into its users may round it in one and not in another; but
    what is subtracted here and added there must be the same to the last bit. An explicit rounding is kept.
    """
    info = jnp.finfo(v.dtype)
    return lax.reduce_precision(v, info.nexp, info.nmant - 1)


def _filled(m: Moments) -> Moments:
    """`m` with every array of the shape and dtype of the mean."""
    mean = _check.floating("mean", m.mean)
    try:
        return Moments(*(jnp.broadcast_to(jnp.asarray(v, mean.dtype), mean.shape) for v in m))
    except ValueError:
        raise ValueError(
            f"All of `Moments` must broadcast to the shape of its mean, {mean.shape}; got {[np.shape(v) for v in m]}."
        ) from None
