"""Per-feature arrays laid out to broadcast against x, and back; and their sharding."""

import jax
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P


def to_layout(v: jax.Array, features: tuple[int, ...], ndim: int) -> jax.Array:
    """Lay out a per-feature array to broadcast against an array of `ndim` dimensions."""
    v = lax.transpose(v, [features.index(a) for a in sorted(features)])
    return lax.expand_dims(v, [a for a in range(ndim) if a not in features])


def from_layout(v: jax.Array, features: tuple[int, ...]) -> jax.Array:
    """Invert `to_layout`."""
    v = lax.squeeze(v, [a for a in range(v.ndim) if a not in features])
    return lax.transpose(v, [sorted(features).index(a) for a in features])


def lay_out_affine(v: jax.Array | None, features: tuple[int, ...], x: jax.Array, dtype: jax.typing.DTypeLike):
    """Lay out a scale or bias in `dtype`, by feature or by example and feature, to broadcast against x."""
    if v is None:
        return None
    if v.ndim > len(features):
        features = (next(a for a in range(x.ndim) if a not in features), *features)
    return to_layout(v.astype(dtype), features, x.ndim)


def shard_as_features(v: jax.Array, x: jax.Array) -> jax.Array:
    """Shard `v`, laid out against x, as the features of x are where the mesh is explicit."""
    sharding = jax.typeof(x).sharding
    spec = [None if size == 1 else name for size, name in zip(v.shape, sharding.spec, strict=True)]
    own = jax.typeof(v).sharding
    if list(own.spec) == spec:
        return v
    return jax.sharding.reshard(v, sharding.update(spec=spec))


def replicate_on_mesh(v: jax.Array, x: jax.Array) -> jax.Array:
    """Replicate `v` over the mesh of x if that is explicit, where v was made on none."""
    to = jax.typeof(x).sharding
    if to.mesh.empty or not jax.typeof(v).sharding.mesh.empty or AxisType.Explicit not in to.mesh.axis_types:
        return v
    return jax.sharding.reshard(v, to.update(spec=P(*[None] * v.ndim)))


def name_mesh(t: jax.ShapeDtypeStruct, x: jax.Array) -> jax.ShapeDtypeStruct:
    """Name the mesh of x in a type from `jax.eval_shape`, which leaves it out where no axis is explicit.

    Within `shard_map` over some axes of a mesh, no array of a type without it can be made.
    """
    if t.sharding is not None:
        return t
    return t.update(sharding=jax.typeof(x).sharding.update(spec=P(*[None] * t.ndim)))


def shard_like(like: jax.Array, v: jax.Array) -> jax.Array:
    """Give `v` the sharding of `like` where the mesh is explicit: the features of x may be sharded otherwise."""
    own, to = jax.typeof(v).sharding, jax.typeof(like).sharding
    if own.spec == to.spec:
        return v
    return jax.sharding.reshard(v, own.update(spec=to.spec) if to.mesh.empty else to)
