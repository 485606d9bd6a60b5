"""The distance of a result from the exact one, so that no library wins by being wrong.

Batch normalization treats each feature alone, so a few features of a large array are checked in float64 instead of all.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.benchmark.sizes import Case

FEATURES = 8  # that are checked
NEAR, FAR = 1.0, 1e3  # mean / standard deviation of the inputs


class Inputs(NamedTuple):
    """Arrays for a case: x, what is added to the output if anything, the gradient of y, and the rest by feature."""

    x: np.ndarray
    residual: np.ndarray | None
    g: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    mean: np.ndarray
    var: np.ndarray


class Exact(NamedTuple):
    """The exact results in float64, of the features that are checked."""

    y: np.ndarray
    evaluation: np.ndarray
    dx: np.ndarray
    d_scale: np.ndarray
    d_bias: np.ndarray


def inputs(case: Case, offset: float) -> Inputs:
    """Return random arrays for a case, exact in its dtype; x has standard deviation 1 and mean `offset`."""
    rng = np.random.default_rng(0)

    def normal(mean: float = 0.0, std: float = 1.0) -> np.ndarray:
        v = rng.standard_normal(case.shape, np.float32) * np.float32(std) + np.float32(mean)
        return v.astype(jnp.dtype(case.dtype))

    def of_features(mean: float) -> np.ndarray:
        return rng.normal(mean, 0.1, case.shape[-1:]).astype(np.float32)

    x, residual, g = normal(offset), normal() if case.residual else None, normal()
    return Inputs(x, residual, g, of_features(1.0), of_features(0.0), of_features(offset), np.square(of_features(1.0)))


def exact(case: Case, host: Inputs) -> Exact:
    """Return the results by the definition."""
    x, g, scale, bias = (v[..., :FEATURES].astype(np.float64) for v in (host.x, host.g, host.scale, host.bias))
    added = 0.0 if host.residual is None else host.residual[..., :FEATURES].astype(np.float64)
    reduced = tuple(range(x.ndim - 1))

    def normalized(mean, var):
        std = np.sqrt(var + 1e-5)
        unit = (x - mean) / std
        y = unit * scale + bias + added
        return (np.maximum(y, 0) if case.relu else y), unit, std

    y, unit, std = normalized(x.mean(reduced), x.var(reduced))
    # An output of exactly 0 is a rectified one.
    d = np.where(y > 0, g, 0) if case.relu else g
    dx = scale / std * (d - d.mean(reduced) - unit * (d * unit).mean(reduced))
    frozen = (v[:FEATURES].astype(np.float64) for v in (host.mean, host.var))
    return Exact(y, normalized(*frozen)[0], dx, (d * unit).sum(reduced), d.sum(reduced))


def largest(got: np.ndarray, wanted: np.ndarray) -> float | str:
    """Return the largest deviation."""
    return _recorded(np.abs(got - wanted).max())


def relative(got: np.ndarray, wanted: np.ndarray) -> float | str:
    """Return the deviation's root mean square, relative to that of `wanted`.

    Not the largest: where the input of a ReLU is 0 within rounding, its derivative is 0 or 1, and either is right.
    """
    return _recorded(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def _recorded(error: np.floating) -> float | str:
    """Return a number, or words if it is none: JSON has no NaN."""
    return float(error) if math.isfinite(error) else "not finite"
