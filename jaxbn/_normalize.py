"""Floor 1: normalization by given statistics, and its derivative.

With x^ = (x - mean) / std, the derivative of batch normalization is `P(u) + x^ dscale + dbias`, where
`u = (scale / std) dx` and `P(u) = u - E[u] - x^ E[u x^]`, with E over the entries that share the statistics. P is
symmetric. So one forward-mode rule, linear and transposable, gives reverse mode with two reductions and one
collective; since it is written in terms of the functions it differentiates, it holds to any order.

What the backward pass keeps is decided in `layer`: the input, and vectors of one entry per feature.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxbn._moments import Moments, difference, joined, split
from jaxbn._scope import Scope, group_sum

# Standard deviations from the mean, beyond which a masked entry is read as the mean. NaN is beyond too.
FAR = 2.0**32


class Frame(NamedTuple):
    """What to normalize by.

    Attributes:
        m: the statistics, laid out to broadcast against x.
        mask: which entries of x they are of, or None for all.
        follows: whether they are the statistics of x itself, where only the program decides that.
    """

    m: Moments
    mask: jax.Array | None = None
    follows: jax.Array | None = None


class Rule(NamedTuple):
    """What is known before the program runs.

    Attributes:
        scope: which entries share statistics.
        epsilon: added to the variance.
        follows: whether the statistics are those of x itself, and so move with it; None where `Frame.follows` says.
        groups: an axis of x and how many groups of entries along it have statistics of their own; or None. `scope` and
            the arrays of a `Frame` are then those of x as `split` lays it out.
    """

    scope: Scope
    epsilon: float
    follows: bool | None
    groups: tuple[int, int] | None = None


def layer(
    rule: Rule,
    activation: Callable[..., jax.Array] | None,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    frame: Frame,
    affine: tuple[jax.Array | None, jax.Array | None],
    residual: jax.Array | None,
    closed_over: list[jax.Array],
) -> jax.Array:
    """`activation(scale x^ + bias + residual)`, keeping for the backward pass its arguments and nothing else.

    `affine` are a scale and a bias that differ between entries that share statistics, applied to the result.
    """

    # Everything is recomputed from the arguments: x^ and the activation's derivative are one fused read of x, dearer
    # to store than to make. `prevent_cse=False` lets XLA share the work where forward and backward are one program.
    @partial(jax.checkpoint, prevent_cse=False)
    def recomputed(x, scale, bias, frame, affine, residual, closed_over):
        y = normalize(rule, x if rule.groups is None else split(x, *rule.groups), scale, bias, frame)
        y = scaled(y if rule.groups is None else joined(y, x), *affine)
        if residual is not None:
            y = y + residual.astype(y.dtype)
        if activation is not None:
            y = activation(y, *closed_over)
        return y.astype(x.dtype)

    return recomputed(x, scale, bias, frame, affine, residual, closed_over)


def scaled(y: jax.Array, scale: jax.Array | None, bias: jax.Array | None) -> jax.Array:
    """`scale y + bias`."""
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def normalize(rule: Rule, x: jax.Array, scale: jax.Array | None, bias: jax.Array | None, frame: Frame) -> jax.Array:
    """`scale (x - mean) / sqrt(var + epsilon) + bias`."""
    factor = inverse_std(rule, x, frame)
    return scaled(_centred(rule, frame, x), factor if scale is None else scale * factor, bias)


@partial(normalize.defjvp, symbolic_zeros=True)
def _normalize_jvp(rule, primals, tangents):
    x, scale, bias, frame = primals
    x_dot, scale_dot, bias_dot, frame_dot = tangents
    unit = normalize(rule, x, None, None, frame)
    factor = inverse_std(rule, x, frame)
    gain = factor if scale is None else scale * factor
    # x^ is `(x - near - rest) factor`, and its products are summed as those of `x - near`.
    near, rest = lax.stop_gradient(frame.m.mean), rest_of_mean(rule, x, frame)

    # The tangent is `u + offset + x^ slope + dbias`, with an offset and a slope for each feature.
    offset, slope = jnp.zeros((2, *frame.m.mean.shape), near.dtype)
    y_dot = jnp.zeros_like(unit)
    if not _is_zero(x_dot):
        y_dot = _where_counted(rule, frame, x, gain * x_dot.astype(gain.dtype))
        offset, slope = (-v for v in _means(rule, frame, y_dot, unit))
    if not _is_zero(frame_dot.m.mean):
        offset = offset - gain * frame_dot.m.mean
    if not _is_zero(frame_dot.m.var):
        slope = slope - gain * factor * frame_dot.m.var / 2
    if not _is_zero(scale_dot):
        slope = slope + scale_dot
    slope = slope * factor
    # The moments took the first two; the third is for the backward pass, whose sum this line becomes.
    centred = difference(x, near, 3 if frame.mask is None else 0)
    y_dot = y_dot + (offset - rest * slope) + _where_counted(rule, frame, x, centred) * slope
    # Where x^ is 0 by decree, it does not move.
    y_dot = _where_counted(rule, frame, x, y_dot)
    if not _is_zero(bias_dot):
        y_dot = y_dot + bias_dot
    return normalize(rule, x, scale, bias, frame), y_dot


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def rest_of_mean(rule: Rule, x: jax.Array, frame: Frame) -> jax.Array:
    """What the mean is more than `frame.m.mean`, taken as a constant."""
    return frame.m.tail


@partial(rest_of_mean.defjvp, symbolic_zeros=True)
def _rest_of_mean_jvp(rule, primals, tangents):
    x, frame = primals
    x_dot, frame_dot = tangents
    rest_dot = jnp.zeros_like(frame.m.tail)
    if not _is_zero(x_dot):
        unit = normalize(rule, x, None, None, frame)
        rest_dot = rest_dot + _means(rule, frame, _where_counted(rule, frame, x, x_dot.astype(unit.dtype)), unit)[0]
    if not _is_zero(frame_dot.m.mean):
        rest_dot = rest_dot + frame_dot.m.mean
    return rest_of_mean(rule, x, frame), rest_dot


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def inverse_std(rule: Rule, x: jax.Array, frame: Frame) -> jax.Array:
    """`1 / sqrt(var + epsilon)`, or 0 where there are no values."""
    return jnp.where(frame.m.count > 0, lax.rsqrt(frame.m.var + rule.epsilon), 0)


@partial(inverse_std.defjvp, symbolic_zeros=True)
def _inverse_std_jvp(rule, primals, tangents):
    x, frame = primals
    x_dot, frame_dot = tangents
    factor = inverse_std(rule, x, frame)
    factor_dot = jnp.zeros_like(factor)
    if not _is_zero(x_dot):
        unit = normalize(rule, x, None, None, frame)
        u = _where_counted(rule, frame, x, factor * x_dot.astype(factor.dtype))
        factor_dot = -factor * _means(rule, frame, u, unit)[1]
    if not _is_zero(frame_dot.m.var):
        factor_dot = factor_dot - factor**3 * frame_dot.m.var / 2
    return factor, factor_dot


def _means(rule: Rule, frame: Frame, u: jax.Array, unit: jax.Array) -> list[jax.Array]:
    """`E[u]` and `E[u x^]` over the entries that share the statistics; 0 if the statistics are not of x."""
    if rule.follows is False:
        return [jnp.zeros(frame.m.mean.shape, u.dtype)] * 2
    if frame.mask is not None:
        u = jnp.where(frame.mask, u, 0)
    sums = [jnp.sum(v, rule.scope.reduced, keepdims=True) for v in (u, u * unit)]
    if rule.scope.names:
        sums = list(group_sum(rule.scope, jnp.stack(sums)))
    n = jnp.maximum(frame.m.count, 1)
    return [(v / n) if frame.follows is None else jnp.where(frame.follows, v / n, 0) for v in sums]


def _centred(rule: Rule, frame: Frame, x: jax.Array) -> jax.Array:
    """`x - mean`, subtracted in two steps: the first is exact where x is near the mean, the second is small."""
    return _where_counted(rule, frame, x, difference(x, frame.m.mean) - frame.m.tail)


def _where_counted(rule: Rule, frame: Frame, x: jax.Array, values: jax.Array) -> jax.Array:
    """`values`, but 0 at masked entries so far out that they can only be padding: those must stay harmless."""
    if frame.mask is None:
        return values
    # Not merely finite: an activation may cube x^, and its derivative would be infinite.
    near = jnp.abs(difference(x, frame.m.mean)) < FAR * lax.sqrt(frame.m.var + rule.epsilon)
    return jnp.where(frame.mask | near, values, 0)


def _is_zero(tangent) -> bool:
    return tangent is None or isinstance(tangent, SymbolicZero)
