"""Moments of a stream of batches, and statistics of a whole network from them."""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbn._core import check
from jaxbn._core.batch_moments import moments
from jaxbn._core.fetch import fetch_array
from jaxbn._core.layout import shard_like
from jaxbn._core.moments import Moments, pool, pool_named
from jaxbn._core.state import BatchNormState
from jaxbn.statistics._adapt import adapt


def pool_batches(moments_of: Callable[[Any], Any], batches: Iterable[Any], *, progress: bool = False) -> Any:
    """Pool the moments of all batches: precise batch normalization.

    `mean = E[mean_B]` and `var = E[var_B + mean_B^2] - mean^2`, weighted by counts: `pool` over a stream, in memory
    that does not grow with it. Pooling is in float64 on the host, so the result is that of all values at once, however
    they are split into batches, and in any order.

    Args:
        moments_of: the `Moments` of a batch, or any tree of them. Compile it (`jax.jit`): it runs once a batch, and is
            compiled once for each shape.
        batches: the arguments of `moments_of`, of any sizes, at least one.
        progress: show batches done and the time left on stderr.

    Returns:
        A tree like that of `moments_of`, for all batches.

    Raises:
        TypeError: `moments_of` returns something else, or `batches` cannot be iterated over.
        ValueError: there is no batch, or one has moments that are not finite; the message says which.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbn
        >>> batches = [jnp.array([[1.0], [2.0]]), jnp.array([[6.0]])]
        >>> m = jaxbn.statistics.pool_batches(jax.jit(jaxbn.moments), batches)
        >>> print(m.count, m.mean, m.var.round(4))
        [3.] [3.] [4.6667]
        >>> _, state = jaxbn.bn_init(1)
        >>> state = jaxbn.statistics.adapt(state, m)  # statistics for evaluation

    Wu and Johnson 2021, "Rethinking 'batch' in BatchNorm", section 3. The common shortcut, which averages the batches'
    variances, leaves out the variance between batches. For a network of several `bn_apply`s take `momentum=0.0`: its
    new states then hold the moments of the batch, and `Moments(n, new.mean, new.var)` with n values can be pooled here.
    (A batch that is not finite leaves a state as it was; this function cannot see that.)
    """
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        raise TypeError(f"`batches` must be an iterable of batches; got {type(batches).__name__}.")
    total: list[Moments] = []
    like = None
    for i, batch in enumerate(_show_progress(batches) if progress else batches):
        leaves, tree = jax.tree.flatten_with_path(moments_of(batch), is_leaf=lambda v: isinstance(v, Moments))
        if not leaves:
            raise TypeError(f"`moments_of` must return `Moments`, or a tree of them; for batch {i} it returned none.")
        found = [_widen(m) for _, m in leaves]
        like = like or (tree, [m.mean.shape for m in found])
        if like != (tree, [m.mean.shape for m in found]):
            raise TypeError(f"`moments_of` must return the same tree for every batch; batch {i} has another.")
        fine = [np.all(np.isfinite(m.mean) & np.isfinite(m.var)) for m in found]
        if not all(fine):
            paths = [path for (path, _), ok in zip(leaves, fine, strict=True) if not ok]
            bad = [jax.tree_util.keystr(path, simple=True, separator="/") or "the moments" for path in paths]
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            raise ValueError(
                f"Every batch must have finite moments; batch {i} (the first is 0) does not, in {', '.join(bad[:3])}"
                f"{more}. Leave that batch out, or mask the values. Nothing was changed."
            )
        total = list(map(_join, total, found)) if total else found
    if like is None:
        raise ValueError("`batches` must hold at least one batch; got none. An iterator is empty after its first use.")
    return jax.tree.unflatten(like[0], [_narrow(m) for m in total])


