"""What may be wrong with a batch normalization, from its arrays and from a batch."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxbn._core import check
from jaxbn._core.batch_norm import bn_apply
from jaxbn._core.fetch import fetch_array
from jaxbn._core.state import BatchNormParams, BatchNormState
from jaxbn.diagnostics._report import Batch, Health, LayerHealth, advice


def health(
    params: BatchNormParams,
    state: BatchNormState,
    x: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
    name: str = "the layer",
) -> Health:
    """What may be wrong with a layer: the first thing to look at when evaluation is much worse than training.

    Looks for statistics that were never updated, that are not finite, that hold a share of their initial values, or
    that are not those of `x`; for channels that are constant, and such whose scale is 0. The gaps are
    `max |mean_B - mean| / sqrt(var + epsilon)` and `max |log((var_B + epsilon) / (var + epsilon))|` over channels.

    Args:
        params: as for `bn_apply`.
        state: likewise.
        x: a batch as the layer gets it, from where evaluation is bad; None to look at the arrays alone.
        axis: the feature axis or axes.
        epsilon: added to the variance.
        mask: True where a value of `x` counts.
        name: what the table and the advice call the layer.

    Returns:
        A tuple of one `LayerHealth`; `print` shows it as a table with advice. `Health([*a, *b])` is one table of two.

    Raises:
        TypeError, ValueError: as `bn_apply`; and where the arrays are traced, for this is for people.

    Example:
        >>> import jax.numpy as jnp, jaxbn
        >>> found = jaxbn.diagnostics.health(*jaxbn.bn_init(3), name="first")
        >>> found[0].untouched
        True
        >>> print(found.problems[0].split(";")[0])
        first: The running statistics were never updated

    The variance of the batch is the biased one.

    Source: the checks and their limits are this library's own. Most of the faults are described by Wu and Johnson 2021,
    "Rethinking 'batch' in BatchNorm".
    """
    for owner, names, given in (("params", ("scale", "bias"), params), ("state", ("mean", "var", "count"), state)):
        if not all(hasattr(given, name) for name in names):
            raise TypeError(f"`{owner}` must be the {owner} of `bn_init`; got {type(given).__name__}.")
    concrete(x, mask, params.scale, params.bias, state.mean, state.var, state.count)
    batch = None
    if x is not None:
        x = check.floating("x", x)
        _, batch = compared(params, state, x, axis=axis, epsilon=epsilon, mask=mask)
    return Health([judged(name, params, state, state.count, epsilon, [batch])])


def is_traced(*arrays: Any) -> bool:
    """Return whether one of `arrays` holds no numbers yet."""
    return any(isinstance(v, Tracer) for v in arrays)


def plain(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that a compiled one was made of, into which can be seen."""
    while hasattr(call, "lower") and hasattr(call, "__wrapped__"):
        call = call.__wrapped__  # type: ignore[attr-defined]
    return call


def warn_if_unseen(seen: Iterable[Sequence[Batch | None]]) -> None:
    """Warn where no layer showed a batch, and one was called with what is traced, for which stands None."""
    batches = [batch for of_layer in seen for batch in of_layer]
    if batches and not any(batches):
        warnings.warn(
            "No layer could be compared with the batch: they run in a compiled or mapped function or in a loop, which "
            "is not seen into. Call the plain function, not what `jax.jit` made of it.",
            stacklevel=3,
        )


def concrete(*arrays: Any) -> None:
    """That the arrays hold numbers."""
    if is_traced(*arrays):
        raise TypeError("`health` looks at numbers, which are not there while a program is traced: call it outside.")


