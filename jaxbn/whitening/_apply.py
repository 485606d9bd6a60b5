"""Whitening by iterative normalization."""

import operator
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from jaxbn._core import check
from jaxbn._core.batch_moments import batch_moments
from jaxbn._core.layout import to_layout
from jaxbn._core.momentum import Momentum, split_momentum
from jaxbn._core.normalize import FAR
from jaxbn._core.reduction import Reduction, check_axis_names, check_groups
from jaxbn._core.state import BatchNormParams
from jaxbn._core.update_state import average
from jaxbn.whitening._state import WhitenState, check_axis, check_whitening


def whiten_apply(
    params: BatchNormParams,
    state: WhitenState,
    x: ArrayLike,
    train: bool | jax.Array,
    *,
    axis: int = -1,
    iterations: int = 5,
    momentum: Momentum = 0.99,
    epsilon: float = 1e-5,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    mask: ArrayLike | None = None,
    update: bool | jax.Array = True,
) -> tuple[jax.Array, WhitenState]:
    """Whiten a batch by iterative normalization; return the output, and the state after this batch.

    `y = scale W (x - mean) + bias`, where `W` is the symmetric inverse square root of `S = E[(x - mean)(x - mean)^T] +
    epsilon I`, by a Newton iteration: `A = S / tr S`, `P = I`, and then `iterations` times

        Q = (3 I - A) / 2,   A <- A Q Q,   P <- P Q,

    `W = P / sqrt(tr S)`. In training mean and S are those of `x`, and the running ones are averaged as in `bn_apply`;
    in evaluation they are the running ones. The running value is the covariance, not W: covariances can be averaged.

    Args:
        params, state: from `whiten_init`; the covariance's shape gives the size of the groups.
        x: input, floating point, any shape.
        train, momentum, axis_name, axis_index_groups, update: as for `bn_apply`.
        axis: the feature axis.
        epsilon: added to the variances, in S. It must be small compared to the smallest one: the direction of variance
            v ends with variance `v / (v + epsilon)`, 10/11 for v = 1e-4 and the default. At least 6e-8 of the trace is
            added (1e-16 in float64): smaller variances are lost in rounding, and the iteration would diverge.
        iterations: the number of steps. The direction of variance v is whitened after some `log(tr S / v) / log(2.25)`
            more than 3: 5 as in the paper whitens the large directions and leaves the small ones smaller; 25, with an
            epsilon that is small enough, make the covariance the identity to 1e-3 at a condition number of 1e4.
        mask: True where an example counts: broadcastable to x, and the same for all features.

    Returns:
        `(y, new_state)`, shapes and dtypes as those of `x` and `state`; `new_state` without gradient. A batch without
        examples, or whose covariance is not finite, changes nothing.

    Raises:
        TypeError, ValueError: as `bn_apply`; or several feature axes, or a mask that varies along the features.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbn
        >>> x = jax.random.normal(jax.random.key(0), (1000, 2)) @ jnp.array([[3.0, 0.0], [2.0, 0.5]])
        >>> params, state = jaxbn.whitening.whiten_init(2)
        >>> y, state = jaxbn.whitening.whiten_apply(params, state, x, train=True, iterations=15)
        >>> print(jnp.cov(y.T, bias=True).round(3) + 0.0)
        [[1. 0.]
         [0. 1.]]

    Huang et al. 2019, "Iterative normalization: beyond standardization towards efficient whitening". Its iteration
    `P <- (3 P - P^3 A) / 2` is the same on paper, and diverges when it goes on: rounding leaves the matrices that
    commute with A, and grows. The coupled form above does not. Gradients are by JAX's own differentiation of it.
    """
    x = check.floating("x", x)
    at = check_axis(axis, x.ndim)
    train, update = check.flag("train", train), check.flag("update", update)
    groups, size = check_whitening(params, state, x.shape[at])
    try:
        steps = operator.index(iterations)
    except TypeError:
        raise TypeError(f"`iterations` must be an int; got {iterations!r}.") from None
    if steps < 0:
        raise ValueError(f"`iterations` must not be negative; got {iterations!r}.")
    names, parts = (), None
    if train is not False:
        names = check_axis_names(axis_name)
        parts = check_groups(axis_index_groups, names)
    if AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types and jax.typeof(x).sharding.spec[at] is not None:
        raise ValueError(f"`x` must not be spread over devices along its features; got {jax.typeof(x)}.")
    mask = None if mask is None else check.mask(mask, x.shape)
    if mask is not None and mask.shape[at] != 1:
        raise ValueError(f"`mask` must be the same for all features, of size 1 along axis {axis}; got {mask.shape}.")
    keep_take = split_momentum(momentum, state.count)
    static = (at, groups, size, steps, check.epsilon(epsilon, x.dtype), names, parts)
    return _apply(static, params, state, x, train, update, keep_take, mask)


