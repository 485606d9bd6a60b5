"""The reference: batch normalization in float64 NumPy, one channel at a time, and the plain formula in jnp.

The NumPy functions share nothing with the library but the definition. The jnp function is the definition as one would
write it on paper, for JAX to differentiate; in float64 it is exact enough to be compared with at 1e-9.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

EPSILON = 1e-5


class Forward(NamedTuple):
    """The output `[*x]` of a training pass, and its statistics and counts `[*features]`."""

    y: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    count: np.ndarray  # pyright: ignore[reportIncompatibleMethodOverride]


def channels(x: np.ndarray, axis: int | Sequence[int] = -1):
    """Yield `(index, at)` for each channel: its place in a `[*features]` array, and the slice of `x` that it is."""
    axes = [a % x.ndim for a in ([axis] if isinstance(axis, int) else axis)]
    for index in np.ndindex(*[x.shape[a] for a in axes]):
        at: list[Any] = [slice(None)] * x.ndim
        for a, i in zip(axes, index, strict=True):
            at[a] = i
        yield index, tuple(at)


def feature_shape(x: np.ndarray, axis: int | Sequence[int] = -1) -> tuple[int, ...]:
    """Return `[*features]`, in the order of `axis`."""
    return tuple(x.shape[a] for a in ([axis] if isinstance(axis, int) else axis))


def training(x, scale=None, bias=None, *, axis: int | Sequence[int] = -1, epsilon=EPSILON, mask=None) -> Forward:
    """Return the output in training, and the statistics of the batch."""
    x = np.asarray(x, np.float64)
    counted = np.broadcast_to(True if mask is None else np.asarray(mask, bool), x.shape)
    shape = feature_shape(x, axis)
    y, mean, var, count = np.zeros(x.shape), np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for c, at in channels(x, axis):
        values = x[at][counted[at]]
        count[c] = values.size
        if values.size:
            mean[c] = values.sum() / values.size
            var[c] = ((values - mean[c]) ** 2).sum() / values.size
        y[at] = _affine((x[at] - mean[c]) / np.sqrt(var[c] + epsilon), scale, bias, c)
    return Forward(y, mean, var, count)


def evaluation(x, mean, var, scale=None, bias=None, *, axis: int | Sequence[int] = -1, epsilon=EPSILON) -> np.ndarray:
    """Return the output in evaluation, by the running statistics `mean` and `var`."""
    x, y = np.asarray(x, np.float64), np.zeros(np.shape(x))
    mean, var = np.asarray(mean, np.float64), np.asarray(var, np.float64)
    for c, at in channels(x, axis):
        y[at] = _affine((x[at] - mean[c]) / np.sqrt(var[c] + epsilon), scale, bias, c)
    return y


def _affine(unit, scale, bias, c):
    unit = unit if scale is None else unit * np.asarray(scale, np.float64)[c]
    return unit if bias is None else unit + np.asarray(bias, np.float64)[c]


def gradients(x, dy, scale=None, *, axis: int | Sequence[int] = -1, mask=None):
    """Return `(dx, dscale, dbias)` of `sum(dy * y)` in training, in closed form.

    With n counted values, s = sqrt(var + EPSILON) and x_hat = (x - mean) / s, of a channel:
    dbias = sum dy, dscale = sum dy x_hat, and dx = scale / s (dy - (dbias + x_hat dscale) / n), the last term only for
    the values that entered the statistics.
    """
    x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    counted = np.broadcast_to(True if mask is None else np.asarray(mask, bool), x.shape)
    unit, _, var, count = training(x, axis=axis, mask=mask)
    shape = feature_shape(x, axis)
    dx, dscale, dbias = np.zeros(x.shape), np.zeros(shape), np.zeros(shape)
    for c, at in channels(x, axis):
        dscale[c], dbias[c] = (dy[at] * unit[at]).sum(), dy[at].sum()
        through_statistics = counted[at] * (dbias[c] + unit[at] * dscale[c]) / max(count[c], 1)
        gain = (1.0 if scale is None else np.asarray(scale, np.float64)[c]) / np.sqrt(var[c] + EPSILON)
        dx[at] = gain * (dy[at] - through_statistics)
    return dx, dscale, dbias


def running(start, batches: Sequence[np.ndarray], keep: Sequence[float]) -> np.ndarray:
    """Return the running value after `batches` of statistics, of which the i-th step keeps the fraction `keep[i]`."""
    value = np.asarray(start, np.float64)
    for batch, kept in zip(batches, keep, strict=True):
        value = kept * value + (1 - kept) * batch
    return value


def plain(x, scale=None, bias=None, **options) -> jax.Array:
    """Normalize the features, x's last axis, as on paper, for JAX to differentiate.

    Options: `mask` (bool, of x's shape), `residual`, `activation`, `running` (a pair of mean and variance) for
    evaluation, and with it `train` for a choice between the two.
    """
    reduced = tuple(range(x.ndim - 1))

    def lay(v):
        return jnp.expand_dims(v, reduced)

    mask, pair = options.get("mask"), options.get("running")
    counted = jnp.ones(x.shape, x.dtype) if mask is None else mask.astype(x.dtype)
    n = counted.sum(reduced, keepdims=True)
    mean = (x * counted).sum(reduced, keepdims=True) / n
    var = (jnp.square(x - mean) * counted).sum(reduced, keepdims=True) / n
    if pair is not None:
        train = options.get("train", False)
        mean, var = jnp.where(train, mean, lay(pair[0])), jnp.where(train, var, lay(pair[1]))
    y = (x - mean) / jnp.sqrt(var + EPSILON)
    y = y if scale is None else y * lay(scale)
    y = y if bias is None else y + lay(bias)
    y = y if options.get("residual") is None else y + options["residual"]
    return y if options.get("activation") is None else options["activation"](y)
