"""Normalization by given statistics, and padding under a mask."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxbn._core import check
from jaxbn._core.batch_moments import zero_masked
from jaxbn._core.layout import lay_out_affine, shard_as_features, to_layout
from jaxbn._core.moments import Moments, broadcast_fields
from jaxbn._core.state import BatchNormParams, BatchNormState, check_params, check_state

# Number of std from the mean beyond which a masked entry is padding, NaN too, and is read as the mean. Finite is not
# enough: an activation may cube x_hat, and its derivative would be infinite.
FAR = 2.0**32


def normalize(
    params: BatchNormParams,
    m: Moments | BatchNormState,
    x: ArrayLike,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
) -> jax.Array:
    """Normalize by given moments, and apply scale and bias.

    `y = scale (x - mean) / sqrt(var + epsilon) + bias`. One of the three parts of batch normalization, for layers that
    `bn_apply` does not have: `moments`, `normalize`, `update_state`. Together they are `bn_apply(..., train=True)`;
    with the running statistics, `normalize(params, state, x)` is `bn_apply(..., train=False)`, a frozen layer
    (FrozenBatchNorm).

    Args:
        params: from `bn_init`; `scale` and `bias` `[*features]`, or `[batch, *features]`, for each example along the
            first axis of x that is not a feature axis.
        m: the statistics to normalize by, `[*features]`: `Moments` from `moments`, `pool` or `pool_named`, or a
            `BatchNormState`.
        x: input, floating point, any shape. Complex x is normalized by a state only.
        axis: the feature axis or axes; the last by default, 1 for channels first.
        epsilon: added to the variance.
        mask: True where a value counts, broadcastable to `x`. Other values are normalized too, but NaN, infinity and
            values more than 2^32 std from the mean give x_hat = 0. Give it to `moments` as well.

    Returns:
        An array of x's shape and dtype, computed in float32 (float64 for float64). Differentiable with respect to
        params, m and x in every mode; the gradient of the batch's own moments flows through `m`. A feature whose
        moments have count 0 gives x_hat = 0.

    Raises:
        TypeError, ValueError: an argument of another type, shape or range than stated; the message says which.

    Example:
        Statistics for each group of a batch, and one update of the state by all of them (ghost batch normalization):

        >>> import jax, jax.numpy as jnp, jaxbn
        >>> params, state = jaxbn.bn_init(1)
        >>> groups = jnp.array([[[1.0], [3.0]], [[10.0], [30.0]]])
        >>> m = jax.vmap(jaxbn.moments)(groups)
        >>> y = jax.vmap(lambda m, x: jaxbn.normalize(params, m, x))(m, groups)
        >>> state = jaxbn.update_state(state, jaxbn.pool(m), momentum=0.9)
        >>> print(y.ravel().round(3), state.mean.round(3), state.count)
        [-1.  1. -1.  1.] [1.1] 1

    Ioffe and Szegedy 2015, "Batch normalization", algorithm 1. In training `bn_apply` moves and keeps less memory: its
    derivative is written by hand, and this one is differentiated by JAX.
    """
    x = check.floating("x", x, or_complex=True)
    features = check.axes(axis, x.ndim)
    examples = tuple(a for a in range(x.ndim) if a not in features)[:1]
    epsilon = check.epsilon(epsilon, x.dtype)
    keep = None if mask is None else check.mask(mask, x.shape)
    dtype = check.accumulation_dtype(x.dtype)

    def lay_out(v):
        return shard_as_features(to_layout(v, features, x.ndim), x)

    params = check_params(x, params, features, examples)
    if isinstance(m, Moments):
        m = _check_moments(m, x, features)
    else:
        m = check_state(x, m, features, name="m", kind="`jaxbn.Moments`, or a state of `bn_init`")
    scale, bias = (lay_out_affine(v, features, x, dtype) for v in params)
    mean, var = lay_out(m.mean).astype(dtype), lay_out(m.var).astype(check.real(dtype))
    if not isinstance(m, Moments):
        return normalize_by(mean, var, epsilon, x, keep, scale, bias).astype(x.dtype)
    inverse = inverse_std(var, epsilon, lay_out(m.count))
    near, wide = find_padding(keep, x, mean, inverse)
    d = (wide - mean) - lay_out(m.tail).astype(dtype)
    return apply_affine(zero_masked(near, d), inverse if scale is None else scale * inverse, bias).astype(x.dtype)


def _check_moments(m: Moments, x: jax.Array, features: tuple[int, ...]) -> Moments:
    """Return `m` with fields of one shape, those of the features of x."""
    if jnp.iscomplexobj(x):
        raise TypeError(f"`m` must be a state for complex `x`, {x.dtype}: `Moments` are real. Use `bn_apply` to train.")
    m, wanted = broadcast_fields(m), tuple(x.shape[a] for a in features)
    if m.mean.shape != wanted:
        raise ValueError(
            f"`m` must have shape {wanted}, as x along its feature axes {features}; got {m.mean.shape}. Take the "
            "moments along the same `axis`; for moments of several groups use `jax.vmap`, or `jaxbn.pool` them."
        )
    return m


def normalize_by(
    mean: jax.Array,
    var: jax.Array,
    epsilon: float,
    x: jax.Array,
    mask: jax.Array | None,
    scale: jax.Array | None,
    bias: jax.Array | None,
) -> jax.Array:
    """Return `scale (x - mean) / sqrt(var + epsilon) + bias` by given statistics, laid out to broadcast against x."""
    inverse = inverse_std(var, epsilon).astype(mean.dtype)
    near, x = find_padding(mask, x, mean, inverse)
    return apply_affine(zero_masked(near, x - mean), inverse if scale is None else scale * inverse, bias)


def inverse_std(var: jax.Array, epsilon: float, count: jax.Array | None = None) -> jax.Array:
    """Return `1 / sqrt(var + epsilon)`, or 0 where `count` is 0."""
    inverse = lax.rsqrt(var + epsilon)
    return inverse if count is None else jnp.where(count > 0, inverse, 0)


def find_padding(
    mask: jax.Array | None, x: jax.Array, mean: jax.Array, inverse: jax.Array
) -> tuple[jax.Array | None, jax.Array]:
    """Return which entries are not padding, those that count and those that are near, and x with 0 for NaN padding.

    Without a mask, None and x. Nothing is computed from replaced entries, not even under `jax_debug_nans`.
    """
    if mask is None:
        return None, x.astype(mean.dtype)
    known = mask | jnp.isfinite(x)
    x = jnp.where(known, x, 0).astype(mean.dtype)
    near = mask | (jnp.abs(lax.stop_gradient((x - mean) * inverse)) < FAR)
    return known & near & (inverse > 0), x


def apply_affine(v: jax.Array, scale: jax.Array | None, bias: jax.Array | None) -> jax.Array:
    """Return `scale v + bias`."""
    v = v if scale is None else v * scale
    return v if bias is None else v + bias
