"""Batch renormalization: the batch's statistics, corrected towards the running ones."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxbn._core import check
from jaxbn._core.moments import Moments

Limit = float | jax.Array | Callable[[jax.Array], jax.Array]


class Renorm(NamedTuple):
    """Batch renormalization: `bn_apply(..., renorm=Renorm(r_max, d_max))`.

    In training `y = scale (x_hat r + d) + bias`, where x_hat is x normalized by the batch, and

        r = clip(std_batch / std_running, 1 / r_max, r_max)
        d = clip((mean_batch - mean_running) / std_running, -d_max, d_max)

    are constants to differentiation, with `std = sqrt(var + epsilon)` and the running statistics as they are before the
    update. In evaluation nothing changes. With `r_max=1, d_max=0` it is batch normalization; with no limits training
    gives the output of evaluation, while the gradient still accounts for the batch's statistics moving with x.

    Attributes:
        r_max: at least 1; a number, a scalar array, or a function of `state.count`.
        d_max: at least 0; likewise.

    Raises:
        TypeError, ValueError: raised by the layer: a limit is not one real number, or below 1 or 0. A traced limit
            cannot be checked.

    Example:
        >>> import jax.numpy as jnp, jaxbn
        >>> params, state = jaxbn.bn_init(1)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> free = jaxbn.Renorm(r_max=float("inf"), d_max=float("inf"))
        >>> y, _ = jaxbn.bn_apply(params, state, x, train=True, renorm=free)
        >>> print(y.ravel().round(2), jaxbn.bn_apply(params, state, x, train=False)[0].ravel().round(2))
        [1. 3.] [1. 3.]

    Ioffe 2017, "Batch renormalization". Running statistics of few batches are poor references: begin with plain
    batch normalization, as `renorm_warmup` does.
    """

    r_max: Limit = 3.0
    d_max: Limit = 5.0


# Not a closure: equal settings compare equal, so that equal models compile once, and they can be pickled.
@dataclass(frozen=True)
class _Ramp:
    low: float
    high: float
    start: float
    end: float

    def __call__(self, count: ArrayLike) -> jax.Array:
        share = (jnp.asarray(count).astype(float) - self.start) / (self.end - self.start)
        return self.low + (self.high - self.low) * jnp.clip(share, 0, 1)


def renorm_warmup(
    r_max: float = 3.0, d_max: float = 5.0, *, start: int = 5000, r_end: int = 40000, d_end: int = 25000
) -> Renorm:
    """Return a `Renorm` whose limits widen with the number of updates, by default as in Ioffe 2017.

    `r_max(count) = 1 + (r_max - 1) ramp(count)` and `d_max(count) = d_max ramp(count)`, where the ramp is 0 up to
    `start` and rises linearly to 1 at `r_end`, or `d_end`.

    Args:
        r_max, d_max: the final limits.
        start: updates of plain batch normalization.
        r_end, d_end: updates after which the limits are reached.

    Returns:
        A `Renorm` of two schedules, equal for equal arguments. The Flax modules keep a count of updates for it.

    Raises:
        TypeError: an argument is not one real number.
        ValueError: `r_max` is below 1, `d_max` or `start` below 0, or a ramp does not end after its start.

    Example:
        >>> import jaxbn
        >>> renorm = jaxbn.renorm_warmup(start=10, r_end=30, d_end=20)
        >>> print([float(renorm.r_max(n)) for n in (0, 20, 40)], [float(renorm.d_max(n)) for n in (0, 20, 40)])
        [1.0, 2.0, 3.0] [0.0, 5.0, 5.0]

    Ioffe 2017, "Batch renormalization: towards reducing minibatch dependence in batch-normalized models": r_max = 1 and
    d_max = 0 for the first 5,000 steps, then "gradually relaxed" to 3 at 40,000 and to 5 at 25,000. The straight line
    between is ours.
    """
    check.number("r_max", r_max, 1)
    check.number("d_max", d_max, 0)
    for name, end in (("r_end", r_end), ("d_end", d_end)):
        check.number(name, end, 0)
        check.number("start", start, 0)
        if not 0 <= start < end:
            raise ValueError(f"`{name}` must be greater than `start`, and that not negative; got {end} and {start}.")
    r, d, begin, r_last, d_last = (
        v if isinstance(v, Tracer) else float(v) for v in (r_max, d_max, start, r_end, d_end)
    )
    return Renorm(_Ramp(1.0, r, begin, r_last), _Ramp(0.0, d, begin, d_last))


def needs_count(renorm: Renorm | None) -> bool:
    """Return whether a limit depends on the number of updates."""
    return isinstance(renorm, Renorm) and any(map(callable, renorm))


def evaluate_limits(renorm: Any, count: jax.Array) -> tuple[Any, Any] | None:
    """Return the two limits after `count` updates; None without renormalization."""
    if renorm is None:
        return None
    if not isinstance(renorm, Renorm):
        raise TypeError(f"`renorm` must be a `jaxbn.Renorm`; got {renorm!r}. Pass `Renorm(r_max=3.0, d_max=5.0)`.")
    found = {name: limit(count) if callable(limit) else limit for name, limit in renorm._asdict().items()}
    return check.number("r_max", found["r_max"], 1), check.number("d_max", found["d_max"], 0)


def choose_statistics(
    train: bool | jax.Array,
    epsilon: float,
    batch: Moments,
    running: Moments,
    scale: jax.Array | None,
    bias: jax.Array | None,
) -> tuple[Moments, jax.Array | None, jax.Array | None]:
    """Return the statistics to normalize by, scale and bias; a traced `train` selects the batch's or the running ones.

    The running ones enter as constants, like the batch's. Their derivative is in scale and bias, as that of r = 1 and
    d = 0 in a renormalization.
    """
    if train is True:
        return batch, scale, bias
    used = jax.tree.map(partial(lax.select, train), batch, lax.stop_gradient(running))
    r, d = _relate(epsilon, lax.stop_gradient(used), running)
    return used, *_compose(scale, bias, jnp.where(train, 1, r), jnp.where(train, 0, d))


def correct_affine(
    bounds: tuple[Any, Any],
    epsilon: float,
    scale: jax.Array | None,
    bias: jax.Array | None,
    batch: Moments,
    running: Moments,
) -> tuple[jax.Array, jax.Array]:
    """Return `scale r` and `scale d + bias`, with which normalization by the batch is renormalization.

    `running` are the statistics before the update. A feature without values has none to correct.
    """
    r_max, d_max = (jnp.asarray(v).astype(batch.var.dtype) for v in bounds)
    r, d = _relate(epsilon, batch, running)
    r, d = jnp.clip(r, 1 / r_max, r_max), jnp.clip(d, -d_max, d_max)
    r, d = (lax.stop_gradient(jnp.where(batch.count > 0, v, n)) for v, n in ((r, 1), (d, 0)))
    return _compose(scale, bias, r, d)


def _relate(epsilon: float, own: Moments, running: Moments) -> tuple[jax.Array, jax.Array]:
    """Return r and d of `x_hat_running = r x_hat_own + d`."""
    std = lax.sqrt(running.var + epsilon)
    return lax.sqrt(own.var + epsilon) / std, ((own.mean - running.mean) + own.tail) / std


def _compose(scale, bias, r: jax.Array, d: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the scale and bias of `scale (r v + d) + bias`."""
    if scale is not None:
        r, d = scale * r, scale * d
    return r, (d if bias is None else bias + d)
