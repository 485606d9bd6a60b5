"""Floor 2: batch normalization as a pure function."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxbn import _check
from jaxbn._complex import complex_layer, moments_of_parts
from jaxbn._moments import Moments, from_layout, split, to_layout
from jaxbn._momentum import Momentum
from jaxbn._normalize import Frame, Rule, layer
from jaxbn._renorm import Renorm, corrected, limits
from jaxbn._save_inputs import saved
from jaxbn._scope import Scope, moments_of_groups, moments_over, shards
from jaxbn._state import BatchNormParams, BatchNormState, updated


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
    ghost_batches: int = 1,
    renorm: Renorm | None = None,
) -> tuple[jax.Array, BatchNormState]:
    """Batch normalization: the output, and the state after this batch.

    `y = activation(scale (x - mean) / sqrt(var + epsilon) + bias + residual)`. In training mean and var are those of
    `x`, over all axes but `axis`, over all devices of `axis_name`, over what `mask` lets count; and the running values
    become `momentum * running + (1 - momentum) * batch`. In evaluation they are the running ones.

    Args:
        params: from `bn_init`; `scale` and `bias` `[*features]`, any floating dtype. Or what a network has computed, by
            feature or `[batch, *features]`, for each example along the first reduced axis: conditional batch
            normalization, `y[n] = scale[n] x^[n] + bias[n]` (de Vries et al. 2017, "Modulating early visual processing
            by language").
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
        ghost_batches: into how many equal parts the first reduced axis is divided, each normalized by its own
            statistics, `x^[n] = (x[n] - mean_g) / sqrt(var_g + epsilon)` for n in part g; the state is updated by those
            of all parts together (Hoffer et al. 2017, "Train longer, generalize better"). In training the parts must
            divide the batch, or it is refused; in evaluation there are none. Under sharded `jit` as many as devices
            make normalization local. Under `axis_name` they are parts of what each member holds, from two on local to
            it, and the state is that of all members.
        renorm: batch renormalization; see `Renorm`.

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
    reduced = tuple(a for a in range(x.ndim) if a not in features)
    _check.parameters(x, params, state, features, reduced[:1])
    names, groups = (), None
    if train is not False:  # evaluation shares nothing
        names = _check.axis_names(axis_name)
        groups = _check.groups(axis_index_groups, names)
    parts = _check.positive("ghost_batches", ghost_batches)
    if parts > 1 and train is not False:  # in evaluation they need not divide the batch
        _check.parts(parts, *((x.shape[reduced[0]], shards(x, reduced[0])) if reduced else (1, 1)))
    bounds = limits(renorm, state.count)
    if jnp.iscomplexobj(x) and (parts > 1 or bounds):
        raise TypeError(f"`ghost_batches` and `renorm` are for real `x`; got {x.dtype}.")
    rule = Rule(
        Scope(reduced, names, groups),
        _check.epsilon(epsilon, x.dtype),
        train if isinstance(train, bool) else None,
        None if parts == 1 or train is False else (reduced[0], parts),
    )
    if residual is not None:
        residual = _check.floating("residual", residual, or_complex=jnp.iscomplexobj(x))
        if residual.shape != x.shape:
            raise ValueError(f"`residual` must have the shape of `x`, {x.shape}; got {residual.shape}.")
    if not isinstance(unbiased_running_var, (bool, np.bool_)):
        raise TypeError(f"`unbiased_running_var` must be True or False; got {unbiased_running_var!r}.")
    mask = None if mask is None else _check.mask(mask, x.shape)
    closed_over = []
    if activation is not None:
        like = jax.eval_shape(partial(_before_activation, rule, features), params, state, x, mask, residual)
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
        bounds,
        mask,
        residual,
        closed_over,
    )
    return y, new


# Compiled even when called eagerly: op by op, XLA's sums are less accurate and every step is a pass over memory.
@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _apply(
    rule, features, activation, unbiased, params, state, x, train, update, momentum, bounds, mask, residual, closed_over
):
    dtype = _check.working(x.dtype)
    x = saved(x)
    affine = BatchNormParams(None, None)
    if any(v is not None and v.ndim > len(features) for v in params):  # by example: behind the normalization
        affine = BatchNormParams(*(_spread(v, rule, features, x, dtype) for v in params))
        params = BatchNormParams(None, None)
    shared, at, ndim = rule.scope, features, x.ndim
    if rule.groups is not None:
        axis = rule.groups[0]
        at, ndim = tuple(a + (a > axis) for a in features), ndim + 1
        shared = shared._replace(reduced=tuple(a + 1 for a in shared.reduced))
        rule = rule._replace(scope=Scope(shared.reduced))  # a group is normalized where it is
        mask = None if mask is None else split(mask, *rule.groups)

    def laid_out(v, dtype) -> Any:
        return None if v is None else to_layout(v.astype(dtype), at, ndim)

    var = laid_out(state.var, _check.real(dtype))
    scale, bias, mean = (laid_out(v, dtype) for v in (*params, state.mean))
    running = Moments(jnp.ones_like(var), mean, var, jnp.zeros_like(mean))
    run = complex_layer if jnp.iscomplexobj(x) else layer
    if rule.follows is False:
        return run(rule, activation, x, scale, bias, Frame(running, mask), affine, residual, closed_over), state
    # The statistics enter as constants: how they move with x is part of the derivative rule. (Complex x has none.)
    if run is complex_layer:
        batch = own = moments_of_parts(rule, x.astype(dtype), mask)
    elif rule.groups is not None:
        batch, own = moments_of_groups(shared, rule.groups[0], lax.stop_gradient(split(x, *rule.groups)), mask)
    else:
        batch, own = moments_over(shared, lax.stop_gradient(x), mask)
    own = jax.tree.map(saved, own)
    frame = Frame(own, mask)
    if rule.follows is None:
        frame = Frame(jax.tree.map(partial(jnp.where, train), own, running), mask, train)
    if bounds is not None:
        # In evaluation the statistics are the running ones, and there is nothing to correct.
        scale, bias = corrected(bounds, rule.epsilon, scale, bias, frame.m, running)
    y = run(rule, activation, x, scale, bias, frame, affine, residual, closed_over)
    batch = jax.tree.map(lambda v: from_layout(v, features), batch)
    return y, updated(state, batch, momentum, unbiased, jnp.logical_and(update, train))


def _spread(v, rule, features, x, dtype):
    """A scale or bias, by feature or by example and feature, laid out to broadcast against x."""
    if v is None:
        return None
    axes = features if v.ndim == len(features) else (rule.scope.reduced[0], *features)
    return to_layout(v.astype(dtype), axes, x.ndim)


def _before_activation(rule, features, params, state, x, mask, residual):
    """Something of the shape, dtype, sharding and replication of what the activation gets."""
    dtype = _check.working(x.dtype)
    y = x.astype(dtype) if residual is None else x.astype(dtype) + residual.astype(dtype)
    for v in params:
        y = y if v is None else y + _spread(v, rule, features, x, dtype)
    for v in jax.tree.leaves((state, mask)):
        y = y + jnp.sum(v).astype(dtype)
    return y