@partial(jax.jit, static_argnums=(0,), inline=False)
def _apply(static, params, state, x, train, update, momentum, mask):
    at, groups, size, steps, epsilon, names, parts = static
    dtype = check.accumulation_dtype(x.dtype)
    # Features last, in groups: [examples.., groups, size].
    wide = jnp.moveaxis(x, at, -1).astype(dtype)
    mask = None if mask is None else jnp.moveaxis(mask, at, -1)
    mean, cov = (v.astype(dtype) for v in (state.mean, state.cov))
    new, tail = state, jnp.zeros_like(mean)
    if train is not False:
        m, batch_cov = _compute_statistics(Reduction(tuple(range(x.ndim - 1)), names, parts), wide, mask, groups)
        batch_mean = m.mean.ravel()
        allowed = jnp.logical_and(update, train) & jnp.all(m.count > 0)
        new = _update_state(state, batch_mean, batch_cov, momentum, allowed)
        batch = batch_mean, m.tail.ravel(), batch_cov
        mean, tail, cov = jax.tree.map(partial(jnp.where, train), batch, (mean, tail, cov))
    # Rounding may make eigenvalues negative that are smaller than this part of the trace: the iteration would diverge.
    trace = jnp.trace(cov, axis1=-2, axis2=-1)[:, None, None]
    added = jnp.maximum(epsilon, jnp.finfo(dtype).eps / 2 * trace)
    w = _compute_inverse_root(cov + added * jnp.eye(size, dtype=dtype)[None], steps)

    # Only x is kept for the backward pass, and arrays of the features' size.
    @partial(jax.checkpoint, prevent_cse=False)
    def whiten(wide, mean, w, params):
        d = _subtract_mean(wide, mean, tail, cov, epsilon, mask)
        y = jnp.einsum("...gi,gij->...gj", _split_groups(d, groups), w, precision=lax.Precision.HIGHEST)
        y = y.reshape(d.shape)
        for v, apply in zip(params, (jnp.multiply, jnp.add), strict=True):
            y = y if v is None else apply(y, to_layout(v.astype(dtype), (y.ndim - 1,), y.ndim))
        return y

    return jnp.moveaxis(whiten(wide, mean, w, params), -1, at).astype(x.dtype), new


def _compute_statistics(r, x, mask, groups):
    """Return the moments of `x` over `r`, and its covariance `[groups, size, size]`; differentiable."""
    m = batch_moments(r, x, mask)
    d = (x - m.mean) - m.tail
    d = _split_groups(d if mask is None else jnp.where(mask, d, 0), groups)
    # Where the mesh is explicit, a sum over devices must name its sharding: replicated.
    sharding = jax.typeof(d).sharding
    everywhere = sharding.update(spec=P()) if AxisType.Explicit in sharding.mesh.axis_types else None
    square = jnp.einsum("...gi,...gj->gij", d, d, precision=lax.Precision.HIGHEST, out_sharding=everywhere)
    return m, r.sum_members([square])[0] / jnp.maximum(m.count.ravel()[0], 1)


def _subtract_mean(x, mean, tail, cov, epsilon, mask):
    """Return `x - mean`; a masked example that is so far out that it can only be padding is read as the mean."""
    like, tail = (to_layout(v, (x.ndim - 1,), x.ndim) for v in (mean, tail))
    if mask is None:
        return (x - like) - tail
    std = jnp.sqrt(jnp.diagonal(cov, axis1=-2, axis2=-1).reshape(mean.shape) + epsilon)
    read = mask | lax.stop_gradient(jnp.abs(x - like) < FAR * to_layout(std, (x.ndim - 1,), x.ndim))
    return jnp.where(read, (jnp.where(read, x, like) - like) - tail, 0)


def _compute_inverse_root(s, steps):
    """Return `S^(-1/2)` of each of a stack of positive matrices."""
    eye = jnp.eye(s.shape[-1], dtype=s.dtype)[None]
    trace = jnp.trace(s, axis1=-2, axis2=-1)[:, None, None]
    product = partial(jnp.matmul, precision=lax.Precision.HIGHEST)

    def step(carry, _):
        a, p = carry
        q = (3 * eye - a) / 2
        return (product(product(a, q), q), product(p, q)), None

    # Zeros are added so that P has A's sharding and varies over the same mapped axes.
    start = (s / trace, eye + jnp.zeros_like(s))
    (_, p), _ = lax.scan(step, start, length=steps)
    return p / jnp.sqrt(trace)


def _update_state(state, mean, cov, momentum, allowed):
    """Return the state after one more batch, if its second moments are finite."""
    diagonal = jnp.diagonal(cov, axis1=-2, axis2=-1)
    allowed = allowed & jnp.all(jnp.isfinite(cov)) & jnp.all(jnp.isfinite(diagonal.ravel() + mean * mean))

    mean, cov = average(momentum, state.mean, mean), average(momentum, state.cov, cov)
    allowed = allowed & jnp.all(jnp.isfinite(mean)) & jnp.all(jnp.isfinite(cov))
    new = WhitenState(mean, cov, state.count + allowed.astype(state.count.dtype))
    return lax.stop_gradient(jax.tree.map(partial(jnp.where, allowed), new, state))


def _split_groups(x, groups):
    return x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
