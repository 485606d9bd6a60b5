"""Floor 3: what the two Flax modules have in common: dtypes as flax chooses them, and what a call may add."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.nnx.nn.dtypes import canonicalize_dtype

from jaxbn import _check
from jaxbn._adapt import weighed_apply
from jaxbn._batch_norm import bn_apply
from jaxbn._domains import domain_apply


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


def own_or_given(name: str, own: Any, given: Any, num_domains: int | None) -> Any:
    """The layer's own parameter, or that of the call."""
    if given is None:
        return own
    if num_domains is not None:
        raise ValueError(
            f"`{name}` must not be given to the call of a layer of several domains, which has one for each."
        )
    if own is not None:
        raise ValueError(
            f"`{name}` must not be given to the call of a layer that has its own; make it with `use_{name}=False`."
        )
    return _check.floating(name, given, or_complex=True)


def leading(num_domains: int | None) -> tuple[int, ...]:
    """The axis of domains, where there is one."""
    return () if num_domains is None else (_check.positive("num_domains", num_domains),)


def applied(num_domains: int | None, domain: Any, example_weight: Any) -> Callable[..., Any]:
    """`bn_apply`, `domain_apply` for a layer of several domains, or `weighed_apply` in evaluation with a weight."""
    if (num_domains is None) != (domain is None):
        raise ValueError(
            "`domain` must be given to the call exactly where the layer has several; got "
            f"num_domains={num_domains} and domain={domain}."
        )
    if example_weight is None:
        return bn_apply if num_domains is None else partial(domain_apply, domain=domain)
    if num_domains is not None:
        raise ValueError(
            "`example_weight` must be None for a layer of several domains, whose evaluation takes no part of an "
            f"example's own statistics; got {example_weight} and num_domains={num_domains}."
        )
    return partial(_weighing, example_weight)


def _weighing(weight, params, state, x, train, *, axis, epsilon, mask, activation, residual, **training):
    """As `bn_apply`, with evaluation by `weighed_apply`."""
    shared = {"axis": axis, "epsilon": epsilon, "mask": mask}
    if train is True:
        return bn_apply(params, state, x, train, activation=activation, residual=residual, **shared, **training)
    if train is not False:
        raise TypeError(
            "`use_running_average` must be a Python bool in a layer with `example_weight`, which has two programs; got "
            "a traced one."
        )
    y = weighed_apply(params, state, x, weight, **shared)
    if residual is not None:
        y = y + _check.floating("residual", residual).astype(y.dtype)
    return (y if activation is None else activation(y)), state
