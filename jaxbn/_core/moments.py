"""Moments of a group of values, and exact pooling of groups."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import register_namedtuple_serialization

from jaxbn._core import check
from jaxbn._core.reduction import Reduction, check_axis_names, check_groups


@partial(register_namedtuple_serialization, serialized_name="jaxbn.Moments")
class Moments(NamedTuple):
    """Count, mean and biased variance of a group of values, one entry per feature.

    A batch, a device's shard, a microbatch and a calibration set are all such groups, and `pool` joins any number of
    them exactly. The group without members has count 0.

    Attributes:
        count: how many values each feature has, `[*features]`, floating point.
        mean: their mean, `[*features]`, float32 (float64 for float64 values).
        var: their biased variance, `E[(x - mean)^2]`, `[*features]`.
        tail: the low-order part of the mean, `[*features]`: `mean + tail` has twice the digits of `mean`.
            Normalization subtracts both, so that it is exact even for a mean of a million standard deviations.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    mean: jax.Array
    var: jax.Array
    tail: jax.Array = 0.0  # pyright: ignore[reportAssignmentType]


def pool(m: Moments, axis: int | Sequence[int] = 0) -> Moments:
    """Pool groups that lie along an axis of the arrays of `m`.

    `n = sum n_i`, `mean = sum n_i mean_i / n`, `var = sum n_i (var_i + (mean_i - mean)^2) / n`
    (Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance"). Exact for any sizes, associative
    and commutative; an empty group changes nothing, NaN in its mean and variance included.

    Args:
        m: the groups, for example `[groups, features]`. `count` and `tail` broadcast to `mean`.
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
    m = broadcast_fields(m)
    return _pool_along(check.axes(axis, m.mean.ndim), m)


# Under `jit` as an eager call is then one program, not one for each operation.
@partial(jax.jit, static_argnums=0, inline=True)
def _pool_along(axes: tuple[int, ...], m: Moments) -> Moments:
    whole = _pool(m, lambda rows: [jnp.sum(v, axes, keepdims=True) for v in rows])
    return jax.tree.map(lambda v: lax.squeeze(v, axes), whole)


def pool_named(
    m: Moments,
    axis_name: str | Sequence[str],
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Moments:
    """Pool the moments that the members of a named axis hold: cross-replica statistics, as in SyncBatchNorm.

    The formula of `pool`, in two collectives of two numbers a feature. Works under `jax.shard_map`, `jax.pmap` and
    `jax.vmap(axis_name=...)`; the result is the same on every member, and `shard_map` knows that it is.

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
    names = check_axis_names(axis_name)
    members = Reduction((), names, check_groups(axis_index_groups, names))
    return _pool(broadcast_fields(m), members.sum_members)


def _pool(m: Moments, total: Callable[[list[jax.Array]], list[jax.Array]]) -> Moments:
    """Pool groups, given how their rows are summed."""
    mean, var, tail = (jnp.where(m.count > 0, v, 0) for v in m[1:])
    n, weighted = total([m.count, m.count * mean])
    at_least_one = jnp.where(n > 0, n, 1)
    pivot = lax.stop_gradient(round_off(weighted / at_least_one))
    d = jnp.where(m.count > 0, (mean - pivot) + tail, 0)
    shift, square = total([m.count * d, m.count * (var + d * d)])
    return moments_about(pivot, n, shift / at_least_one, square / at_least_one)


def moments_about(pivot: jax.Array, count: jax.Array, shift: jax.Array, square: jax.Array) -> Moments:
    """Return moments from those about a pivot: `shift = E[x - pivot]` and `square = E[(x - pivot)^2]`."""
    var = square - shift * shift
    high = round_off(shift)
    mean = pivot + high
    # The error of that sum (Knuth's two-sum), and the digits that were rounded off.
    rest = mean - pivot
    tail = ((pivot - (mean - rest)) + (high - rest)) + (shift - high)
    # Only rounding can make it negative. (A maximum with 0 would halve second derivatives at 0.) A variance that is
    # beyond the dtype is shown as NaN: infinity would normalize everything to 0.
    return Moments(count, mean, jnp.where(var < 0, 0, jnp.where(jnp.isinf(var), jnp.nan, var)), tail)


def round_off(v: jax.Array) -> jax.Array:
    """Round to one bit less, so that every fused copy gets the same value.

    A compiler that fuses the quotient that made `v` into its users may round it in one and not in another; but the
    value that is subtracted here and added there must be the same to the last bit. An explicit rounding is kept.
    """
    info = jnp.finfo(v.dtype)
    return lax.reduce_precision(v, info.nexp, info.nmant - 1)


def broadcast_fields(m: Moments) -> Moments:
    """Give every array of `m` the shape and dtype of the mean."""
    if not isinstance(m, Moments):
        raise TypeError(f"`m` must be `jaxbn.Moments`, as of `jaxbn.moments(x)`; got {type(m).__name__}.")
    mean = check.floating("mean", m.mean)
    fields = [check.real_number(f"m.{name}", v) for name, v in m._asdict().items()]
    try:
        return Moments(*(jnp.broadcast_to(v.astype(mean.dtype), mean.shape) for v in fields))
    except ValueError:
        raise ValueError(
            f"All of `Moments` must broadcast to the shape of its mean, {mean.shape}; got {[v.shape for v in fields]}."
        ) from None
