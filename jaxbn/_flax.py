"""Floor 3: what the two Flax modules have in common: dtypes as flax chooses them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax.nnx.nn.dtypes import canonicalize_dtype


def output_dtype(*arrays: jax.Array | None, dtype: Any) -> Any:
    """`dtype`, or that to which the arrays promote."""
    # The module's own rule, whatever the program at large allows.
    with jax.numpy_dtype_promotion("standard"):
        return canonicalize_dtype(*arrays, dtype=dtype)


def widened(x: jax.Array, dtype: Any) -> jax.Array:
    """`x` in `dtype` if that is wider. A narrower output is computed from `x` as it is, and rounded at the end."""
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return x if floating and jnp.finfo(x.dtype).bits >= jnp.finfo(dtype).bits else x.astype(dtype)


def negated(flag: Any) -> Any:
    """`not flag`, for a bool or a bool array."""
    # A NumPy bool is known while tracing: one mode, one program.
    return jnp.logical_not(flag) if isinstance(flag, jax.Array) else not flag


def mean_for(x: jax.Array, mean: jax.Array) -> jax.Array:
    """The running mean, complex if `x` is: flax's becomes so with the first update."""
    if not jnp.iscomplexobj(x):
        return mean
    return mean.astype(jnp.complex64 if jnp.finfo(mean.dtype).bits <= 32 else jnp.complex128)
