"""The ways to run one function data-parallel on eight devices, with one signature.

A test writes `member(whole, parts) -> (parts, whole)`: `whole` is a dict of what every member has (parameters, state),
`parts` a dict of what is split over them along the first axis (the batch). A `Way` runs it on whole-batch arrays and
gives whole-batch arrays back, so that every way, and one device alone, answers the same question in the same shape.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from params import param

MEMBERS = 8
AXIS = "members"

Tree = Any
Member = Callable[[dict[str, Tree], dict[str, Tree]], tuple[Tree, Tree]]


class Way(NamedTuple):
    """One way to run a function on several members.

    Attributes:
        name: for test ids.
        axis_name: what the layer must be given: the bound name, or None where the compiler sees the whole batch.
        summed: whether gradients of what all members share come back summed over them.
        transform: makes a compiled function of a member function.
        mesh: where the arguments are placed beforehand, or None.
        stacked: whether parts travel as `[members, batch / members, ...]`.
        members: how many.
    """

    name: str
    axis_name: str | None
    summed: bool
    transform: Callable[[Member], Any]
    mesh: jax.sharding.Mesh | None = None
    stacked: bool = False
    members: int = MEMBERS

    def total(self, gradients: Tree) -> Tree:
        """Sum the gradients of shared parameters, as a user of this way does inside the function."""
        return gradients if self.summed else lax.psum(gradients, AXIS)

    def run(self, member: Member, whole: Tree, parts: Tree) -> tuple[Tree, Tree]:
        """Return `(parts, whole)` of `member` on whole-batch arrays."""
        with self._scope():
            out, shared = self.transform(member)(*self._placed(whole, parts))
        return (jax.tree.map(_merge, out) if self.stacked else out), shared

    def compiled_text(self, member: Member, whole: Tree, parts: Tree) -> str:
        """Return the text of the optimized program that `run` would run."""
        with self._scope():
            return self.transform(member).lower(*self._placed(whole, parts)).compile().as_text()

    def _scope(self) -> Any:
        return nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _placed(self, whole, parts) -> tuple[Tree, Tree]:
        if self.stacked:
            return whole, jax.tree.map(lambda v: _split(v, self.members), parts)
        if self.mesh is None:
            return whole, parts
        put = jax.device_put
        return put(whole, NamedSharding(self.mesh, P())), put(parts, NamedSharding(self.mesh, P(AXIS)))


def mesh_of(kind: AxisType, shape: tuple[int, ...] = (MEMBERS,), names: tuple[str, ...] = (AXIS,)) -> jax.sharding.Mesh:
    """Return a mesh of simulated devices whose axes are all of one kind."""
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names), devices=jax.devices()[: int(np.prod(shape))])


def shard_map_way(check_vma: bool, members: int = MEMBERS) -> Way:
    """`jax.shard_map` over a mesh of `members` devices."""
    mesh = mesh_of(AxisType.Auto, (members,))

    def transform(member):
        ins, outs = (P(), P(AXIS)), (P(AXIS), P())
        return jax.jit(jax.shard_map(member, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=check_vma))

    return Way(f"shard_map-{'vma' if check_vma else 'unchecked'}", AXIS, check_vma, transform, members=members)


def vmap_way(members: int = MEMBERS) -> Way:
    """`jax.vmap(axis_name=)`: members without devices."""

    def transform(member):
        return jax.jit(jax.vmap(member, axis_name=AXIS, in_axes=(None, 0), out_axes=(0, None)))

    return Way("vmap", AXIS, False, transform, stacked=True, members=members)


def _pmap_way() -> Way:
    def transform(member):
        return jax.pmap(member, axis_name=AXIS, in_axes=(None, 0), out_axes=(0, None))

    return Way("pmap", AXIS, False, transform, stacked=True)


def _jit_way(kind: AxisType) -> Way:
    return Way(f"jit-{kind.name.lower()}", None, True, jax.jit, mesh=mesh_of(kind))


ONE = Way("one", None, True, jax.jit, members=1)
NAMED = [shard_map_way(True), shard_map_way(False), _pmap_way(), vmap_way()]
SHARDED = [_jit_way(AxisType.Auto), _jit_way(AxisType.Explicit)]
WAYS = NAMED + SHARDED

# What is asked of the layer is asked in two ways of `make test`, and in the others with what is slow; the layer itself,
# plain and masked, is tested in all of them always (`core/test_devices.py`).
QUICK, QUICK_NAMED = ("shard_map-vma", "jit-explicit"), ("shard_map-vma", "vmap")


each_way = pytest.mark.parametrize("way", [param(way, quick=way.name in QUICK, id=way.name) for way in WAYS])
each_named_way = pytest.mark.parametrize(
    "way", [param(way, quick=way.name in QUICK_NAMED, id=way.name) for way in NAMED]
)


def assert_replicated(tree: Tree) -> None:
    """Every array says that all its devices hold the same value, and they hold the same bits.

    `shard_map(check_vma=False)` and `pmap` only promise it: there each device's own result is what its buffer holds.
    """
    for leaf in jax.tree.leaves(tree):
        assert leaf.sharding.is_fully_replicated, leaf.sharding
        first, *others = (np.asarray(shard.data) for shard in leaf.addressable_shards)
        for other in others:
            np.testing.assert_array_equal(first, other)


def assert_close(got: Tree, wanted: Tree, atol: float = 2e-4, rtol: float = 0.0) -> None:
    """Assert the same tree, the same dtypes, and the same values within the tolerance; NaN equals nothing."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype, (a.dtype, b.dtype)
        wide = [np.asarray(v).astype(np.float64) for v in (a, b)]
        np.testing.assert_allclose(wide[0], wide[1], rtol=rtol, atol=atol, equal_nan=False)


# In NumPy, which compiles nothing.
def _split(v, members: int) -> np.ndarray:
    return np.asarray(v).reshape(members, v.shape[0] // members, *v.shape[1:])


def _merge(v) -> np.ndarray:
    return np.asarray(v).reshape(v.shape[0] * v.shape[1], *v.shape[2:])
