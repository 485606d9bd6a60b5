"""Floor 2: batch normalization as two pure functions."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxbn import _check
from jaxbn._complex import complex_layer, moments_of_parts
from jaxbn._moments import Moments, Scope, from_layout, moments_over, to_layout
from jaxbn._momentum import Momentum
from jaxbn._normalize import Frame, Rule, layer
from jaxbn._save_inputs import saved


class BatchNormParams(NamedTuple):
    """What is learned: `scale` (gamma) and `bias` (beta), `[*features]`; None where the layer has none."""

    scale: jax.Array | None
    bias: jax.Array | None


class BatchNormState(NamedTuple):
    """What is averaged over batches: `mean` and `var`, `[*features]`, and `count`, the int32 number of updates."""

    mean: jax.Array
    var: jax.Array
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]


def bn_init(
    num_features: int | Sequence[int],
    *,
    dtype: DTypeLike = jnp.float32,
    scale: ArrayLike | None = 1.0,
    bias: ArrayLike | None = 0.0,
    mean: ArrayLike = 0.0,
    var: ArrayLike = 1.0,
) -> tuple[BatchNormParams, BatchNormState]:
    """Parameters and state of a batch normalization layer.

    Args:
        num_features: the size of the feature axis, or a tuple of sizes in the order of `bn_apply`'s `axis`.
        dtype: of scale and bias, floating point. The state is float32, or float64 if `dtype` is. For complex input
            complex; the variance is real.
        scale: initial value, broadcast to `[*num_features]`; None for a layer without it.
        bias: likewise.
        mean: initial running mean, broadcast to `[*num_features]`.
        var: initial running variance, likewise.

    Returns:
        `(params, state)`.

    Raises:
        TypeError: `num_features` is not made of ints, or `dtype` is not floating point.
        ValueError: a negative size, or an initial value of another shape.

    Example:
        >>> import jaxbn
        >>> params, state = jaxbn.bn_init(3, bias=None)
        >>> print(params.scale, params.bias, state.mean, state.var, state.count)
        [1. 1. 1.] None [0. 0. 0.] [1. 1. 1.] 0
    """
    shape = _check.sizes(num_features)
    try:
        dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
    except TypeError:
        raise TypeError(f"`dtype` must be a floating point dtype; got {dtype!r}.") from None
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"`dtype` must be floating point; got {dtype}.")
    kept = _check.working(dtype)
    params = BatchNormParams(
        None if scale is None else _check.initial("scale", scale, dtype, shape),
        None if bias is None else _check.initial("bias", bias, dtype, shape),
    )
    state = BatchNormState(
        _check.initial("mean", mean, kept, shape),
        _check.initial("var", var, _check.real(kept), shape),
        jnp.zeros((), jnp.int32),
    )
    return params, state


def bn_apply(
    params: BatchNormParams,
    state: BatchNormState,
    x: ArrayLike,
    train: bool | jax.Array,
    *,
    axis: int | Sequence[int] = -1,
    momentum: Momentum = 0.99,
    epsilon: float = 1e-5,
    unbiased_running_var: bool = False,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    mask: ArrayLike | None = None,
    update: bool | jax.Array = True,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    residual: ArrayLike | None = None,
) -> tuple[jax.Array, BatchNormState]:
    """Batch normalization: the output, and the state after this batch.

    `y = activation(scale (x - mean) / sqrt(var + epsilon) + bias + residual)`. In training mean and var are those of
    `x`, over all axes but `axis`, over all devices of `axis_name`, over what `mask` lets count; and the running values
    become `momentum * running + (1 - momentum) * batch`. In evaluation they are the running ones.

    Args:
        params: from `bn_init`; `scale` and `bias` `[*features]`, any floating dtype.
        state: from `bn_init` or an earlier call; `mean` and `var` `[*features]`, `count` `[]`.
        x: input, floating point, any shape, `features = [x.shape[a] for a in axis]`. Statistics are computed in
            float32 (float64 for float64) whatever its dtype. Complex x has a complex mean and a real variance.
        train: True for batch statistics, False for running ones. A scalar bool array makes one program of both.
        axis: the feature axis or axes; the last by default, 1 for channels first.
        momentum: the fraction of the running value that is *kept*, in [0, 1], or a function of `state.count` that
            gives it, such as `zero_debiased(0.99)` and `cumulative_average`.
        epsilon: added to the variance.
        unbiased_running_var: average `var * n / (n - 1)`, as PyTorch does. The normalizing variance stays biased.
        axis_name: named axis or axes of `shard_map`, `pmap` or `vmap` whose members share statistics. Members may
            hold different numbers of unmasked values. Under plain `jit` with sharded arrays leave it out: statistics
            are those of the whole array.
        axis_index_groups: a partition of the members; each part has its own statistics.
        mask: True where a value counts, broadcastable to `x`. Other values are normalized by the same statistics,
            but do not enter them; NaN, infinity and what is more than 2^32 deviations out give x^ = 0.
        update: False leaves the state as it is: a second pass over a batch, or a step that loss scaling skips.
        activation: any elementwise function of arrays; inside the layer it costs no memory for the backward pass.
        residual: added before the activation, of x's shape.

    Returns:
        `(y, new_state)`: `y` of x's shape and dtype, `new_state` of the same shapes and dtypes as `state`,
        without gradient. A feature without values, or whose second moment is not finite in the dtype of the statistics,
        keeps its running ones; `count` grows if any feature's statistics changed. In evaluation `new_state` is `state`.

    Raises:
        TypeError, ValueError: an argument of another type, shape or range than stated; the message says which.

    Example:
        >>> import jax.numpy as jnp, jaxbn
        >>> params, state = jaxbn.bn_init(2)
        >>> y, state = jaxbn.bn_apply(params, state, jnp.array([[1.0, 10.0], [3.0, 30.0]]), train=True, momentum=0.9)
        >>> print(y.round(3), state.mean.round(3), state.count)
        [[-1. -1.]
         [ 1.  1.]] [0.2 2. ] 1

    Ioffe and Szegedy 2015, "Batch normalization", algorithms 1 and 2. Conventions differ: this `momentum` is
    `1 - momentum` of PyTorch; the running variance is biased here, in Flax, Haiku and Keras, unbiased in PyTorch and
    in the paper; PyTorch's feature axis is 1, Keras's epsilon 1e-3. One value per feature gives x^ = 0.
    """
    x = _check.floating("x", x, or_complex=True)
    features = _check.axes(axis, x.ndim)
    train = _check.flag("train", train)
    update = _check.flag("update", update)
    _check.parameters(x, params, state, tuple(x.shape[a] for a in features), features)
    names, groups = (), None
    if train is not False:  # evaluation shares nothing
        names = _check.axis_names(axis_name)
        groups = _check.groups(axis_index_groups, names)
    scope = Scope(tuple(a for a in range(x.ndim) if a not in features), names, groups)
    rule = Rule(scope, _check.epsilon(epsilon, x.dtype), train if isinstance(train, bool) else None)
    if residual is not None:
        residual = _check.floating("residual", residual, or_complex=jnp.iscomplexobj(x))
        if residual.shape != x.shape:
            raise ValueError(f"`residual` must have the shape of `x`, {x.shape}; got {residual.shape}.")
    if not isinstance(unbiased_running_var, (bool, np.bool_)):
        raise TypeError(f"`unbiased_running_var` must be True or False; got {unbiased_running_var!r}.")
    mask = None if mask is None else _check.mask(mask, x.shape)
    closed_over = []
    if activation is not None:
        like = jax.eval_shape(partial(_before_activation, features), params, state, x, mask, residual)
        activation, closed_over = _check.activation(activation, like)
    y, new = _apply(
        rule,
        features,
        activation,
        bool(unbiased_running_var),
        params,
        state,
        x,
        train,
        update,
        _check.momentum(momentum, state.count),
        mask,
        residual,
        closed_over,
    )
    return y, new


# Compiled even when called eagerly: op by op, XLA's sums are less accurate and every step is a pass over memory.
@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _apply(
    rule, features, activation, unbiased, params, state, x, train, update, momentum, mask, residual, closed_over
):
    dtype = _check.working(x.dtype)
    x = saved(x)

    def laid_out(v, dtype) -> Any:
        return None if v is None else to_layout(v.astype(dtype), features, x.ndim)

    var = laid_out(state.var, _check.real(dtype))
    scale, bias, mean = (laid_out(v, dtype) for v in (*params, state.mean))
    running = Moments(jnp.ones_like(var), mean, var, jnp.zeros_like(mean))
    run = complex_layer if jnp.iscomplexobj(x) else layer
    if rule.follows is False:
        return run(rule, activation, x, scale, bias, Frame(running, mask), residual, closed_over), state
    # The statistics enter as constants: how they move with x is part of the derivative rule. (Complex x has none.)
    if run is complex_layer:
        batch = pivoted = moments_of_parts(rule, x.astype(dtype), mask)
    else:
        batch, pivoted = moments_over(rule.scope, lax.stop_gradient(x).astype(dtype), mask)
    frame = Frame(jax.tree.map(saved, pivoted), mask)
    if rule.follows is None:
        frame = Frame(jax.tree.map(partial(jnp.where, train), frame.m, running), mask, train)
    y = run(rule, activation, x, scale, bias, frame, residual, closed_over)
    batch = jax.tree.map(lambda v: from_layout(v, features), batch)
    return y, _updated(state, batch, momentum, unbiased, jnp.logical_and(update, train))


def _before_activation(features, params, state, x, mask, residual):
    """Something of the shape, dtype, sharding and replication of what the activation gets."""
    dtype = _check.working(x.dtype)
    y = x.astype(dtype) if residual is None else x.astype(dtype) + residual.astype(dtype)
    for v in params:
        y = y if v is None else y + to_layout(v.astype(dtype), features, x.ndim)
    for v in jax.tree.leaves((state, mask)):
        y = y + jnp.sum(v).astype(dtype)
    return y


def _updated(state, batch, momentum, unbiased, allowed):
    """The state after one more batch. A feature takes part if it has values and their second moment is finite."""
    keep, take = momentum
    batch = jax.tree.map(partial(_sharded_as, state.mean), batch)
    # n / (n - 1) of a single value is infinite: it has no unbiased variance, and does not take part.
    var = batch.var * (batch.count / (batch.count - 1)) if unbiased else batch.var
    takes_part = allowed & (batch.count > 0) & jnp.isfinite(var + jnp.square(jnp.abs(batch.mean)))

    def average(running, value):
        # In the dtype of the statistics: in bfloat16 0.999 would be 1.
        mixed = keep.astype(value.dtype) * running.astype(value.dtype) + take.astype(value.dtype) * value
        # What is not kept at all may be anything, infinity too.
        mixed = jnp.where(keep == 0, value, mixed)
        return jnp.where(takes_part, mixed.astype(running.dtype), running)

    count = state.count + jnp.any(takes_part).astype(state.count.dtype)
    return lax.stop_gradient(BatchNormState(average(state.mean, batch.mean), average(state.var, var), count))


def _sharded_as(like: jax.Array, v: jax.Array) -> jax.Array:
    """`v` with the sharding of `like`, where the mesh's is explicit: the features of x may be spread otherwise."""
    to = jax.typeof(like).sharding
    return v if jax.typeof(v).sharding.spec == to.spec else jax.sharding.reshard(v, to)
