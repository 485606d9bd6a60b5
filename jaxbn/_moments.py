"""Floor 0: the moments of a group of values, and how groups pool."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType

from jaxbn import _check

LARGE = 2**20  # entries; in float32 they are what the caches of a few CPU cores hold, 4 MB


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
    m = filled(m)
    return settled(pooled(m, _check.axes(axis, m.mean.ndim)))


def to_layout(v: jax.Array, features: tuple[int, ...], ndim: int) -> jax.Array:
    """A per-feature array, laid out to broadcast against an array of `ndim` dimensions."""
    ascending = sorted(features)
    v = lax.transpose(v, [features.index(a) for a in ascending])
    return lax.expand_dims(v, [a for a in range(ndim) if a not in features])


def from_layout(v: jax.Array, features: tuple[int, ...]) -> jax.Array:
    """The inverse of `to_layout`."""
    v = lax.squeeze(v, [a for a in range(v.ndim) if a not in features])
    return lax.transpose(v, [sorted(features).index(a) for a in features])


def split(x: jax.Array, axis: int, parts: int) -> jax.Array:
    """`x` with `axis` as two axes: the parts, and what is in each."""
    size = x.shape[axis]
    shape = (*x.shape[:axis], *((1, 1) if size == 1 else (parts, size // parts)), *x.shape[axis + 1 :])
    sharding = jax.typeof(x).sharding
    spec = (*sharding.spec[: axis + 1], None, *sharding.spec[axis + 1 :])
    explicit = AxisType.Explicit in sharding.mesh.axis_types
    return lax.reshape(x, shape, out_sharding=sharding.update(spec=spec) if explicit else None)


def joined(x: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse of `split`, of the shape of `like`."""
    sharding = jax.typeof(like).sharding
    return lax.reshape(x, like.shape, out_sharding=sharding if AxisType.Explicit in sharding.mesh.axis_types else None)


def difference(x: jax.Array, v: jax.Array, apart: int = 0) -> jax.Array:
    """`x - v` in the dtype of v; to a compiler for CPUs, one that is `apart` is not that of another number.

    XLA for CPU fuses a difference into the sum of it only if nothing else takes the same difference; what several take
    is an array, and if that outgrows the cache, writing it takes longer than the sums. On accelerators one fused pass
    makes all sums of one difference, which must then be the same.
    """
    if isinstance(x.size, int) and x.size >= LARGE and jax.default_backend() == "cpu":
        for _ in range(apart):
            x, v = lax.optimization_barrier((x, v))
    return x.astype(v.dtype) - v


def local(reduced: tuple[int, ...], x: jax.Array, mask: jax.Array | None) -> Moments:
    """Moments over the axes `reduced` of what this device holds, about a pivot."""
    dtype = _check.working(x.dtype)
    size = math.prod(x.shape[a] for a in reduced)
    shape = [1 if a in reduced else x.shape[a] for a in range(x.ndim)]
    if mask is None:
        count = jnp.full(shape, size, dtype)
    else:
        # Axes that the mask does not vary along are not summed but counted. A float32 sum of ones is exact below 2^24,
        # and under sharded `jit` shares its collective with the sums of x; above, it might stop growing.
        repeats = math.prod(x.shape[a] for a in reduced if mask.shape[a] == 1)
        varying = math.prod(mask.shape[a] for a in reduced)
        ones = mask.astype(jnp.int32 if isinstance(varying, int) and varying > 2**24 else dtype)
        count = jnp.sum(ones, reduced, keepdims=True).astype(dtype) * jnp.full((), repeats, dtype)
        count = jnp.broadcast_to(count, shape)

    def counted(values):
        return values if mask is None else jnp.where(mask, values, 0)

    def mean(values):
        return jnp.sum(values, reduced, keepdims=True) / jnp.maximum(count, 1)

    pivot = _mean_of_sample(reduced, x) if mask is None else None
    pivot = lax.stop_gradient(rounded(mean(counted(x.astype(dtype)))) if pivot is None else pivot)
    # What a mask leaves is an array anyway, and both sums had better share it.
    shift = counted(difference(x, pivot, 1))
    square = shift if mask is not None else difference(x, pivot, 2)
    # Where the mesh is explicit, features may be spread over devices: the count as well, then.
    return about(pivot, count + jnp.zeros_like(pivot), mean(shift), mean(square * square))


def _mean_of_sample(reduced: tuple[int, ...], x: jax.Array) -> jax.Array | None:
    """The mean of a power of two of entries along the axes `reduced`, at least one in 64; or None.

    The mean of a k-th of the values is at most `sqrt(k - 1)` standard deviations from the mean of all, however they are
    arranged; so the mean square about it is at most 64 times the variance, and 6 bits at most cancel. Dividing by a
    power of two is exact, so that it needs no rounding (see `rounded`), which would be repeated for every entry.
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
    return jnp.sum(x.astype(_check.working(x.dtype)), reduced, keepdims=True) * (1 / math.prod(keep.values()))


def pooled(m: Moments, axes: tuple[int, ...]) -> Moments:
    """`pool` after its checks; sums over `axes` and drops them."""

    def total(v):
        return jnp.sum(v, axes, keepdims=True)

    n = total(m.count)
    weight = m.count / jnp.where(n > 0, n, 1)
    mean, var, tail = (jnp.where(m.count > 0, v, 0) for v in m[1:])
    pivot = rounded(lax.stop_gradient(total(weight * mean)))
    d = jnp.where(m.count > 0, (mean - pivot) + tail, 0)
    whole = about(pivot, n, total(weight * d), total(weight * (var + d * d)))
    return jax.tree.map(lambda v: lax.squeeze(v, axes), whole)


def about(pivot: jax.Array, count: jax.Array, shift: jax.Array, square: jax.Array) -> Moments:
    """Moments from `shift = E[x - pivot]` and `square = E[(x - pivot)^2]`, with the shift as tail."""
    var = square - shift * shift
    # Only rounding can make it negative. (A maximum with 0 would halve second derivatives at 0.)
    return Moments(count, pivot, jnp.where(var < 0, 0, var), shift)


def settled(m: Moments) -> Moments:
    """`m` with a tail that only holds what rounding takes from the mean."""
    shift = rounded(m.tail)
    mean = m.mean + shift
    return Moments(m.count, mean, m.var, shift - (mean - m.mean))


def rounded(v: jax.Array) -> jax.Array:
    """`v` to one bit less, and so the same number for all who use it.

    A compiler that fuses the product or quotient behind `v` into its users may round it in one and not in another; but
    what is subtracted here and added there must be the same to the last bit. An explicit rounding is kept.
    """
    info = jnp.finfo(v.dtype)
    return lax.reduce_precision(v, info.nexp, info.nmant - 1)


def filled(m: Moments) -> Moments:
    """`m` with every array of the shape and dtype of the mean."""
    mean = _check.floating("mean", m.mean)
    try:
        return Moments(*(jnp.broadcast_to(jnp.asarray(v, mean.dtype), mean.shape) for v in m))
    except ValueError:
        raise ValueError(
            f"All of `Moments` must broadcast to the shape of its mean, {mean.shape}; got {[np.shape(v) for v in m]}."
        ) from None
