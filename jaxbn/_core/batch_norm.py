"""Batch normalization as a pure function."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxbn._core import check
from jaxbn._core.batch_moments import batch_moments
from jaxbn._core.complex_pairs import from_pairs, join_moments, to_pairs
from jaxbn._core.epilogue import apply_epilogue
from jaxbn._core.ghost import divide_batch, map_parts, pool_parts
from jaxbn._core.layout import from_layout, lay_out_affine, shard_as_features, to_layout
from jaxbn._core.moments import Moments
from jaxbn._core.momentum import Momentum, split_momentum
from jaxbn._core.normalize import normalize_by
from jaxbn._core.normalize_batch import normalize_by_batch
from jaxbn._core.reduction import Reduction, check_axis_names, check_groups
from jaxbn._core.renorm import Renorm, choose_statistics, correct_affine, evaluate_limits
from jaxbn._core.save_inputs import mark_saved
from jaxbn._core.state import BatchNormParams, BatchNormState, check_params, check_state
from jaxbn._core.update_state import update_running


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
    """Normalize a batch; return the output, and the state after this batch.

    `y = activation(scale (x - mean) / sqrt(var + epsilon) + bias + residual)`. In training mean and var are those of
    `x` over all axes but `axis`, over all devices of `axis_name`, over the values that `mask` counts; and the running
    values become `momentum * running + (1 - momentum) * batch`. With `axis_name`, and under `jit` with sharded arrays,
    the statistics of a batch are cross-replica (SyncBatchNorm). In evaluation mean and var are the running ones
    (FrozenBatchNorm).

    Args:
        params: from `bn_init`; `scale` and `bias` `[*features]`, any floating dtype. Or the output of a network, by
            feature or `[batch, *features]`, for each example along the first reduced axis: conditional batch
            normalization, `y[n] = scale[n] x_hat[n] + bias[n]` (de Vries et al. 2017, "Modulating early visual
            processing by language").
        state: from `bn_init` or an earlier call; `mean` and `var` `[*features]`, `count` `[]`.
        x: input, floating point, any shape, `features = [x.shape[a] for a in axis]`. Statistics are computed in
            float32 (float64 for float64). Complex x has a complex mean and a real variance.
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
            but do not enter them; NaN, infinity and values more than 2^32 std from the mean give x_hat = 0. A mask
            with fewer dimensions than `x` that would fit its first axes as well as its last is refused.
        update: False leaves the state as it is: a second pass over a batch, or a step that loss scaling skips.
        activation: any elementwise function of one JAX array; in training it costs no memory for the backward pass.
        residual: added before the activation, of x's shape.
        ghost_batches: the number of equal parts of the batch along its first reduced axis, each normalized by its own
            statistics, `x_hat[n] = (x[n] - mean_g) / sqrt(var_g + epsilon)` for n in part g; the state is updated by
            those of all parts together (Hoffer et al. 2017, "Train longer, generalize better"). In training their
            number must divide the batch size; in evaluation it has no effect. They are parts of the global batch: under
            `axis_name` their number must be a multiple or a divisor of the number of members, or of each group's. With
            one part a device normalization is local. The activation gets one part at a time.
        renorm: batch renormalization; see `Renorm`.

    Returns:
        `(y, new_state)`: `y` of x's shape and dtype, `new_state` of the same shapes and dtypes as `state`,
        without gradient. A feature keeps its running statistics if it has no values, with `unbiased_running_var` if
        it has a single one, if the sum of their squares about the mean is not finite in the dtype of the statistics
        (float32: n var below 3e38; beyond, its output is NaN), or if the dtype of the state cannot hold the new ones;
        `count` grows if any feature's statistics changed. In evaluation `new_state` is `state`, and the program is a
        few plain operations.

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
    in the paper; PyTorch's feature axis is 1, Keras's epsilon 1e-3. One value per feature gives x_hat = 0.
    """
    x = check.floating("x", x, or_complex=True)
    features = check.axes(axis, x.ndim)
    reduced = tuple(a for a in range(x.ndim) if a not in features)
    train, update = check.flag("train", train), check.flag("update", update)
    params = check_params(x, params, features, reduced[:1])
    state = check_state(x, state, features)
    epsilon = check.epsilon(epsilon, x.dtype)
    mask = None if mask is None else check.mask(mask, x.shape)
    residual = None if residual is None else check.like_x("residual", residual, x)
    ghost_batches = check.positive("ghost_batches", ghost_batches)
    keep_take, bounds = split_momentum(momentum, state.count), evaluate_limits(renorm, state.count)
    unbiased = check.boolean("unbiased_running_var", unbiased_running_var)

    if jnp.iscomplexobj(x) and (ghost_batches > 1 or bounds):
        raise TypeError(f"`ghost_batches` and `renorm` are for real `x`; got {x.dtype}.")

    dtype, out = check.accumulation_dtype(x.dtype), x.dtype
    mean, var = (shard_as_features(to_layout(v, features, x.ndim), x) for v in (state.mean, state.var))
    mean, var = mean.astype(dtype), var.astype(check.real(dtype))
    scale, bias = (lay_out_affine(v, features, x, dtype) for v in params)
    if train is False:
        z = normalize_by(mean, var, epsilon, x, mask, scale, bias)
        return apply_epilogue(activation, None, None, residual, out, z), state

    names = check_axis_names(axis_name)
    whole = Reduction(reduced, names, check_groups(axis_index_groups, names))
    parts, r = divide_batch(ghost_batches, whole, x)
    # A scale or bias by example differs between entries that share statistics: it follows, with the activation.
    by_entry, leave = (None, None), lambda z: z
    if jnp.iscomplexobj(x) or any(v is not None and v.ndim > len(features) for v in params):
        by_entry, scale, bias = (scale, bias), None, None
    if jnp.iscomplexobj(x):
        r, leave = r._replace(components=(x.ndim,)), from_pairs
        x, mean, var, mask = to_pairs(x), to_pairs(mean), var[..., None], None if mask is None else mask[..., None]
    running = Moments(jnp.ones_like(mean, var.dtype), mean, var, jnp.zeros_like(mean))

    def layer(x, mask, *after: Any):
        """Return the output and the moments of a batch that is normalized as one."""
        x = mark_saved(x)
        # Parts that follow the shards of a batch decide alone about a second pass, and so without a guess.
        m = jax.tree.map(mark_saved, batch_moments(r, x, mask, running.mean if parts == 1 else None, epsilon))
        used, gain, offset = choose_statistics(train, epsilon, m, running, scale, bias)
        if bounds is not None:
            gain, offset = correct_affine(bounds, epsilon, gain, offset, used, running)

        def finish(z):
            return apply_epilogue(activation, *after, dtype=out, z=leave(z))

        return normalize_by_batch(r, epsilon, finish, x, mask, used, train, gain, offset), m

    y, m = map_parts(layer, parts, r, x, mask, *by_entry, residual)
    m = pool_parts(lax.stop_gradient(m), parts, whole, r)
    m = jax.tree.map(lambda v: from_layout(v, features), join_moments(m) if r.components else m)
    return y, update_running(state, m, keep_take, unbiased, jnp.logical_and(update, train))
