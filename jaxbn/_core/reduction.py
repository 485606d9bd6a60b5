"""The entries that share statistics: along which axes of x, on which devices (`axis_name`).

`axis_name` names mapped axes of `shard_map`, `pmap` or `vmap`, over which statistics are cross-replica, as in a
SyncBatchNorm. Under plain `jit` there is no axis to name: the sums are over the whole array, and XLA inserts the
collectives where it is sharded.
"""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Reduction(NamedTuple):
    """The entries that share statistics.

    Attributes:
        axes: the axes of x that are reduced.
        names: mapped axes (of `shard_map`, `pmap`, `vmap`) whose members share statistics.
        groups: a partition of those members; each part has its own statistics.
        components: an axis of x along which the components of one number lie, as the two of a complex one. They have a
            mean each, and one variance together.
    """

    axes: tuple[int, ...]
    names: tuple[str, ...] = ()
    groups: tuple[tuple[int, ...], ...] | None = None
    components: tuple[int, ...] = ()

    def members(self, dtype: Any) -> jax.Array:
        """Return how many members share statistics with this one."""
        if self.groups is None:
            return jnp.full((), lax.axis_size(self.names) if self.names else 1, dtype)
        sizes = {i: len(group) for group in self.groups for i in group}
        return jnp.asarray([sizes[i] for i in range(len(sizes))], dtype)[lax.axis_index(self.names)]

    def sum(self, v: jax.Array) -> jax.Array:
        """Sum the entries of this member; the reduced axes stay, of size 1."""
        return jnp.sum(v, self.axes, keepdims=True)

    def sum_members(self, rows: Sequence[jax.Array]) -> list[jax.Array]:
        """Sum arrays of one shape over the members, in one collective."""
        if not self.names:
            return list(rows)
        _check_still_bound(self.names)
        v = jnp.stack(list(rows))
        _check_summable(self.names, varying_axes(v))
        if self.groups is None:
            return list(lax.psum(v, self.names))
        # `lax.psum` takes no groups under `shard_map(check_vma=True)` nor under `vmap`: a row for each group instead.
        group_of = {i: g for g, group in enumerate(self.groups) for i in group}
        own = jnp.asarray([group_of[i] for i in range(len(group_of))])[lax.axis_index(self.names)]
        at = (jnp.arange(len(self.groups)) == own).reshape(-1, *[1] * v.ndim)
        return list(lax.dynamic_index_in_dim(lax.psum(jnp.where(at, v[None], 0), self.names), own, keepdims=False))

    def sum_components(self, v: jax.Array) -> jax.Array:
        """Sum along the components of one number."""
        return jnp.sum(v, self.components, keepdims=True) if self.components else v


def varying_axes(v: jax.Array) -> frozenset[str]:
    """Return the mapped axes along which `v` may differ, as far as its type knows (`shard_map(check_vma=True)`)."""
    t = jax.typeof(v)  # JAX 0.10 and 0.12 name them differently
    return getattr(t, "vma", None) or getattr(getattr(t, "mat", None), "varying", None) or frozenset()


def check_axis_names(value: Any) -> tuple[str, ...]:
    """Return `axis_name` as a tuple of names that are bound here."""
    names = value if isinstance(value, (tuple, list)) else () if value is None else (value,)
    for name in names:
        try:
            if isinstance(name, int):  # which JAX would take for an axis of the array
                raise NameError
            lax.axis_size(name)
        except (NameError, KeyError, TypeError):
            raise ValueError(
                f"`axis_name` must be bound where the layer runs in training; got {name!r}, which is not. Run inside "
                f"`jax.shard_map` over a mesh with that axis, or `jax.vmap(..., axis_name={name!r})`; under plain "
                "`jax.jit` with sharded arrays leave `axis_name` out: the statistics are global without it."
            ) from None
    if len(set(names)) != len(names):
        raise ValueError(f"`axis_name` must not name an axis twice; got {value!r}.")
    return tuple(names)


def check_groups(value: Sequence[Sequence[int]] | None, names: tuple[str, ...]) -> tuple[tuple[int, ...], ...] | None:
    """Return `axis_index_groups` as tuples that partition the members of the named axes."""
    if value is None:
        return None
    if not names:
        raise ValueError("`axis_index_groups` needs `axis_name`: the groups are groups of its members.")
    try:
        parts = tuple(tuple(operator.index(i) for i in part) for part in value)
    except TypeError:
        raise TypeError(f"`axis_index_groups` must be a list of lists of ints; got {value!r}.") from None
    size = lax.axis_size(names)
    if sorted(i for part in parts for i in part) != list(range(size)):
        raise ValueError(
            f"`axis_index_groups` must hold each index 0 to {size - 1} of axis {names} exactly once; got {value!r}."
        )
    return parts


def _check_summable(names: tuple[str, ...], varying: frozenset[str]) -> None:
    """Check that JAX can sum over `names`, given the mapped axes that the type of the values knows."""
    if varying and not set(names) <= set(jax.sharding.get_abstract_mesh().manual_axes):
        raise ValueError(
            "`axis_name` must not name an axis of `jax.vmap` inside `jax.shard_map(check_vma=True)`, where JAX sums "
            f"over axes of the mesh alone; got {names}. Pass `check_vma=False` to the `shard_map`."
        )


def _check_still_bound(names: tuple[str, ...]) -> None:
    """Check that `names`, which were bound where the layer ran, are bound where it is differentiated."""
    try:
        lax.axis_size(names)
    except NameError:
        raise ValueError(
            f"`axis_name` must be bound where the layer is differentiated; {names} was when it ran, and is not now. "
            "JAX does not keep the names of `jax.vmap(..., axis_name=...)` inside an inner `jax.jit`, nor for second "
            "derivatives from outside: take the derivative inside the mapped function, or put `jax.jit` outermost."
        ) from None
