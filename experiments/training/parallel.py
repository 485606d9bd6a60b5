"""The ways to spread a training step over devices, and whose values its batch statistics are made of.

A step is written once, for the examples that a `Way` hands it. Gradients are of the loss over the whole batch in all
of them; only the scope of batch statistics differs, and with it the running ones: one record for all devices, or one
for each, along a leading axis that is sharded.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from experiments.training.config import Settings
from experiments.training.shapes import Tree

AXIS = "data"


class Way(NamedTuple):
    """How a step sees its batch. Functions of one device's part, or of all of it where the compiler divides it.

    Attributes:
        mesh: the devices.
        shared: whether there is one record of running statistics rather than one for each device.
        forward: `(apply, params, state, x) -> (logits, state)` in training.
        mean: the mean over the whole batch, from the mean over the part that is seen here.
        spread: `(f, in_specs, out_specs) -> g`: run `f` over the devices.
        split: mark an array whose leading axis is the batch as divided over the devices.
    """

    mesh: jax.sharding.Mesh
    shared: bool
    forward: Callable[..., tuple[Any, Any]]
    mean: Callable[[jax.Array], jax.Array]
    spread: Callable[..., Callable[..., Any]]
    split: Callable[[jax.Array], jax.Array]


def require_devices(count: int) -> None:
    """That there are `count` devices; on the CPU they are simulated, if this is called before JAX starts.

    A run over several machines would call `jax.distributed.initialize()` here, before anything asks for devices.

    Raises:
        ValueError: there are fewer.
    """
    with contextlib.suppress(RuntimeError):  # JAX has started: what it has counts
        jax.config.update("jax_num_cpu_devices", count)
    there, kind = jax.device_count(), jax.default_backend()
    if there < count:
        raise ValueError(
            f"`devices` must not exceed the {there} {kind} devices there are; got {count}. "
            f"Pass `--devices {there}`, or set JAX_PLATFORMS=cpu to simulate them."
        )


def way(settings: Settings) -> Way:
    """The way that `settings` names, over its first `devices` devices."""
    n = settings.devices
    mesh = jax.make_mesh((n,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])
    shared = settings.statistics == "global"
    if settings.way == "shard_map":
        return _by_shard_map(mesh, shared)
    return _by_jit(mesh, shared, n)


def _by_jit(mesh: jax.sharding.Mesh, shared: bool, devices: int) -> Way:
    """The program is that of one device; arrays are sharded, and the compiler adds the communication."""

    def split(x):
        return lax.with_sharding_constraint(x, NamedSharding(mesh, P(AXIS)))

    def whole(apply, params, state, x):
        return apply(params, state, split(x), True, None)

    def in_parts(apply, params, state, x):
        # Groups whose boundaries are those of the shards: each device normalizes by its own part.
        parts = split(x.reshape(devices, -1, *x.shape[1:]))
        logits, state = jax.vmap(lambda s, part: apply(params, s, part, True, None))(state, parts)
        return logits.reshape(-1, logits.shape[-1]), state

    def spread(f, in_specs, out_specs):
        del in_specs, out_specs  # the shardings of the arguments say it
        return f

    return Way(mesh, shared, whole if shared else in_parts, lambda v: v, spread, split)


def _by_shard_map(mesh: jax.sharding.Mesh, shared: bool) -> Way:
    """The program is that of each device on its part, and says what is communicated."""

    def whole(apply, params, state, x):
        return apply(params, state, x, True, AXIS)

    def in_parts(apply, params, state, x):
        mine = jax.tree.map(lambda s: lax.squeeze(s, [0]), state)
        logits, mine = apply(params, mine, x, True, None)
        return logits, jax.tree.map(lambda s: s[None], mine)

    def spread(f, in_specs, out_specs):
        return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=True)

    def split(x):
        return lax.with_sharding_constraint(x, NamedSharding(mesh, P(AXIS)))

    return Way(mesh, shared, whole if shared else in_parts, lambda v: lax.pmean(v, AXIS), spread, split)


def replicated_state(way: Way, state: Tree) -> Tree:
    """A fresh model state as this way keeps it: as it is, or once for each device."""
    if way.shared:
        return state
    return jax.tree.map(lambda s: jnp.broadcast_to(s[None], (way.mesh.size, *s.shape)), state)


def pooled_state(way: Way, state: Tree) -> Tree:
    """The state to evaluate with: of one record for each device, those of the union of what they saw.

    The devices saw equally many values, so each counts as one: the pooled variance is the mean of the variances plus
    the variance of the means.
    """
    if way.shared:
        return state

    def is_record(node):
        return hasattr(node, "mean") or (isinstance(node, dict) and "mean" in node)

    def pool(node):
        if isinstance(node, dict):
            m = jaxbn.pool(jaxbn.Moments(jnp.ones(()), node["mean"], node["var"]))
            return {"mean": m.mean, "var": m.var}
        m = jaxbn.pool(jaxbn.Moments(jnp.ones(()), node.mean, node.var))
        return node._replace(mean=m.mean, var=m.var, count=node.count[0])

    return jax.tree.map(pool, state, is_leaf=is_record)
