"""Fold evaluation-mode batch normalization into the linear layer before or after it."""

import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbn._core import check
from jaxbn._core.layout import to_layout
from jaxbn._core.state import BatchNormParams, BatchNormState, check_record

# Borders of x itself, or none: normalization commutes with them.
_EXACT = ("VALID", "CIRCULAR", "REFLECT")


def fold(
    params: BatchNormParams,
    state: BatchNormState,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    epsilon: float = 1e-5,
    axis: int | Sequence[int] = -1,
) -> tuple[jax.Array, jax.Array]:
    """Fold a normalization into the linear layer before it: return kernel and bias of both together.

    `kernel' = a kernel` and `bias' = a (bias - mean) + beta` with `a = scale / sqrt(var + epsilon)` and the
    normalization's bias `beta`. Exact for each layer that is linear in the kernel: dense, and convolution with any
    padding, stride, dilation and grouping, transposed too.

    Args:
        params: of the normalization, `[*features]`.
        state: likewise.
        kernel: floating point, with the output features along `axis`: `[in, out]`, `[*window, in / groups, out]`.
        bias: of the layer, `[*features]`; or with more axes, as flax's `LinearGeneral` and `ConvLocal` have it, and
            the features along `axis` as in `kernel`; None for a layer without one.
        epsilon: of the normalization.
        axis: the axis or axes of `kernel` that are its output features, in the order of the normalization's: -1 for
            dense layers and convolutions, -2 for flax's `ConvTranspose(transpose_kernel=True)`, (-2, -1) for a dense
            layer with two feature axes.

    Returns:
        `(kernel', bias')`: `kernel'` of the shape and dtype of `kernel`; `bias'` of those of `bias`, or else
        `[*features]` in the dtype of `kernel`, so that the layer's output keeps its dtype. Computed in float32 at
        least, rounded once.

    Raises:
        TypeError, ValueError: the arrays are not floating point or do not belong together.

    Example:
        >>> import jax.numpy as jnp, jaxbn
        >>> params, state = jaxbn.bn_init(2, mean=3.0, var=4.0)
        >>> x, kernel = jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 2.0], [3.0, 4.0]])
        >>> y, _ = jaxbn.bn_apply(params, state, x @ kernel, train=False)
        >>> kernel, bias = jaxbn.inference.fold(params, state, kernel)
        >>> print(y.round(2), bool(jnp.allclose(x @ kernel + bias, y)))
        [[2.  3.5]] True

    Jacob et al. 2018, "Quantization and training of neural networks for efficient integer-arithmetic-only inference",
    section 3.2. Where features have a mean of many standard deviations, the folded layer takes the difference of two
    large numbers, as the layer and its normalization did: of the digits of the kernel's dtype those of |mean| / std
    are lost, 4 of float32's 7 at 10000. A mean that comes from the layer's own bias costs nothing.
    """
    kernel, shape = _check_arrays(params, state, kernel), np.shape(state.mean)
    axes = _check_axes(kernel, axis)
    found = tuple(kernel.shape[a] for a in axes)
    if found != shape:
        raise ValueError(
            f"`kernel` must have the normalization's features {shape} along axis {axis}; got {kernel.shape}, which has "
            f"{found} there. Name by `axis` where the kernel has its output features."
        )
    bias = None if bias is None else _check_bias(bias, shape, axis)
    a, shift = compute_affine(params, state, bias, epsilon=epsilon, dtype=kernel.dtype, axis=axis)
    folded = kernel.astype(a.dtype) * to_layout(a, axes, kernel.ndim)
    return folded.astype(kernel.dtype), shift.astype(kernel.dtype if bias is None else bias.dtype)