def recalibrate_states(
    moments_of: Callable[[dict[str, BatchNormState], bool, Any], dict[str, Moments]],
    states: dict[str, BatchNormState],
    batches: Iterable[Any],
    source_weight: ArrayLike,
    layer_by_layer: bool,
    progress: bool,
) -> dict[str, BatchNormState]:
    """Return the states of a network's layers, from the moments of their inputs.

    `moments_of(states, evaluate, batch)` runs the network, normalizing by each batch or by `states`. A layer that has
    no moments keeps its state.
    """
    if not states:
        raise ValueError("The model must have batch normalizations that are not frozen; it has none.")
    check.number("source_weight", source_weight, 0)
    if layer_by_layer and isinstance(batches, Iterator):
        raise TypeError(
            "`layer_by_layer` goes through `batches` several times, so they must be a list, or an object whose `iter` "
            f"starts over each time; got an iterator, {type(batches).__name__}."
        )
    given = states
    # Normalized by `states`, the network's first layer is exact after one pass, the next after two, and so on: no need
    # to know their order. (A layer may be a stack of layers.) The first pass normalizes by batches, so that
    # nothing overflows after a layer whose statistics are far off.
    passes = sum(math.prod(s.mean.shape[:-1]) for s in states.values()) if layer_by_layer else 1
    for i in range(passes):
        examples: list[int] = []

        def measure(batch, before=states, evaluate=i > 0, examples=examples):
            examples.append(_count_examples(batch) if source_weight else 0)
            return moments_of(before, evaluate, batch)

        pooled = pool_batches(measure, batches, progress=progress)
        if not any(np.any(m.count > 0) for m in pooled.values()):
            raise ValueError(
                "The call must use the model's batch normalizations; it gave none of them a value to count. They may "
                "be frozen, or all values masked."
            )
        before, states = states, {}
        for name, m in pooled.items():
            n = jnp.where(m.count > 0, sum(examples) or 1, 0)
            new = adapt(given[name], m._replace(count=n), source_weight=source_weight)
            seen = len(examples) if np.any(m.count > 0) else 0
            states[name] = new._replace(count=jnp.maximum(given[name].count, seen))
        if jax.tree.all(jax.tree.map(np.array_equal, before, states)):
            break
    return states


def collect_moments(
    row: jax.Array, x: ArrayLike, axis: Any, mask: ArrayLike | None, axis_name: Any, update: bool | jax.Array
) -> jax.Array:
    """Return `row`, the four arrays of `Moments` along a last axis, with those of `x` pooled in, if they update."""
    x = jnp.asarray(x)
    if jnp.iscomplexobj(x):
        raise TypeError(f"Recalibration is for layers with real input; got {x.dtype}.")
    m = moments(x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(row.dtype), axis=axis, mask=mask)
    if axis_name is not None:
        m = pool_named(m, axis_name)
    # Statistics of all devices, also where groups of them normalize together.
    before = Moments(*jnp.moveaxis(row, -1, 0))
    both = jax.tree.map(lambda old, new: jnp.stack([old, shard_like(old, new.astype(old.dtype))]), before, m)
    return jnp.where(update, jnp.stack(pool(both), -1), row)


def _widen(m: Any) -> Moments:
    """Return `m` in float64, the tail added to the mean; the new tail is zeros of the dtype that `m` had."""
    if not isinstance(m, Moments):
        raise TypeError(f"`moments_of` must return `Moments`, or a tree of them; got {type(m).__name__} in it.")
    mean = fetch_array(m.mean)
    count, wide, var, tail = (np.broadcast_to(fetch_array(v, np.float64), mean.shape) for v in m)
    empty = count == 0
    return Moments(count, np.where(empty, 0, wide + tail), np.where(empty, 0, var), np.zeros_like(mean))  # type: ignore[arg-type]


def _join(a: Moments, b: Moments) -> Moments:
    n = a.count + b.count
    share = b.count / np.maximum(n, np.finfo(np.float64).tiny)
    d = b.mean - a.mean
    return Moments(n, a.mean + share * d, a.var + share * ((b.var - a.var) + (1 - share) * d * d), a.tail)


def _narrow(m: Moments) -> Moments:
    """Return `m` in its original dtype, with a tail again."""
    dtype = m.tail.dtype
    mean = np.asarray(m.mean).astype(dtype)
    tail = m.mean - mean.astype(np.float64)
    return Moments(*(jnp.asarray(np.asarray(v), dtype) for v in (m.count, mean, m.var, tail)))


def _count_examples(batch: Any) -> int:
    """Return the number of examples of a batch."""
    sizes = {np.shape(leaf)[0] for leaf in jax.tree.leaves(batch) if np.ndim(leaf)}
    if len(sizes) != 1:
        raise ValueError(
            "With `source_weight` examples are counted along the first axis, which all arrays of a batch must share; "
            f"got sizes {sorted(sizes)}."
        )
    return sizes.pop()


def _show_progress(batches: Iterable[Any]) -> Iterator[Any]:
    """Iterate over `batches`, with a progress line on stderr."""
    start, total = time.monotonic(), len(batches) if hasattr(batches, "__len__") else None  # type: ignore[arg-type]
    try:
        for done, batch in enumerate(batches, 1):
            yield batch
            spent = time.monotonic() - start
            line = f"{done} batches, {spent:.0f} s"
            if total is not None:
                line = f"{done}/{total} batches, {spent / done * (total - done):.0f} s left"
            print(f"\r{line:<40}", end="", file=sys.stderr, flush=True)
    finally:
        print(file=sys.stderr)
