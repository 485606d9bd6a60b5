"""What the two Flax modules have in common: dtypes as flax chooses them, and what a call may add."""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.nnx.nn.dtypes import canonicalize_dtype
from jax.core import Tracer

from jaxbn._core import check
from jaxbn._core.batch_norm import bn_apply
from jaxbn.domains import domain_apply
from jaxbn.lstm._state import LSTMCarry
from jaxbn.statistics import apply_with_example_weight


@contextmanager
def promotion() -> Iterator[None]:
    """Promote as a module does, whatever the program at large allows."""
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


def output_dtype(*arrays: jax.Array | None, dtype: Any) -> Any:
    """`dtype`, or that to which the arrays promote."""
    with promotion():
        return canonicalize_dtype(*arrays, dtype=dtype)


def widened(x: jax.Array, dtype: Any) -> jax.Array:
    """`x` in `dtype` if that is wider. A narrower output is computed from `x` as it is, and rounded at the end."""
    floating = jnp.issubdtype(x.dtype, jnp.floating) and jnp.issubdtype(dtype, jnp.floating)
    return x if floating and jnp.finfo(x.dtype).bits >= jnp.finfo(dtype).bits else x.astype(dtype)


def negated(flag: Any) -> Any:
    """`not flag`, for a bool or a bool array."""
    # A NumPy bool is known while tracing: one mode, one program.
    return jnp.logical_not(flag) if isinstance(flag, jax.Array) else not flag


def constant(value: Any) -> Any:
    """Return a scalar array as the number that it is: a setting is compiled in."""
    scalar = hasattr(value, "dtype") and np.shape(value) == () and not isinstance(value, Tracer)
    return float(value) if scalar else value


def kept_dtypes(mean: Any, *others: Any) -> tuple[Any, Any]:
    """Return the dtypes of the running mean, complex if one of all is, and of the running variance."""
    if any(v is not None and jnp.issubdtype(v, jnp.complexfloating) for v in (mean, *others)):
        mean = _complex(mean)
    return mean, check.real(mean)


def mean_for(x: jax.Array, mean: jax.Array, updates: bool) -> jax.Array:
    """Return the running mean, complex if `x` is. Where it is updated it must be so: a variable keeps its type."""
    if not jnp.iscomplexobj(x) or jnp.iscomplexobj(mean):
        return mean
    if updates:
        raise TypeError(
            f"`x` must be real in training where the running mean is; got {x.dtype}. Make the layer with "
            "`param_dtype=jnp.complex64`, or `dtype=jnp.complex64` if scale and bias are to be real; in linen it is "
            "enough to initialize the variables with complex `x`."
        )
    return mean.astype(_complex(mean.dtype))


def _complex(dtype: Any) -> Any:
    return jnp.complex64 if jnp.finfo(dtype).bits <= 32 else jnp.complex128


def check_features(
    x: jax.Array, axis: int | Sequence[int], made_for: tuple[int, ...], advice: str, **given: jax.Array | None
) -> None:
    """Check that `x` has the features that the layer was made for, and so have scale and bias that are given."""
    axes = check.axes(axis, x.ndim)
    found = tuple(x.shape[a] for a in axes)
    if found != made_for:
        raise ValueError(
            f"`x` must have along axis {axis} the {made_for} features that the layer was made for; got shape "
            f"{x.shape}, with {found} there. {advice.format(*found)} Or name by `axis` where x has its features."
        )
    examples = tuple(n for a, n in enumerate(x.shape) if a not in axes)[:1]
    for name, value in given.items():
        if value is not None and value.shape not in (found, (*examples, *found)):
            raise ValueError(
                f"`{name}` must have shape {found}, or {(*examples, *found)} for one of each example; got "
                f"{value.shape}. Its features are those of `x`."
            )


def lengths_of_rnn(rnn: Any) -> Any:
    """Return the `seq_lengths` of the call of `rnn`, a class of flax's, that asks its cell for something, if one does.

    Flax does not hand them to the cell, which would take padding for data. So they are looked up where they are.
    """
    code, frame = inspect.unwrap(rnn.__call__).__code__, sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    if frame is None:
        return None
    lengths, carry = frame.f_locals.get("seq_lengths"), frame.f_locals.get("initial_carry")
    if lengths is not None and isinstance(carry, LSTMCarry) and carry.lengths is None:
        raise ValueError(
            "`initial_carry` must know the lengths where `seq_lengths` is given, or padding would enter the "
            "statistics. Make it by `cell.initialize_carry(..., lengths=seq_lengths)`."
        )
    return lengths


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
    return check.floating(name, given, or_complex=True)


def leading(num_domains: int | None) -> tuple[int, ...]:
    """The axis of domains, where there is one."""
    return () if num_domains is None else (check.positive("num_domains", num_domains),)


def applied(num_domains: int | None, domain: Any, example_weight: Any) -> Callable[..., Any]:
    """`bn_apply`, `domain_apply` for several domains, or `apply_with_example_weight` in evaluation with a weight."""
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
    """As `bn_apply`, with evaluation by `apply_with_example_weight`."""
    shared = {"axis": axis, "epsilon": epsilon, "mask": mask}
    if train is True:
        return bn_apply(params, state, x, train, activation=activation, residual=residual, **shared, **training)
    if train is not False:
        raise TypeError(
            "`use_running_average` must be a Python bool in a layer with `example_weight`, which has two programs; got "
            "a traced one."
        )
    y = apply_with_example_weight(params, state, x, weight, **shared)
    if residual is not None:
        y = y + check.floating("residual", residual).astype(y.dtype)
    return (y if activation is None else activation(y)), state
