"""Per-feature arrays laid out to broadcast against x, and back; and their sharding."""

import jax
from jax import lax


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


def shard_like(like: jax.Array, v: jax.Array) -> jax.Array:
    """Give `v` the sharding of `like` where the mesh is explicit: the features of x may be sharded otherwise."""
    own, to = jax.typeof(v).sharding, jax.typeof(like).sharding
    if own.spec == to.spec:
        return v
    return jax.sharding.reshard(v, own.update(spec=to.spec) if to.mesh.empty else to)
