"""Floor 2: running statistics moved towards other data, and towards each example."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxbn import _check
from jaxbn._batch_moments import batch_moments
from jaxbn._layout import sharded_as, to_layout
from jaxbn._moments import Moments, broadcast_fields
from jaxbn._normalize import FAR
from jaxbn._reduction import Reduction
from jaxbn._state import BatchNormParams, BatchNormState


def adapt(state: BatchNormState, m: Moments, *, source_weight: ArrayLike = 0.0) -> BatchNormState:
    """A state whose statistics are those of other data, or a mixture of its own and those.

    With n = `m.count` and N = `source_weight`, `mean = N / (N + n) mean_source + n / (N + n) mean_target`, and the same
    for the variance. With N = 0 the target's statistics replace the source's (AdaBN); with N infinite nothing changes.

    Args:
        state: the source's, from training; `mean` and `var` `[*features]`.
        m: moments of the inputs that the layer has on the target data, from `moments`, `pool` or `pool_batches`;
            `[*features]`.
        source_weight: how many values of the target the source is worth, at least 0; infinity too.

    Returns:
        The new state, of the same shapes and dtypes. A feature without values in `m`, or whose moments are not
        finite, in the dtype of the state either, keeps its statistics. `count` is 1 at least, so that training with a
        momentum schedule does not begin by forgetting them.

    Raises:
        TypeError, ValueError: `source_weight` is not a number from 0 to infinity, or `m` has another shape than the
            state.

    Example:
        >>> import jax.numpy as jnp, jaxbn
        >>> _, state = jaxbn.bn_init(1)
        >>> m = jaxbn.moments(jnp.array([[2.0], [6.0]]))
        >>> new = jaxbn.adapt(state, m)
        >>> print(new.mean, new.var, jaxbn.adapt(state, m, source_weight=2).var)
        [4.] [4.] [2.5]

    Li et al. 2016, "Revisiting batch normalization for practical domain adaptation"; Schneider et al. 2020, "Improving
    robustness against common corruptions by covariate shift adaptation". The paper counts images, not values, because
    the values of one image are much alike: for images of h x w positions pass `N * h * w`. As published, the variances
    are averaged; the variance between the two means, N n / (N + n)^2 (mean_source - mean_target)^2, is left out.
    `jaxbn.pool` of the target's moments and `Moments(N, state.mean, state.var)` has it in.
    """
    m = broadcast_fields(m)
    if not all(hasattr(state, name) for name in ("mean", "var", "count")):
        raise TypeError(f"`state` must be the state of `bn_init`; got {type(state).__name__}.")
    if m.mean.shape != state.mean.shape:
        raise ValueError(
            f"`m` must have the shape of the state, {state.mean.shape}; got {m.mean.shape}. "
            "Take the moments of what enters this layer, along the layer's `axis`."
        )
    m = jax.tree.map(partial(sharded_as, state.mean), m)
    weight = jnp.asarray(_check.number("source_weight", source_weight, 0), m.var.dtype)
    fine = (m.count > 0) & jnp.isfinite(m.mean) & jnp.isfinite(m.var)
    take = jnp.where(fine, m.count / jnp.where(fine, weight + m.count, 1), 0)

    def mixed(source, target):
        mixture = (1 - take) * source.astype(target.dtype) + take * target
        # What has no share may be anything, NaN too.
        return jnp.where(take == 1, target, jnp.where(take == 0, source.astype(target.dtype), mixture))

    mean, var = mixed(state.mean, m.mean).astype(state.mean.dtype), mixed(state.var, m.var).astype(state.var.dtype)
    fits = ~fine | (jnp.isfinite(mean) & jnp.isfinite(var))
    mean, var = (jnp.where(fits, new, old) for new, old in ((mean, state.mean), (var, state.var)))
    return BatchNormState(mean, var, jnp.maximum(state.count, 1))


def weighed_apply(
    params: BatchNormParams,
    state: BatchNormState,
    x: ArrayLike,
    weight: ArrayLike,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
) -> jax.Array:
    """Evaluation in which each example has a say in the statistics that normalize it.

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
            moments; NaN, infinity and what is more than 2^32 deviations out give the bias. An example without any value
            is normalized as if `weight` were 0.

    Returns:
        An array of x's shape and dtype, differentiable with respect to everything.

    Raises:
        TypeError, ValueError: an argument of another type, shape or range than stated.

    Example:
        >>> import jax.numpy as jnp, jaxbn
        >>> params, state = jaxbn.bn_init(1)
        >>> x = jnp.array([[[2.0], [4.0]]])
        >>> for weight in (0.0, 0.5, 1.0):
        ...     print(jaxbn.weighed_apply(params, state, x, weight).ravel().round(2))
        [2. 4.]
        [0.28 1.39]
        [-1.  1.]

    Summers and Dinneen 2020, "Four things everyone should know to improve batch normalization", section 3.1.
    """
    x = _check.floating("x", x)
    features = _check.axes(axis, x.ndim)
    if 0 in features:
        raise ValueError(f"`axis` must leave axis 0 of `x` to the examples; got {axis} for x of shape {x.shape}.")
    _check.parameters(x, params, state, features, ())
    weight = jnp.asarray(_check.number("weight", weight, 0, 1), float)
    mask = None if mask is None else _check.mask(mask, x.shape)
    return _weighed(features, _check.epsilon(epsilon, x.dtype), params, state.mean, state.var, x, weight, mask)


@partial(jax.jit, static_argnums=(0, 1))
def _weighed(features, epsilon, params, mean, var, x, weight, mask):
    dtype, shape = _check.accumulation_dtype(x.dtype), x.dtype
    x, a = x.astype(dtype), weight.astype(dtype)
    mean, var = (to_layout(v.astype(dtype), features, x.ndim) for v in (mean, var))
    scale, bias = (None if v is None else to_layout(v.astype(dtype), features, x.ndim) for v in params)
    positions = tuple(i for i in range(1, x.ndim) if i not in features)
    own = batch_moments(Reduction(positions), x, mask)
    a = a if mask is None else jnp.where(own.count > 0, a, 0)
    # The difference of raw moments, without the squares that cancel in it.
    var = (1 - a) * var + a * own.var + a * (1 - a) * jnp.square((own.mean - mean) + own.tail)

    def centred(x):
        # Each mean is subtracted before the mixing: nothing cancels at either end.
        return (1 - a) * (x - mean) + a * ((x - own.mean) - own.tail)

    factor = lax.rsqrt(var + epsilon)
    d = centred(x)
    if mask is not None:  # as in `bn_apply`, what is so far out that it can only be padding
        read = mask | (jnp.abs(d) * factor < FAR)
        d = jnp.where(read, centred(jnp.where(read, x, mean)), 0)
    y = d * (factor if scale is None else scale * factor)
    return (y if bias is None else y + bias).astype(shape)
