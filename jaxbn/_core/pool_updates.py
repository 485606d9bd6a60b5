"""One update of the running statistics from several microbatches (gradient accumulation)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxbn._core import check
from jaxbn._core.momentum import Momentum, split_momentum


def pool_updates(states: Any, momentum: Momentum = 0.99, *, weights: ArrayLike | None = None) -> Any:
    """Return the state after one update with the pooled moments of k microbatches, for gradient accumulation.

    Each microbatch must have updated the *same* state, not one another's. With `new_i = m old + (1 - m) batch_i`, the
    update by the pooled moments is

        mean = E[new_i.mean]
        var  = E[new_i.var] + Var[new_i.mean] / (1 - m)

    with mean and variance over the microbatches: the second term is the variance between them, which an average of
    variances leaves out. It equals the update by the one batch that they are parts of.

    Args:
        states: the k >= 1 states after the microbatches, stacked on a leading axis (as by `jax.vmap`, or as outputs of
            `jax.lax.scan`): `BatchNormState`s, linen's `batch_stats`, an `nnx.State` of `BatchStat`s, or any tree
            of them. Leaves are recognized by their names mean, var and count.
        momentum: the momentum of the layers, in [0, 1); a schedule needs states with `count`.
        weights: how many values each microbatch had, `[k]`; by default all the same. Where the state has a count,
            microbatches that did not update it are left out; where it has none, all must have updated it. A single
            feature that took no part in a microbatch that others took part in is not left out.

    Returns:
        The state after the one update, without the leading axis.

    Raises:
        TypeError, ValueError: `momentum` is not in [0, 1), `weights` has another length or a negative value, or a leaf
            has another name or does not fit the others.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbn
        >>> params, state = jaxbn.bn_init(1)
        >>> micro = jnp.array([[[0.0], [2.0]], [[4.0], [10.0]]])
        >>> states = jax.vmap(lambda x: jaxbn.bn_apply(params, state, x, True)[1])(micro)
        >>> one = jaxbn.bn_apply(params, state, micro.reshape(4, 1), True)[1]
        >>> pooled = jaxbn.pool_updates(states)
        >>> bool(jnp.allclose(pooled.var, one.var)), int(pooled.count)
        (True, 1)

    Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance". With `unbiased_running_var` the
    result differs from the one batch's by the factors n / (n - 1) of the parts. The variance between microbatches is
    read off their float32 running means: its error grows with mean/std, to some 1e-4 of the variance at 1e4.
    """
    leaves, tree = jax.tree.flatten_with_path(states)
    layers: dict[tuple, dict[str, int]] = {}
    for i, (path, leaf) in enumerate(leaves):
        layer, name = _split_path(path)
        layers.setdefault(layer, {})[name] = i
        if np.ndim(leaf) == 0 or len(leaf) == 0 or len(leaf) != len(leaves[0][1]):
            raise ValueError(
                f"`states` must be stacked on a leading axis of microbatches, at least one; got a {name} of shape "
                f"{np.shape(leaf)} beside one of {np.shape(leaves[0][1])}."
            )
    share = np.ones(len(leaves[0][1]) if leaves else 0, np.float32) if weights is None else weights
    share = check.real_number("weights", share).astype(float)
    if leaves and share.shape != (len(leaves[0][1]),):
        raise ValueError(f"`weights` must be [{len(leaves[0][1])}], one for each microbatch; got {share.shape}.")
    if not isinstance(share, Tracer) and not np.all((np.asarray(share) >= 0) & np.isfinite(share)):
        raise ValueError(f"`weights` must be finite and at least 0; got {weights}.")
    new = [jnp.asarray(leaf) for _, leaf in leaves]
    for where in layers.values():
        if not {"mean", "var"} <= set(where) or (callable(momentum) and "count" not in where):
            raise ValueError(
                f"Each layer of `states` must have mean and var, and count if `momentum` is a schedule; "
                f"got one with {sorted(where)}."
            )
        shapes = {name: new[i].shape for name, i in where.items()}
        counts = shapes.get("count", ())
        if shapes["mean"] != shapes["var"] or shapes["mean"][: len(counts)] != counts:
            raise ValueError(
                "Each layer of `states` must have mean and var of one shape, and a count of its first axes; got "
                f"{shapes}."
            )
        if len(shapes["mean"]) == 1 and "count" not in where:  # pooled over its features, a layer's own state
            raise ValueError(
                f"`states` must be stacked on a leading axis of microbatches; got a mean of shape {shapes['mean']}. "
                "Stack them first: `jax.tree.map(lambda *v: jnp.stack(v), *states)`."
            )
        for name, value in _pool_layer({name: new[i] for name, i in where.items()}, momentum, share).items():
            new[where[name]] = value
    return jax.tree.unflatten(tree, new)


def _pool_layer(layer: dict[str, jax.Array], momentum: Momentum, share: jax.Array) -> dict[str, jax.Array]:
    """Return one layer's state from its states after each microbatch."""
    # In the dtype of sums: the variance between the means of half precision may not fit that.
    mean, var = (layer[name].astype(check.accumulation_dtype(layer[name].dtype)) for name in ("mean", "var"))
    pooled, share = {}, share.astype(var.dtype)
    before = jnp.zeros((), jnp.int32)
    if "count" in layer:  # one number, or one for each of a stack of layers
        pooled["count"] = jnp.max(layer["count"], 0)
        before = jnp.maximum(pooled["count"] - 1, 0)
        share = jnp.where(layer["count"] == pooled["count"][None], _append_axes(share, layer["count"].ndim), 0)
    keep = momentum(before) if callable(momentum) else split_momentum(momentum, before)[0]
    check.real_number("momentum", keep)
    if np.shape(keep) not in ((), before.shape):
        raise ValueError(f"A schedule for `momentum` must return one number for each count; got {np.shape(keep)}.")
    if not isinstance(keep, Tracer) and not np.all((np.asarray(keep) >= 0) & (np.asarray(keep) < 1)):
        raise ValueError(
            f"`momentum` must lie in [0, 1); got {keep}. At 1 the states hold nothing of the microbatches."
        )
    take = jnp.asarray(1 - keep).astype(var.dtype)
    total = jnp.sum(share, 0, keepdims=True)
    # No microbatch had values: all states are the old one, and any shares do.
    share = _append_axes(jnp.where(total > 0, share, 1 / len(mean)) / jnp.where(total > 0, total, 1), mean.ndim)
    pooled["mean"] = jnp.sum(share.astype(mean.dtype) * mean, 0)
    between = jnp.sum(share * jnp.square(jnp.abs(mean - pooled["mean"][None])), 0)
    pooled["var"] = jnp.sum(share * var, 0) + between / _append_axes(take, between.ndim)
    return pooled | {name: pooled[name].astype(layer[name].dtype) for name in ("mean", "var")}


def _append_axes(v: jax.Array, ndim: int) -> jax.Array:
    """Append axes of size 1, up to `ndim` axes."""
    return jax.lax.expand_dims(v, range(v.ndim, ndim))


def _split_path(path: tuple) -> tuple[tuple, str]:
    """Return the path of a leaf's layer and its name there. (Below it there may be a key of the variable's own.)"""
    names = [str(getattr(key, "name", getattr(key, "key", key))) for key in path]
    for i in reversed(range(len(names))):
        if names[i] in ("mean", "var", "count"):
            return tuple(names[:i]), names[i]
    raise ValueError(f"`states` must hold only mean, var and count; got {'/'.join(names) or 'a single array'}.")
