"""Epilogue of the layer, after normalization: scale and bias by example, a residual, an activation."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._core.normalize import apply_affine


def apply_epilogue(activation: Any, scale: Any, bias: Any, residual: Any, dtype: Any, z: jax.Array) -> jax.Array:
    """Return `activation(scale z + bias + residual)` in `dtype`."""
    z = apply_affine(z, scale, bias)
    z = z if residual is None else z + residual.astype(z.dtype)
    return (z if activation is None else activate(activation, z)).astype(dtype)


def activate(activation: Any, z: jax.Array) -> jax.Array:
    """Apply an activation, and check that it is one."""
    if not callable(activation):
        raise TypeError(f"`activation` must be a function such as `jax.nn.relu`; got {activation!r}.")
    try:
        y: Any = activation(z)
    except Exception as error:  # any error of a user's function
        kind = TypeError if isinstance(error, TypeError) else ValueError
        first_line = (str(error) or "-").splitlines()[0]
        raise kind(
            f"`activation` must be an elementwise function of one JAX array, here of shape {z.shape} (of one part with "
            f"`ghost_batches`), as `jax.nn.relu` is; it raised {type(error).__name__}: {first_line}"
        ) from error
    if getattr(y, "shape", None) != z.shape:
        raise ValueError(
            f"`activation` must be elementwise and return one array of its argument's shape {z.shape}; got "
            f"{jax.tree.map(jnp.shape, y)}."
        )
    if jnp.issubdtype(y.dtype, jnp.complexfloating) and not jnp.issubdtype(z.dtype, jnp.complexfloating):
        raise TypeError(f"`activation` must be real for real `x`; got {y.dtype}. Take the real part, or its size.")
    return y
