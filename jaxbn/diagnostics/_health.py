"""Diagnose a batch normalization from its arrays and a batch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxbn._core import check
from jaxbn._core.fetch import fetch_array
from jaxbn._core.state import BatchNormParams, BatchNormState, check_record
from jaxbn.diagnostics._advice import find_problems
from jaxbn.diagnostics._compare import Batch, compare_batch, run_modes
from jaxbn.diagnostics._report import Health, LayerHealth


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
    """Find the problems of a layer: the first step when evaluation is much worse than training.

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
        name: the layer's name in the table and in messages.

    Returns:
        A tuple of one `LayerHealth`; `print` shows it as a table with advice. `Health([*a, *b])` is one table of two.

    Raises:
        TypeError, ValueError: as `bn_apply`; and where the arrays are traced: it runs on the host, outside `jit`.

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
    params = check_record("params", params, "the params of `bn_init`", BatchNormParams)
    state = check_record("state", state, "the state of `bn_init`", BatchNormState, ("mean", "var"))
    features = np.shape(state.mean)
    for field, v in (("params.scale", params.scale), ("params.bias", params.bias), ("state.var", state.var)):
        if v is not None and np.shape(v)[np.ndim(v) - len(features) :] != features:
            raise ValueError(
                f"`{field}` must have the features of `state.mean`, {features}; got {np.shape(v)}. Give the params and "
                "the state of one layer."
            )
    require_concrete(x, mask, params.scale, params.bias, state.mean, state.var, state.count)
    batch, epsilon = None, check.epsilon(epsilon, np.float32)
    if x is not None:
        modes = run_modes(params, state, check.floating("x", x), axis=axis, epsilon=epsilon, mask=mask)
        batch = compare_batch(modes, axis, epsilon, mask)
    return Health([judge_layer(name, params, state, epsilon, [batch])])


def require_concrete(*arrays: Any) -> None:
    """Raise TypeError unless the arrays hold numbers."""
    if any(isinstance(v, Tracer) for v in arrays):
        raise TypeError("`health` looks at numbers, which are not there while a program is traced: call it outside.")


def judge_layer(path: str, params: Any, state: Any, epsilon: float, batches: Sequence[Batch | None]) -> LayerHealth:
    """Return the record of a layer, with the worst of the batches of several calls."""
    require_concrete(params.scale, params.bias, state.mean, state.var, state.count)
    mean, var, scale, bias = (
        np.zeros(0) if v is None else fetch_array(v).astype(np.complex128 if np.iscomplexobj(v) else np.float64)
        for v in (state.mean, state.var, params.scale, params.bias)
    )
    updates = None if state.count is None else int(np.min(fetch_array(state.count)))
    size = np.abs(np.atleast_1d(scale))  # of a layer whose one feature has no axis
    small = 1e-3 * np.median(size, axis=-1, keepdims=True) if size.size else 0.0
    seen = [batch for batch in batches if batch is not None and batch.examples]
    layer = LayerHealth(
        path=path,
        channels=var.size,
        updates=updates,
        untouched=bool(np.all(mean == 0) and np.all(var == 1)) if updates is None else updates == 0,
        flat=int(np.sum(var <= epsilon)),
        unscaled=int(np.sum(size <= small)),
        not_finite=sum(int(np.sum(~np.isfinite(v))) for v in (scale, bias, mean, var)),
        batch=max(seen, key=lambda b: (not np.all(np.isfinite(b[1:4])), max(b[1:4])), default=None),
        found={},
    )
    return layer._replace(found=find_problems(layer))
