"""Moments of an array: one pass about a pivot, and their derivative."""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from jaxbn._core import check
from jaxbn._core.fusion_barrier import fusion_barrier
from jaxbn._core.layout import from_layout
from jaxbn._core.moments import Moments, moments_about, round_off
from jaxbn._core.reduction import Reduction, varying_axes


def moments(x: ArrayLike, *, axis: int | Sequence[int] = -1, mask: ArrayLike | None = None) -> Moments:
    """Return count, mean and biased variance of each feature of `x`.

    Two passes: first m0, the rounded mean of x, or of a part of it (a sixteenth, of small images more; so with other
    x of several reduced axes, without a mask); then with `d = x - m0`, in which little cancels, `mean = m0 + E[d]` and
    `var = E[d^2] - E[d]^2`. Differentiable in every mode. The first of the three parts of batch normalization:
    `moments`, `normalize`, `update_state`.

    Args:
        x: values, floating point, any shape. Sums are in float32, or float64 for float64.
        axis: the feature axis or axes; all others are reduced.
        mask: True where a value counts, broadcastable to `x`. Values under False may be anything, NaN too.

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
    x = check.floating("x", x)
    features = check.axes(axis, x.ndim)
    keep = None if mask is None else check.mask(mask, x.shape)
    m = batch_moments(Reduction(tuple(a for a in range(x.ndim) if a not in features)), x, keep)
    return jax.tree.map(lambda v: from_layout(v, features), m)


def batch_moments(
    r: Reduction, x: jax.Array, mask: jax.Array | None, guess: jax.Array | None = None, epsilon: float = 0.0
) -> Moments:
    """Return the moments of `x` over `r`; the reduced axes stay, of size 1.

    `guess` is a mean to begin with, such as the running one, laid out to broadcast against x. It affects only speed
    and the last bit: where it is near the mean, one pass over x suffices. `epsilon` is what is added to the variance.
    """
    return _moments(r, epsilon, x, mask, guess)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _moments(r, epsilon, x, mask, guess):
    return _find_moments(r, epsilon, x, mask, guess)


# Traced once for all layers of the same types. And compiled even when called eagerly: op by op, XLA's sums are less
# accurate, and every step is a pass over memory.
@partial(jax.jit, static_argnums=(0, 1), inline=True)
def _find_moments(r, epsilon, x, mask, guess):
    dtype = check.accumulation_dtype(x.dtype)
    x = zero_masked(mask, x)

    def two_passes(x, mask, guess):
        part = x if mask is not None else _sample_part(r, x)
        _, (mean,) = _average(r, mask, [part.astype(dtype)])
        return _average_about(r, x, mask, round_off(mean))

    def from_guess(x, mask, guess):
        pivot = jnp.where(jnp.isfinite(guess), guess, 0).astype(dtype)
        if not set(r.names) <= varying_axes(x) - varying_axes(pivot):
            pivot = lax.pmean(pivot, r.names)  # the members may hold different ones
        found = _average_about(r, x, mask, pivot)

        def find_far(found):
            # Farther than one std away, shift^2 > square - shift^2, too many digits cancel, or the square overflows: no
            # difference is taken of it, which would be NaN. A constant feature is near once the shift is small, since
            # epsilon covers the digits that cancel; another pass does not help an x of NaN.
            _, _, shift, square = found
            off, total = jnp.square(shift), r.sum_components(square)
            covered = min(epsilon, float(jnp.finfo(dtype).eps))
            near = (off + r.sum_components(off) <= total + covered) & jnp.isfinite(total)
            return _any_device(r, ~near & jnp.isfinite(shift), x)

        def repeat(carry):
            _, left, (pivot, _, shift, _) = carry
            found = _average_about(r, x, mask, round_off(pivot + shift))
            return (left > 1) & find_far(found), left - 1, found

        # Not at all, or once; again if a bad batch has left a guess so far off that its last digit is many std: each
        # pass takes seven digits off. As `lax.cond` it would compile several times as long, and `vmap` would
        # always run it.
        far = find_far(found)
        left = jnp.where(far, 5, 0)  # made of x, as a constant cannot be mapped over a sharded axis of an Explicit mesh
        return lax.while_loop(lambda carry: carry[0], repeat, (far, left, found))[2]

    # Groups might disagree on the second pass, which has collectives; and moments of an x that members share must not
    # differ by guesses that they do not share.
    if guess is None or r.groups or not varying_axes(guess) <= varying_axes(x) | set(r.names):
        found = two_passes(x, mask, guess)
    else:
        # On a TPU the convolution that makes x makes these sums as well, if nothing else has to be known of x before;
        # on a CPU a pass is saved. On a GPU a convolution is a library's call, into which nothing is fused, and a loop
        # may wait for the host.
        found = lax.platform_dependent(x, mask, guess, cuda=two_passes, rocm=two_passes, default=from_guess)
    # After the loop, where XLA does not know the pivot even if the guess is a constant c: it takes `(c + v) - c` for v.
    m = moments_about(*found)
    return m._replace(var=r.sum_components(m.var))


@partial(_moments.defjvp, symbolic_zeros=True)
def _moments_jvp(r, epsilon, primals, tangents):
    x, mask, guess = primals
    m, x_dot = _moments(r, epsilon, x, mask, guess), tangents[0]
    zeros = jax.tree.map(jnp.zeros_like, m)
    if isinstance(x_dot, SymbolicZero):
        return m, zeros
    x_dot, d = x_dot.astype(m.mean.dtype), (zero_masked(mask, x).astype(m.mean.dtype) - m.mean) - m.tail
    sums = r.sum_members([r.sum(zero_masked(mask, v)) for v in (x_dot, 2 * d * x_dot)])
    mean_dot, var_dot = (v / jnp.maximum(m.count, 1) for v in sums)
    return m, zeros._replace(mean=mean_dot, var=r.sum_components(var_dot))


def _average_about(r: Reduction, x: jax.Array, mask: jax.Array | None, pivot: jax.Array) -> tuple[jax.Array, ...]:
    """Return the pivot, the count, `E[x - pivot]` and `E[(x - pivot)^2]`."""
    copy = fusion_barrier(x, pivot)
    d, other_d = (x.astype(pivot.dtype) - pivot for x, pivot in (copy, fusion_barrier(*copy)))
    count, (shift, square) = _average(r, mask, [d, jnp.square(other_d)])
    # The pivot as varying as they are: on every device, by its type.
    return pivot + jnp.zeros_like(shift), count, shift, square


def _any_device(r: Reduction, condition: jax.Array, x: jax.Array) -> jax.Array:
    """Return whether a condition holds for any feature, on any device that takes part in the same program."""
    condition = jnp.any(condition)
    others = (varying_axes(x) or frozenset(jax.sharding.get_abstract_mesh().manual_axes)) - set(r.names)
    if r.names and others:
        condition = lax.pmax(condition.astype(jnp.float32), tuple(sorted(others))) > 0
    return condition


def _average(r: Reduction, mask: jax.Array | None, values: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
    """Return the count, and the averages of `values` over the entries that share statistics."""
    rows = [r.sum(zero_masked(mask, v)) for v in values]
    if mask is None:
        size = math.prod(values[0].shape[a] for a in r.axes)
        rows = r.sum_members(rows)
        count = jnp.full((), size, rows[0].dtype) * r.members(rows[0].dtype) + jnp.zeros_like(rows[0])
    else:
        # Axes that the mask does not vary along are not summed but counted. A float32 sum of ones is exact below 2^24,
        # and shares its collective with the other sums; above, it might stop growing.
        repeats = math.prod(values[0].shape[a] for a in r.axes if mask.shape[a] == 1)
        varying = math.prod(mask.shape[a] for a in r.axes)
        ones = mask.astype(jnp.int32 if isinstance(varying, int) and varying > 2**24 else rows[0].dtype)
        count = r.sum(ones).astype(rows[0].dtype) * jnp.full((), repeats, rows[0].dtype)
        count, *rows = r.sum_members([count + jnp.zeros_like(rows[0]), *rows])
    return count, [row / jnp.maximum(count, 1) for row in rows]


def zero_masked(mask: jax.Array | None, v: jax.Array) -> jax.Array:
    """Return `v` with 0 where the mask is False. Before anything is computed from it: NaN times 0 is NaN."""
    return v if mask is None else jnp.where(mask, v, 0)


def _sample_part(r: Reduction, x: jax.Array) -> jax.Array:
    """Return a sixteenth of x, more where the axis is short, whose mean is the pivot of the pass over all of x.

    The mean of a k-th of the values is at most `sqrt(k - 1)` standard deviations from the mean of all, however they are
    arranged; so the mean square about it is at most k times the variance, and 4 bits cancel. The part is taken along
    one axis, of those along which batches are not sharded and memory is not contiguous if there is one; else it is all
    of x.
    """
    spec = jax.typeof(x).sharding.spec
    axes = [a for a in r.axes[1:] if isinstance(x.shape[a], int) and x.shape[a] > 1 and spec[a] is None]
    if not axes:
        return x
    axis = max(axes, key=lambda a: a if a < x.ndim - 1 else 0)
    stride = x.shape[axis] // -(-x.shape[axis] // 16)
    return lax.slice_in_dim(x, stride // 2, None, stride=stride, axis=axis)
