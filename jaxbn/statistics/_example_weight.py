"""Evaluation with running statistics mixed with each example's own."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxbn._core import check
from jaxbn._core.batch_moments import batch_moments
from jaxbn._core.layout import to_layout
from jaxbn._core.normalize import FAR
from jaxbn._core.reduction import Reduction
from jaxbn._core.state import BatchNormParams, BatchNormState, check_params, check_state


def apply_with_example_weight(
    params: BatchNormParams,
    state: BatchNormState,
    x: ArrayLike,
    weight: ArrayLike,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
) -> jax.Array:
    """Normalize in evaluation by a mixture of the running statistics and each example's own.

    `y = scale (x - mean) / sqrt(var + epsilon) + bias` with the first two raw moments mixed: with a = `weight`, for
    each example, `mean = (1 - a) mean_running + a mean_example` and `var = (1 - a) (var_running + mean_running^2) + a
    (var_example + mean_example^2) - mean^2`, where the example's moments are over its positions. `weight=0` is
    `bn_apply(..., train=False)`, `weight=1` instance normalization.

    Args:
        params: from `bn_init`.
        state: from training.
        x: `[batch, *positions, features]`, any floating dtype; the features along `axis`. Without positions an example
            has mean x and variance 0.
        weight: in [0, 1], a number or a scalar array. The paper chooses it on a validation set.
        axis: the feature axis or axes, without 0.
        epsilon: added to the variance.
        mask: True where a value counts, broadcastable to `x`. The rest is normalized too, but enters no example's
            moments; NaN, infinity and values more than 2^32 std from the mean give the bias. An example without any
            value is normalized as if `weight` were 0.

    Returns:
        An array of x's shape and dtype, differentiable with respect to everything.

    Raises:
        TypeError, ValueError: an argument of another type, shape or range than stated.

    Example:
        >>> import jax.numpy as jnp, jaxbn
        >>> params, state = jaxbn.bn_init(1)
        >>> x = jnp.array([[[2.0], [4.0]]])
        >>> for weight in (0.0, 0.5, 1.0):
        ...     print(jaxbn.statistics.apply_with_example_weight(params, state, x, weight).ravel().round(2))
        [2. 4.]
        [0.28 1.39]
        [-1.  1.]

    Summers and Dinneen 2020, "Four things everyone should know to improve batch normalization", section 3.1.
    """
    x = check.floating("x", x)
    features = check.axes(axis, x.ndim)
    if 0 in features:
        raise ValueError(f"`axis` must leave axis 0 of `x` to the examples; got {axis} for x of shape {x.shape}.")
    params, state = check_params(x, params, features), check_state(x, state, features)
    weight = jnp.asarray(check.number("weight", weight, 0, 1), float)
    mask = None if mask is None else check.mask(mask, x.shape)
    return _normalize_mixed(features, check.epsilon(epsilon, x.dtype), params, state.mean, state.var, x, weight, mask)


@partial(jax.jit, static_argnums=(0, 1))
def _normalize_mixed(features, epsilon, params, mean, var, x, weight, mask):
    dtype, shape = check.accumulation_dtype(x.dtype), x.dtype
    x, a = x.astype(dtype), weight.astype(dtype)
    mean, var = (to_layout(v.astype(dtype), features, x.ndim) for v in (mean, var))
    scale, bias = (None if v is None else to_layout(v.astype(dtype), features, x.ndim) for v in params)
    positions = tuple(i for i in range(1, x.ndim) if i not in features)
    own = batch_moments(Reduction(positions), x, mask)
    a = a if mask is None else jnp.where(own.count > 0, a, 0)
    # The difference of raw moments, without the squares that cancel in it.
    var = (1 - a) * var + a * own.var + a * (1 - a) * jnp.square((own.mean - mean) + own.tail)

    def subtract_means(x):
        # Each mean is subtracted before the mixing: nothing cancels at either end.
        return (1 - a) * (x - mean) + a * ((x - own.mean) - own.tail)

    factor = lax.rsqrt(var + epsilon)
    d = subtract_means(x)
    if mask is not None:  # as in `bn_apply`, an entry so far from the mean can only be padding
        read = mask | (jnp.abs(d) * factor < FAR)
        d = jnp.where(read, subtract_means(jnp.where(read, x, mean)), 0)
    y = d * (factor if scale is None else scale * factor)
    return (y if bias is None else y + bias).astype(shape)
