"""Schedules of the kept fraction. `count` is the number of updates that the state has seen."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

Momentum = float | jax.Array | Callable[[jax.Array], jax.Array]


# No closure: equal settings are to be equal, so that equal models are one program, and to pickle.
@dataclass(frozen=True)
class _ZeroDebiased:
    decay: float

    def __call__(self, count):
        # (1 - d^t) / (1 - d^(t+1)) by expm1, which does not cancel for d near 1.
        rate = math.log(max(self.decay, 1e-30))
        count = jnp.asarray(count).astype(float)
        return self.decay * jnp.expm1(rate * count) / jnp.expm1(rate * (count + 1))


def zero_debiased(decay: float = 0.99) -> Callable[[ArrayLike], jax.Array]:
    """Exponential moving average without the bias towards the initial value.

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
    if not isinstance(decay, (int, float)) or not 0 <= decay < 1:
        raise ValueError(f"`decay` must be a number in [0, 1); got {decay!r}. The plain mean is `cumulative_average`.")
    return _ZeroDebiased(decay)


def cumulative_average(count: ArrayLike) -> jax.Array:
    """The plain mean of all batch statistics so far: `count / (count + 1)` is kept. Torch's `momentum=None`.

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
