"""Complex input, as pairs of real numbers: a complex mean and a real variance.

Real and imaginary part have a mean each, and one variance together, `E[|x - mean|^2]`.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._core.moments import Moments


def to_pairs(x: jax.Array) -> jax.Array:
    """Return real and imaginary part along a new last axis."""
    return jnp.stack([x.real, x.imag], -1)


def from_pairs(x: jax.Array) -> jax.Array:
    """Invert `to_pairs`."""
    return lax.complex(x[..., 0], x[..., 1])


def join_moments(m: Moments) -> Moments:
    """Return the complex moments of moments of pairs."""
    return Moments(m.count[..., 0], from_pairs(m.mean), m.var[..., 0], from_pairs(m.tail))