def compared(
    params: BatchNormParams, state: BatchNormState, x: jax.Array, *, axis: Any, epsilon: float, mask: Any, **rest: Any
) -> tuple[jax.Array, Batch]:
    """What the layer gives in training, and how far that is from evaluation."""
    kept = check.accumulation_dtype(x.dtype)
    mean, var = (jnp.asarray(v).astype(kept) for v in (state.mean, state.var))
    state = BatchNormState(mean, var, jnp.zeros((), jnp.int32))
    # One program of both modes. Nothing of the running statistics is kept, so that the new ones are the batch's.
    (training, own), (evaluation, _) = (
        bn_apply(params, state, x, jnp.array(train), axis=axis, epsilon=epsilon, mask=mask, momentum=0.0, **rest)
        for train in (True, False)
    )
    mean, var, own_mean, own_var = (fetch_array(v, np.float64) for v in (state.mean, state.var, own.mean, own.var))
    counted = np.broadcast_to(True if mask is None else fetch_array(mask, bool), x.shape)
    first = next((a for a in range(x.ndim) if a not in check.axes(axis, x.ndim)), None)
    others = tuple(a for a in range(x.ndim) if a != first)
    examples = 1 if first is None else int(np.sum(np.any(counted, axis=others)))
    apart = np.where(counted, np.abs(fetch_array(training, np.float64) - fetch_array(evaluation, np.float64)), 0)
    with np.errstate(all="ignore"):  # what is not finite is said elsewhere
        gaps = np.abs(own_mean - mean) / np.sqrt(var + epsilon), np.abs(np.log((own_var + epsilon) / (var + epsilon)))
        mean_gap, var_gap, output_gap = (float(np.max(v, initial=0)) for v in (*gaps, apart))
        unlearned = _unlearned(mean, var, own_mean, own_var, epsilon)
    return training, Batch(examples, mean_gap, var_gap, output_gap, unlearned)


def _unlearned(mean, var, own_mean, own_var, epsilon) -> float | None:
    """The share w for which running = w initial + (1 - w) batch, by least squares, if that is what they are."""
    std = np.sqrt(own_var + epsilon)
    way = np.concatenate(
        [(-own_mean / std).ravel(), ((1 - own_var) / std**2).ravel()]
    )  # from the batch's to the initial values
    gone = np.concatenate([((mean - own_mean) / std).ravel(), ((var - own_var) / std**2).ravel()])
    share = float(np.dot(way, gone) / max(np.dot(way, way), 1e-12))
    off = np.linalg.norm(gone - share * way)
    # One channel fits by chance, many do not; but the batch is a sample, and the fit is not exact.
    fits = mean.size > 1 and 0.1 < share < 1.1 and off < 0.25 * np.linalg.norm(gone)
    return min(share, 1.0) if fits else None


def reached(norm: str, state: BatchNormState) -> BatchNormState:
    """Of an LSTM's statistics, `[*stack, max_steps, features]`, those of the steps that training has come to."""
    concrete(*state)
    mean, var, count = (fetch_array(v).copy() for v in state)
    if norm == "recurrent_norm" and count.shape[-1] > 1:
        # h starts at zero, so that the first step has no variance, and is not at fault for it.
        var[..., 0, :] = np.maximum(var[..., 0, :], 1)
    # The steps behind use the last of them.
    rows = (count > 0) | ~np.any(count > 0, axis=-1, keepdims=True)
    return BatchNormState(mean[rows], var[rows], count[rows])  # pyright: ignore[reportArgumentType]


def of_whitening(mean: Any, cov: Any, count: Any) -> BatchNormState:
    """The statistics of a whitening as those of a normalization: of each feature its own variance."""
    concrete(mean, cov, count)
    var = np.diagonal(fetch_array(cov), axis1=-2, axis2=-1).reshape(np.shape(mean))
    return BatchNormState(mean, var, count)  # pyright: ignore[reportArgumentType]


def judged(
    path: str, params: Any, state: Any, count: Any, epsilon: float, batches: Sequence[Batch | None]
) -> LayerHealth:
    """The record of a layer, of the worst of what several calls of it showed."""
    concrete(params.scale, params.bias, state.mean, state.var, count)
    mean, var, scale, bias = (
        np.zeros(0) if v is None else fetch_array(v).astype(np.complex128 if np.iscomplexobj(v) else np.float64)
        for v in (state.mean, state.var, params.scale, params.bias)
    )
    updates = None if count is None else int(np.min(fetch_array(count)))
    size = np.abs(scale)
    small = 1e-3 * np.median(size, axis=-1, keepdims=True) if size.size else 0.0
    seen = [batch for batch in batches if batch is not None]
    layer = LayerHealth(
        path=path,
        channels=var.size,
        updates=updates,
        untouched=bool(np.all(mean == 0) and np.all(var == 1)) if updates is None else updates == 0,
        flat=int(np.sum(var <= epsilon)),
        unscaled=int(np.sum(size <= small)),
        not_finite=sum(int(np.sum(~np.isfinite(v))) for v in (scale, bias, mean, var)),
        batch=max(seen, key=lambda b: (not np.all(np.isfinite(b[1:4])), max(b[1:4])), default=None),
        problems=(),
    )
    return layer._replace(problems=advice(layer))