def fold_into_next(
    params: BatchNormParams,
    state: BatchNormState,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    padding: Any = None,
    groups: int = 1,
    epsilon: float = 1e-5,
    axis: int | Sequence[int] = -2,
) -> tuple[jax.Array, jax.Array]:
    """Fold a normalization into the linear layer after it: return kernel and bias of both together.

    `kernel'[.., i, o] = a_i kernel[.., i, o]` and `bias'[o] = bias[o] + sum_i b_i kernel[.., i, o]`, summed over the
    window too, with `a = scale / sqrt(var + epsilon)` and `b = beta - mean a`. Exact only if every output sees the
    whole kernel: not with zeros around x, which the normalization would have to leave zero, and not for a transposed
    convolution, which this function cannot tell from another by its kernel.

    Args:
        params: of the normalization, `[*features]`.
        state: likewise.
        kernel: `[in, out]` or `[*window, in / groups, out]`, floating point; the outputs are on the last axis.
        bias: of the layer, `[out]`; None for a layer without one.
        padding: of the layer, as flax takes it. Must be given where the kernel has more than two axes, and must be
            "VALID", zeros, "CIRCULAR" or "REFLECT"; for a window of 1 "SAME" is as good.
        groups: the convolution's `feature_group_count`.
        epsilon: of the normalization.
        axis: the axis or axes of `kernel` that are its input features. For a dense layer on a flattened
            `[height, width, features]`, reshape its kernel to `[height * width, features, out]` and back.

    Returns:
        `(kernel', bias')`, `bias'` `[out]`, with dtypes as `fold` has them.

    Raises:
        TypeError, ValueError: as `fold`; and a padding with which it is not exact.

    Example:
        >>> import jax.numpy as jnp, jaxbn
        >>> params, state = jaxbn.bn_init(2, mean=3.0, var=4.0)
        >>> x, kernel = jnp.array([[1.0, 5.0]]), jnp.array([[1.0, 2.0], [3.0, 4.0]])
        >>> y, _ = jaxbn.bn_apply(params, state, x, train=False)
        >>> folded, bias = jaxbn.inference.fold_into_next(params, state, kernel)
        >>> print((y @ kernel).round(3), (x @ folded + bias).round(3))
        [[2. 2.]] [[2. 2.]]

    Source: as `fold`.
    """
    kernel, shape = _check_arrays(params, state, kernel), np.shape(state.mean)
    if kernel.ndim < 2:
        raise ValueError(f"`kernel` must have input and output features, [..., in, out]; got shape {kernel.shape}.")
    axes, last = _check_axes(kernel, axis), kernel.ndim - 1
    if last in axes:
        raise ValueError(f"`axis` must name input features; got {axis!r}, among them the last, where the outputs are.")
    _check_padding(padding, [kernel.shape[i] for i in range(last) if i not in axes], kernel.ndim)
    found, groups = tuple(kernel.shape[i] for i in axes), _check_groups(groups, kernel.shape[-1])
    # Output o of a grouped convolution reads the inputs of its own group.
    if (groups * found[0], *found[1:]) != shape if found else shape != ():
        raise ValueError(
            f"`kernel` must have the normalization's features {shape}, divided by `groups`, along axis {axis}; got "
            f"{kernel.shape}, which has {found} there with groups={groups}."
        )
    bias = None if bias is None else _check_bias(bias, (kernel.shape[-1],))
    a, b = compute_affine(params, state, None, epsilon=epsilon, dtype=kernel.dtype)
    wide = kernel.astype(a.dtype)
    if groups > 1:
        if len(axes) > 1:
            raise ValueError(f"`groups` must be 1 for several input axes; got groups={groups}, axis={axis!r}.")
        a, b = (jnp.repeat(v.reshape(groups, -1).T, kernel.shape[-1] // groups, 1) for v in (a, b))
        axes = (*axes, last)
    a, b = (to_layout(v, axes, kernel.ndim) for v in (a, b))
    shift = jnp.sum(wide * b, tuple(range(last)))
    shift = shift if bias is None else shift + bias.astype(shift.dtype)
    return (wide * a).astype(kernel.dtype), shift.astype(kernel.dtype if bias is None else bias.dtype)


def compute_affine(
    params: BatchNormParams,
    state: BatchNormState,
    bias: jax.Array | None,
    *,
    epsilon: float,
    dtype: Any,
    axis: int | Sequence[int] = -1,
) -> tuple[jax.Array, jax.Array]:
    """Return `a` and `a (bias - mean) + beta`, in float32 at least: evaluation makes `a x` and that of `x + bias`.

    The features of a bias that has more axes are along `axis`.
    """
    wide = jnp.dtype(jnp.float64 if jnp.float64 in (dtype, state.mean.dtype) else jnp.float32)
    a = jax.lax.rsqrt(state.var.astype(wide) + check.epsilon(epsilon, wide))
    a = a if params.scale is None else a * params.scale.astype(wide)

    def along(v: jax.Array) -> jax.Array:
        if bias is None or bias.ndim == v.ndim:
            return v
        return to_layout(v, check.axes(axis, bias.ndim), bias.ndim)

    # The difference first: where the mean is the bias's doing, the two cancel and no digit is lost.
    mean = along(state.mean.astype(wide))
    centred = (-mean if bias is None else bias.astype(wide) - mean) * along(a)
    return a, centred if params.bias is None else centred + along(params.bias.astype(wide))


def _check_arrays(params: Any, state: Any, kernel: Any) -> jax.Array:
    kernel = check.floating("kernel", kernel)
    for owner, record, given in (("state", BatchNormState, state), ("params", BatchNormParams, params)):
        needed = record._fields[:2]  # not the count
        check_record(owner, given, f"the {owner} of `bn_init`", record, needed)
        for name in needed:
            value = getattr(given, name)
            if value is None:
                continue
            shape = check.floating(f"{owner}.{name}", value).shape
            if shape != np.shape(state.mean):
                raise ValueError(
                    f"`{owner}.{name}` must have the shape of `state.mean`, {np.shape(state.mean)}; got {shape}."
                )
    return kernel


def _check_axes(kernel: jax.Array, axis: int | Sequence[int]) -> tuple[int, ...]:
    try:
        return check.axes(axis, kernel.ndim)
    except ValueError as error:
        raise ValueError(f"{str(error).split(' Name')[0]} It is of `kernel`, {kernel.shape}.") from None


def _check_bias(bias: Any, shape: tuple[int, ...], axis: int | Sequence[int] | None = None) -> jax.Array:
    bias = check.floating("bias", bias)
    found = bias.shape
    if axis is not None and bias.ndim > len(shape):
        found = tuple(bias.shape[a] for a in check.axes(axis, bias.ndim))
    if found != shape:
        raise ValueError(f"`bias` must have the shape of the layer's output features, {shape}; got {bias.shape}.")
    return bias


def _check_groups(value: Any, outputs: int) -> int:
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        raise TypeError(f"`groups` must be an int, the convolution's `feature_group_count`; got {value!r}.") from None
    if number < 1 or outputs % number:
        raise ValueError(f"`groups` must be positive and divide the {outputs} output features; got {value!r}.")
    return number


def _check_padding(padding: Any, window: Sequence[int], ndim: int) -> None:
    if padding is None and ndim == 2:
        return
    if isinstance(padding, str):
        kind = padding.upper()  # as in lax
        exact = kind in _EXACT or (kind == "SAME" and all(size == 1 for size in window))
    else:  # numbers, pairs of them, or both
        exact = all(np.all(v == 0) for v in jax.tree.leaves(padding, is_leaf=lambda v: v is None))
    if not exact:
        raise ValueError(
            "`padding` must leave no zeros around x for the normalization to be folded into the layer after it: the "
            f"normalization would have to leave them zero. It must be one of {_EXACT} or zeros, or 'SAME' with a "
            f"window of 1; got {padding!r} for window {tuple(window)}. Fold into the layer before it instead, by "
            "`jaxbn.inference.fold`."
        )
