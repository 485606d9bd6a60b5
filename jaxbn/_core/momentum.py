"""The momentum of the running statistics: the fraction that is kept, a number or a schedule of the update count."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

Momentum = float | jax.Array | Callable[[jax.Array], jax.Array]


# Not a closure: equal settings compare equal, so that equal models compile once, and they can be pickled.
@dataclass(frozen=True)
class _ZeroDebiased:
    decay: float

    def __call__(self, count):
        # (1 - d^t) / (1 - d^(t+1)) by expm1, which does not cancel for d near 1.
        rate = math.log(max(self.decay, 1e-30))
        count = jnp.asarray(count).astype(float)
        return self.decay * jnp.expm1(rate * count) / jnp.expm1(rate * (count + 1))


def zero_debiased(decay: float = 0.99) -> Callable[[ArrayLike], jax.Array]:
    """Return a momentum schedule: an exponential moving average without bias towards the initial value.

    After t updates with statistics `b_1 ... b_t` the running value is `sum_i decay^(t-i) b_i / sum_i decay^(t-i)`:
    the first batch is copied, and the weights are those of the plain average from there on
    (Kingma and Ba 2015, "Adam", section 3, where the same correction is made by a division at every read).

    Args:
        decay: the fraction that is kept in the long run, in [0, 1).

    Returns:
        A schedule for `momentum`: `count -> decay (1 - decay^count) / (1 - decay^(count + 1))`, a scalar. Equal
        decays give equal schedules.

    Raises:
        ValueError: `decay` is not in [0, 1).

    Example:
        >>> import jaxbn
        >>> keep = jaxbn.zero_debiased(0.9)
        >>> print(keep(0), round(float(keep(1)), 4), round(float(keep(1000)), 4))
        0.0 0.4737 0.9
    """
    if not isinstance(decay, (int, float, np.floating)) or not 0 <= decay < 1:
        raise ValueError(f"`decay` must be a number in [0, 1); got {decay!r}. The plain mean is `cumulative_average`.")
    return _ZeroDebiased(float(decay))


def cumulative_average(count: ArrayLike) -> jax.Array:
    """Return the fraction to keep for the plain mean of all batch statistics so far: `count / (count + 1)`.

    PyTorch's `momentum=None`.

    Args:
        count: updates seen, an integer scalar.

    Returns:
        The fraction to keep, a scalar.

    Example:
        >>> import jaxbn
        >>> print(jaxbn.cumulative_average(0), jaxbn.cumulative_average(3))
        0.0 0.75

    It averages variances, so it leaves out the spread of the batch means; to pool moments exactly use `pool`.
    """
    count = jnp.asarray(count).astype(float)
    return count / (count + 1)


def split_momentum(value: Any, count: jax.Array) -> tuple[Any, Any]:
    """Return the fractions to keep and to take after `count` updates, from a momentum or a schedule of it."""
    if callable(value):
        value = value(count)
    number = isinstance(value, (int, float, np.number, np.ndarray, jax.Array)) and not isinstance(value, bool)
    if not number or not jnp.issubdtype(jnp.result_type(value), jnp.number) or jnp.iscomplexobj(value):
        raise TypeError(
            f"`momentum` must be a number or a function of `state.count`; got {value!r}. "
            "PyTorch's None is `jaxbn.cumulative_average` here."
        )
    if np.shape(value) != ():
        raise ValueError(f"`momentum` must be a scalar, and a schedule must return one; got shape {np.shape(value)}.")
    concrete = None if isinstance(value, Tracer) else float(value)
    if concrete is not None and not 0 <= concrete <= 1:
        raise ValueError(f"`momentum` is the fraction that is kept and must lie in [0, 1]; got {concrete}.")
    # From a Python float the complement is exact to more digits than float32 has.
    return value, 1 - value
