"""Choose dtypes as flax does: of the output, of the running statistics, and of complex input."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype

from jaxbn._core import check


@contextmanager
def allow_promotion() -> Iterator[None]:
    """Promote dtypes by JAX's standard rules inside a module, for any configuration of the program."""
    try:
        with jax.numpy_dtype_promotion("standard"):
            yield
    except ValueError as error:
        if type(error).__name__ != "TypePromotionError":
            raise
        raise TypeError(
            "`x` must have a dtype that promotes with those of the layer, if the layer has no `dtype`. JAX says: "
            f"{str(error).split('. ')[0]}. Convert it first, for example by `x.astype(jnp.bfloat16)`."
        ) from None


def check_dtypes(**dtypes: Any) -> None:
    """Check that the dtypes of a module, by name, are floating point or None."""
    for name, dtype in dtypes.items():
        try:
            fits = dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.inexact)
        except TypeError:
            fits = False
        if not fits:
            raise TypeError(f"`{name}` must be a floating point dtype, such as `jnp.bfloat16`; got {dtype!r}.")


def choose_output_dtype(*arrays: jax.Array | None, dtype: Any) -> Any:
    """Return `dtype`, or without one the dtype to which the arrays promote."""
    with allow_promotion():
        return canonicalize_dtype(*arrays, dtype=dtype)


def widen_input(x: jax.Array, dtype: Any) -> jax.Array:
    """Return `x` in `dtype` if that is wider; a narrower output is computed from `x` and rounded at the end."""
    floating = jnp.issubdtype(x.dtype, jnp.floating) and jnp.issubdtype(dtype, jnp.floating)
    return x if floating and jnp.finfo(x.dtype).bits >= jnp.finfo(dtype).bits else x.astype(dtype)


def choose_statistics_dtypes(mean: Any, *others: Any) -> tuple[Any, Any]:
    """Return the dtypes of the running mean, complex if any given dtype is, and of the running variance."""
    if any(v is not None and jnp.issubdtype(v, jnp.complexfloating) for v in (mean, *others)):
        mean = _complex_dtype(mean)
    return mean, check.real(mean)


def match_mean(x: jax.Array, mean: jax.Array, updates: bool) -> jax.Array:
    """Return the running mean, complex if `x` is; an update cannot change the dtype of a variable."""
    if not jnp.iscomplexobj(x) or jnp.iscomplexobj(mean):
        return mean
    if updates:
        raise TypeError(
            f"`x` must be real in training where the running mean is; got {x.dtype}. Make the layer with "
            "`param_dtype=jnp.complex64`, or `dtype=jnp.complex64` if scale and bias are to be real; in linen it is "
            "enough to initialize the variables with complex `x`."
        )
    return mean.astype(_complex_dtype(mean.dtype))


def _complex_dtype(dtype: Any) -> Any:
    return jnp.complex64 if jnp.finfo(dtype).bits <= 32 else jnp.complex128
