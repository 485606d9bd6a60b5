"""Normalization by the batch's own statistics, with a `custom_jvp` that knows how these follow x.

With `x_hat = (x - mean) / std` and `z = scale x_hat + bias`, the derivative is `P(u) + x_hat dscale + dbias`, where
`u = (scale / std) dx` and `P(u) = u - E[u] - x_hat E[u x_hat]`, with E over the entries that share the statistics. P is
symmetric, so forward and backward pass are the same two averages. Both are written here by hand, and keep only the
input and one vector per statistic and parameter: x_hat and the activation's derivative are recomputed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxbn._core.batch_moments import zero_masked
from jaxbn._core.fusion_barrier import fusion_barrier
from jaxbn._core.layout import name_mesh, shard_like
from jaxbn._core.linear_map import apply_linear, convert_closure
from jaxbn._core.moments import Moments
from jaxbn._core.normalize import find_padding, inverse_std
from jaxbn._core.reduction import Reduction, varying_axes


def normalize_by_batch(
    r: Reduction,
    epsilon: float,
    epilogue: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    mask: jax.Array | None,
    m: Moments,
    train: bool | jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
) -> jax.Array:
    """Return `epilogue(scale x_hat + bias)`, where x_hat is x normalized by its own moments `m` over `r`.

    Where `train` is False, `m` may be any statistics, and do not move with x. The arrays broadcast against x.
    """
    inputs = _Inputs(x, scale, bias, [], m, mask, None if train is True else jnp.asarray(train))
    z = name_mesh(_compute_z.eval_shape(epsilon, inputs).z, x)
    converted, arrays = convert_closure(epilogue, z)

    @jax.custom_jvp
    def layer(inputs):
        return converted(inputs.arrays, _compute_z(epsilon, inputs).z)

    @partial(layer.defjvp, symbolic_zeros=True)
    def layer_jvp(primals, tangents):
        # The derivative knows how the moments follow x: their own tangents are not needed.
        dots = [None if isinstance(t, SymbolicZero) else t for t in jax.tree.leaves(tangents[0][:4])]
        dots = jax.tree.unflatten(jax.tree.structure(primals[0][:4]), dots)
        y = layer(*primals)
        if not jax.tree.leaves(dots):
            return y, jnp.zeros_like(y)
        wanted = jax.tree.map(lambda t: t is not None, dots, is_leaf=lambda t: t is None)
        push, pull = (
            partial(_push_tangents, r, epsilon, converted),
            partial(_pull_cotangent, r, epsilon, converted, wanted),
        )
        return y, apply_linear(push, pull, primals[0], dots)

    return layer(inputs._replace(arrays=arrays))


class _Inputs(NamedTuple):
    """Inputs of the layer, and all that is kept for the backward pass. The first four have derivatives.

    Attributes:
        arrays: the arrays that the epilogue closes over.
        train: whether `m` are the moments of x, and so move with it; None for always.
    """

    x: jax.Array
    scale: jax.Array | None
    bias: jax.Array | None
    arrays: list[jax.Array]
    m: Moments
    mask: jax.Array | None
    train: jax.Array | None


class _Normalized(NamedTuple):
    """Intermediate values of `z = gain d + offset`; per-feature vectors are computed first.

    Attributes:
        near: which entries are not padding; None for all.
        d: `x - mean`. The low-order part of the mean, `m.tail`, is in the offset.
        inverse: `1 / std`.
        gain: `scale / std`.
        z: `scale x_hat + bias`.
    """

    near: jax.Array | None
    d: jax.Array
    inverse: jax.Array
    gain: jax.Array
    z: jax.Array


# Under `jit` as `update_running` is, and traced once for all layers of the same types.
@partial(jax.jit, static_argnums=0, inline=True)
def _compute_z(epsilon: float, inputs: _Inputs) -> _Normalized:
    m, scale, bias = inputs.m, inputs.scale, inputs.bias
    inverse = inverse_std(m.var, epsilon, m.count)
    gain = inverse if scale is None else scale * inverse
    near, x = find_padding(inputs.mask, inputs.x, m.mean, inverse)
    offset = -gain * m.tail if bias is None else bias - gain * m.tail
    mean, gain, offset = fusion_barrier(m.mean, gain, offset)
    d = _subtract_mean(x, mean, m.tail, near)
    return _Normalized(near, d, inverse, gain, d * gain + offset)


def _subtract_mean(x, mean, tail, near):
    """Return `x - mean`; for padding `tail`, which gives `x_hat = 0`."""
    d = zero_masked(near, x).astype(mean.dtype) - mean
    return d if near is None else jnp.where(near, d, tail)


def _push_tangents(r, epsilon, epilogue, inputs: _Inputs, dots: Any) -> jax.Array:
    """Return the tangent of the output for tangents of x, scale, bias and arrays."""
    x_dot, scale_dot, bias_dot, arrays_dot = dots
    near, d, inverse, gain, z = _compute_z(epsilon, inputs)
    x_hat, z_dot = (d - inputs.m.tail) * inverse, jnp.zeros_like(z)
    if x_dot is not None:
        u = zero_masked(near, gain * x_dot.astype(gain.dtype))
        first, second = r.sum_members([r.sum(zero_masked(inputs.mask, v)) for v in (u, u * x_hat)])
        first, second = _average_projected(r, inputs, first, second)
        z_dot = zero_masked(near, u - first - x_hat * second)
    z_dot = z_dot if scale_dot is None else z_dot + x_hat * scale_dot
    z_dot = z_dot if bias_dot is None else z_dot + bias_dot
    f, moving = _restrict_to_moving(epilogue, inputs.arrays, [t is not None for t in arrays_dot])
    return jax.jvp(f, (z, *moving), (z_dot, *(t for t in arrays_dot if t is not None)))[1]


def _pull_cotangent(r, epsilon, epilogue, wanted, inputs: _Inputs, y_bar) -> Any:
    """Return the wanted cotangents of x, scale, bias and arrays for a cotangent of the output."""
    x_wanted, scale_wanted, bias_wanted, arrays_wanted = wanted
    x, scale, bias, _, m, mask, _ = inputs
    near, d, inverse, gain, z = _compute_z(epsilon, inputs)
    f, moving = _restrict_to_moving(epilogue, inputs.arrays, arrays_wanted)
    z_bar, *arrays_bar = jax.vjp(f, z, *moving)[1](y_bar)

    own = _sum_rows(r, z_bar, d, near, x, m.mean, m.tail)
    whole = r.sum_members(own)
    # Sums of z_bar x_hat, from the sums of z_bar d.
    own_second, second = ((row[1] - m.tail * row[0]) * inverse for row in (own, whole))
    x_bar = scale_bar = bias_bar = None
    if x_wanted:
        first, second_mean = _average_projected(r, inputs, whole[0 if near is None else 2], second)
        slope = inverse * second_mean
        taken = zero_masked(mask, d * slope + (first - m.tail * slope))
        x_bar = shard_like(x, zero_masked(near, gain * (z_bar - taken)).astype(x.dtype))
    if scale_wanted:
        scale_bar = _sum_replicated(r, x, scale, own_second, second)
    if bias_wanted:
        bias_bar = _sum_replicated(r, x, bias, own[0], whole[0])
    return x_bar, scale_bar, bias_bar, arrays_bar


# Under `jit` as `fusion_barrier` is.
@partial(jax.jit, static_argnums=0)
def _sum_rows(r: Reduction, z_bar, d, near, x, mean, tail) -> list[jax.Array]:
    """Return the sums of z_bar, of `z_bar d`, and of z_bar where x is not padding if any is; d is recomputed."""

    def rows(z_bar, d, near):
        return [z_bar, z_bar * d, *([] if near is None else [zero_masked(near, z_bar)])]

    def sum_each(z_bar, d, near, x, mean, tail):
        x, mean, tail = fusion_barrier(x, mean, tail)
        return [r.sum(row) for row in rows(z_bar, _subtract_mean(x, mean, tail, near), near)]

    def sum_pairs(z_bar, d, near, x, mean, tail):
        return list(jnp.moveaxis(r.sum(jnp.stack(rows(z_bar, d, near), -1)), -1, 0))

    # With two sums, XLA for GPUs writes the activation's derivative to memory, for both to read. On a TPU one sum of
    # pairs moves more.
    args = z_bar, d, near, x, mean, tail
    return lax.platform_dependent(*args, cuda=sum_pairs, rocm=sum_pairs, default=sum_each)


def _average_projected(r: Reduction, inputs: _Inputs, first, second) -> list[jax.Array]:
    """Return `E[u]` and `E[u x_hat]` from the sums; 0 where the statistics do not move with x."""
    n = jnp.maximum(inputs.m.count, 1)
    found = first / n, r.sum_components(second) / n
    return [v if inputs.train is None else jnp.where(inputs.train, v, 0) for v in found]


def _sum_replicated(r: Reduction, x, v, own, whole) -> jax.Array:
    """Return the cotangent of a parameter; under `shard_map(check_vma=True)` a replicated one gets the sum."""
    replicated = varying_axes(x) - varying_axes(v)
    if replicated and replicated == set(r.names) and r.groups is None:
        own = whole
    elif replicated:
        own = lax.psum(own, tuple(sorted(replicated)))
    return shard_like(v, own.astype(v.dtype))


def _restrict_to_moving(epilogue, arrays, moving):
    """Return the epilogue as a function of z and the moving arrays only, and these arrays."""

    def f(z, *values):
        values = iter(values)
        return epilogue([next(values) if m else a for a, m in zip(arrays, moving, strict=True)], z)

    return f, [a for a, m in zip(arrays, moving, strict=True) if m]
