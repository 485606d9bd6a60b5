"""Call `bn_apply`, `whiten_apply` and `lstm_step` as both modules do: from options and arrays, to output and state."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxbn._core import check
from jaxbn._core.batch_norm import bn_apply
from jaxbn._core.epilogue import apply_epilogue
from jaxbn._core.state import BatchNormParams, BatchNormState
from jaxbn._flax.dtypes import choose_output_dtype, match_mean, widen_input
from jaxbn.domains import domain_apply
from jaxbn.lstm._apply import lstm_step
from jaxbn.lstm._state import LSTMCarry, LSTMParams, LSTMState
from jaxbn.statistics import apply_with_example_weight
from jaxbn.whitening import WhitenState, whiten_apply
from jaxbn.whitening._state import check_axis

_SHARED = ("momentum", "epsilon", "axis_name", "axis_index_groups")
BATCH_NORM = (*_SHARED, "axis", "unbiased_running_var", "activation", "ghost_batches", "renorm")
WHITENING = (*_SHARED, "axis", "iterations")
LSTM = _SHARED
# `init` of linen runs on one device, without the axis names of training, and on any batch.
AT_INIT = {"axis_name": None, "axis_index_groups": None, "ghost_batches": 1}
# Of flax's layers, which are without these options.
_DEFAULTS = {"unbiased_running_var": False, "activation": None, "ghost_batches": 1, "renorm": None}


def read_options(module: Any, names: Sequence[str], initializing: bool = False) -> dict[str, Any]:
    """Return the named attributes of a module, which the function of the core takes under the same names."""
    options = {name: getattr(module, name, _DEFAULTS.get(name)) for name in names}
    return {name: AT_INIT.get(name, value) for name, value in options.items()} if initializing else options


def call_batch_norm(
    options: Mapping[str, Any],
    params: BatchNormParams,
    state: BatchNormState,
    x: jax.Array,
    train: bool | jax.Array,
    *,
    dtype: Any,
    num_domains: int | None = None,
    domain: Any = None,
    example_weight: Any = None,
    advice: str = "",
    updates: bool = False,
    **call: Any,
) -> tuple[jax.Array, BatchNormState]:
    """Normalize `x` into `dtype`, in training with the new running statistics.

    `advice` tells the user of a layer how to make it for another number of features; `call` holds `mask`, `residual`
    and `update` of `bn_apply`.
    """
    made_for = state.mean.shape[0 if num_domains is None else 1 :]
    check_features(x, options["axis"], made_for, advice, **(params._asdict() if num_domains is None else {}))
    apply = _choose_apply(num_domains, domain, example_weight)
    state = state._replace(mean=match_mean(x, state.mean, updates))
    y, new = apply(params, state, widen_input(x, dtype), train, **options, **call)
    return y.astype(dtype), new


def call_whitening(
    options: Mapping[str, Any],
    params: BatchNormParams,
    state: WhitenState,
    x: jax.Array,
    train: bool | jax.Array,
    *,
    dtype: Any,
    advice: str,
    **call: Any,
) -> tuple[jax.Array, WhitenState]:
    """Whiten `x` into `dtype`, or that to which x and `params` promote, in training with the new statistics."""
    check_axis(options["axis"], x.ndim)
    dtype = choose_output_dtype(x, *params, dtype=dtype)
    check_features(x, options["axis"], state.mean.shape, advice, **params._asdict())
    y, new = whiten_apply(params, state, widen_input(x, dtype), train, **options, **call)
    return y.astype(dtype), new


def call_lstm(
    options: Mapping[str, Any],
    params: LSTMParams,
    state: LSTMState,
    carry: LSTMCarry,
    x: jax.Array,
    train: bool | jax.Array,
    *,
    dtype: Any,
    **call: Any,
) -> tuple[LSTMCarry, jax.Array, LSTMState]:
    """Make one step of the LSTM in `dtype`, or that to which x and `params` promote."""
    x = x.astype(choose_output_dtype(x, *jax.tree.leaves(params), dtype=dtype))
    return lstm_step(params, state, carry, x, train, **options, **call)


def negate_flag(evaluate: Any) -> Any:
    """Return `not evaluate`, for the `use_running_average` of a module: a bool or a scalar bool array."""
    try:
        flag = check.flag("use_running_average", evaluate)
    except TypeError as error:
        fix = "A mask is passed by name, `mask=`; a linen layer takes the number of features from `x`."
        raise TypeError(f"{error} {fix}") from None
    # A NumPy bool is known while tracing: one mode, one program.
    return jnp.logical_not(flag) if isinstance(flag, jax.Array) else not flag


def read_constant(value: Any) -> Any:
    """Return a scalar array as a Python number, which is compiled in."""
    scalar = hasattr(value, "dtype") and np.shape(value) == () and not isinstance(value, Tracer)
    return float(value) if scalar else value


def check_features(
    x: jax.Array, axis: int | Sequence[int], made_for: tuple[int, ...], advice: str, **given: jax.Array | None
) -> None:
    """Check that `x`, and scale and bias where they are given, have the features that the layer was made for."""
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


def choose_affine(name: str, own: Any, given: Any, num_domains: int | None) -> Any:
    """Return the layer's own scale or bias, or the one given to the call: conditional batch normalization."""
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


def make_domain_shape(num_domains: int | None) -> tuple[int, ...]:
    """Return the leading axis of domains as a shape, `()` without domains."""
    return () if num_domains is None else (check.positive("num_domains", num_domains),)


def _choose_apply(num_domains: int | None, domain: Any, example_weight: Any) -> Callable[..., Any]:
    """Return `bn_apply`, or the variant of it for domains or for an example weight."""
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
    return partial(_apply_with_weight, example_weight)


def _apply_with_weight(weight, params, state, x, train, *, axis, epsilon, mask, activation, residual, **training):
    """Apply `bn_apply` in training and `apply_with_example_weight` in evaluation."""
    shared = {"axis": axis, "epsilon": epsilon, "mask": mask}
    if train is True:
        check.number("example_weight", weight, 0, 1)
        return bn_apply(params, state, x, train, activation=activation, residual=residual, **shared, **training)
    if train is not False:
        raise TypeError(
            "`use_running_average` must be a Python bool in a layer with `example_weight`, which has two programs; got "
            "a traced one."
        )
    residual = None if residual is None else check.like_x("residual", residual, x)
    # In the dtype of sums, as the epilogue of the plain layer: rounded once.
    z = apply_with_example_weight(params, state, x.astype(check.accumulation_dtype(x.dtype)), weight, **shared)
    return apply_epilogue(activation, None, None, residual, x.dtype, z), state
