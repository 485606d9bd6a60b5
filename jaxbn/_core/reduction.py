"""Which entries share statistics: along which axes, on which devices."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._core import check


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
        check.still_bound(self.names)
        v = jnp.stack(list(rows))
        check.summable(self.names, varying_axes(v))
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
