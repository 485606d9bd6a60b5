"""Floor 1: complex input. The same statistics; derivatives by JAX's own differentiation of the formula.

The mean is complex and the variance real, `E[|x - mean|^2]`: real and imaginary part share it. The lean derivative rule
of `_normalize` is for real numbers; here the backward pass keeps what JAX keeps.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._moments import Moments
from jaxbn._normalize import FAR, Rule, scaled
from jaxbn._scope import moments_over


def moments_of_parts(rule: Rule, x: jax.Array, mask: jax.Array | None) -> Moments:
    """Count, complex mean and real variance of complex `x`, laid out to broadcast against x."""
    parts = jnp.stack([x.real, x.imag], -1)
    m, _ = moments_over(rule.scope, parts, None if mask is None else mask[..., None])
    mean, tail = (lax.complex(v[..., 0], v[..., 1]) for v in (m.mean, m.tail))
    return Moments(m.count[..., 0], mean, jnp.sum(m.var, -1), tail)


def complex_layer(rule, activation, x, scale, bias, frame, affine, residual, closed_over):
    """`activation(scale (x - mean) / sqrt(var + epsilon) + bias + residual)`, with the arguments of `layer`."""
    factor = jnp.where(frame.m.count > 0, lax.rsqrt(frame.m.var + rule.epsilon), 0)
    if frame.mask is not None:
        # Before anything is computed from it: the derivative of what is discarded would be multiplied by 0, and NaN.
        x = jnp.where(frame.mask | (jnp.abs(x - frame.m.mean) * factor < FAR), x, frame.m.mean)
    y = ((x - frame.m.mean) - frame.m.tail) * factor.astype(x.dtype)
    y = scaled(scaled(y, scale, bias), *affine)
    y = y if residual is None else y + residual.astype(x.dtype)
    return (y if activation is None else activation(y, *closed_over)).astype(x.dtype)
