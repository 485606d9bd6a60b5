"""The ways to spread a training step over devices, and whose values its batch statistics are made of.

A step is written once, for the examples that a `Way` hands it. Gradients are of the loss over the whole batch in all
of them; only the scope of batch statistics differs, and with it the running ones: one record for all devices, or one
for each part of the batch, along a leading axis that is sharded.
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

GROUP, DATA = "group", "data"  # the axes of a mesh: rows of devices, and the devices of a row


class Way(NamedTuple):
    """The batch as a step sees it. Functions are of one device's part, or of all of it where the compiler divides it.

    Attributes:
        mesh: the devices.
        axes: of the mesh, along which the batch is divided.
        parts: how many parts of the batch have statistics of their own; 1 for global statistics.
        of_parts: the axes along which the running statistics of the parts are divided.
        forward: `(apply, params, state, x, mask) -> (logits, state)` in training.
        mean: the mean over the whole batch, from the mean over the part that is seen here.
        gradients: of the loss over the whole batch, from what differentiating it gives here.
        spread: `(f, in_specs, out_specs) -> g`: run `f` over the devices.
        split: mark an array whose leading axis is the batch as divided over the devices.
    """

    mesh: jax.sharding.Mesh
    axes: tuple[str, ...]
    parts: int
    of_parts: tuple[str, ...]
    forward: Callable[..., tuple[Any, Any]]
    mean: Callable[[jax.Array], jax.Array]
    gradients: Callable[[Tree], Tree]
    spread: Callable[..., Callable[..., Any]]
    split: Callable[[jax.Array], jax.Array]


def require_devices(count: int) -> None:
    """Check that there are `count` devices; on the CPU they are simulated, if this is called before JAX starts.

    Raises:
        ValueError: there are fewer, or the processes cannot share them equally.
    """
    if count % jax.process_count():
        raise ValueError(f"`devices` must be a multiple of the {jax.process_count()} processes; got {count}.")
    there, kind = jax.device_count(), jax.default_backend()
    if there < count:
        raise ValueError(
            f"`devices` must not exceed the {there} {kind} devices there are; got {count}. "
            f"Pass `--devices {there}`, or set JAX_PLATFORMS=cpu to simulate them."
        )


def simulate_devices(count: int) -> None:
    """Have so many devices on the CPU at least, if JAX has not started."""
    with contextlib.suppress(RuntimeError):  # it has: the devices that it has count
        jax.config.update(
            "jax_num_cpu_devices", max(count, jax.config.values["jax_num_cpu_devices"])
        )  # -1 where none are asked for


def way(settings: Settings) -> Way:
    """Make the way that `settings` names, over its first `devices` devices; of several processes, over equally many."""
    per_process = settings.devices // jax.process_count()
    devices = [d for p in range(jax.process_count()) for d in _devices_of(p)[:per_process]]
    shape, axes = (settings.devices,), (DATA,)
    if settings.groups > 1:
        shape, axes = (settings.groups, settings.devices // settings.groups), (GROUP, DATA)
    kind = AxisType.Explicit if settings.way == "explicit" else AxisType.Auto
    mesh = jax.make_mesh(shape, axes, axis_types=(kind,) * len(axes), devices=devices)
    of_parts = {"global": (), "groups": (GROUP,), "per_device": axes}[settings.statistics]
    if settings.way in ("shard_map", "pmap"):
        return _by_name(mesh, axes, settings.parts, of_parts, pmap=settings.way == "pmap")
    return _by_compiler(mesh, axes, settings.parts, of_parts, explicit=settings.way == "explicit")


def _devices_of(process: int) -> list[Any]:
    return [d for d in jax.devices() if d.process_index == process]


def _by_compiler(
    mesh: jax.sharding.Mesh, axes: tuple[str, ...], parts: int, of_parts: tuple[str, ...], explicit: bool
) -> Way:
    """Make the program of one device; arrays are sharded, and the compiler adds the communication."""
    within = tuple(axis for axis in axes if axis not in of_parts) or None

    def place(x, spec):
        placed = NamedSharding(mesh, spec)
        return jax.sharding.reshard(x, placed) if explicit else lax.with_sharding_constraint(x, placed)

    def split(x):
        return place(x, P(axes))

    def whole(apply, params, state, x, mask):
        return apply(params, state, split(x), True, None, **_given(mask))

    def in_parts(apply, params, state, x, mask):
        # Parts whose boundaries are those of the shards: each normalizes by its own statistics.
        def cut(v):
            if explicit:  # whole batches are reshaped, since a sharded axis is not cut in two
                v = jax.sharding.reshard(v, NamedSharding(mesh, P()))
            return place(v.reshape(parts, -1, *v.shape[1:]), P(of_parts, within))

        def one(s, part, counted):
            return apply(params, s, part, True, None, **_given(counted))

        logits, state = jax.vmap(one)(state, cut(x), None if mask is None else cut(mask))
        if explicit:
            logits = jax.sharding.reshard(logits, NamedSharding(mesh, P()))
        return split(logits.reshape(-1, logits.shape[-1])), state

    def spread(f, in_specs, out_specs):
        del in_specs, out_specs  # the shardings of the arguments say it
        return f

    return Way(mesh, axes, parts, of_parts, in_parts if of_parts else whole, _same, _same, spread, split)


def _by_name(mesh: jax.sharding.Mesh, axes: tuple[str, ...], parts: int, of_parts: tuple[str, ...], pmap: bool) -> Way:
    """Make the program of each device on its part, which says what is communicated."""
    over = tuple(axis for axis in axes if axis not in of_parts)
    named: Any = over if len(over) != 1 else over[0]
    named = named or None

    def whole(apply, params, state, x, mask):
        return apply(params, state, x, True, named, **_given(mask))

    def in_parts(apply, params, state, x, mask):
        mine = jax.tree.map(lambda s: lax.squeeze(s, [0]), state)
        logits, mine = apply(params, mine, x, True, named, **_given(mask))
        return logits, jax.tree.map(lambda s: s[None], mine)

    def spread(f, in_specs, out_specs):
        if pmap:
            return _mapped(f, mesh, in_specs, out_specs)
        return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=True)

    def split(x):
        return lax.with_sharding_constraint(x, NamedSharding(mesh, P(axes)))

    def mean(v):
        return lax.pmean(v, axes)

    # Under `pmap` the derivative of a mean over devices is of the part that is seen here alone.
    forward, gradients = in_parts if of_parts else whole, mean if pmap else _same
    return Way(mesh, axes, parts, of_parts, forward, mean, gradients, spread, split)


def _mapped(f: Callable[..., Any], mesh: jax.sharding.Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Run `f` under `jax.pmap`, whose mapped axes have the length of the devices: sharded axes are cut and joined."""
    n = mesh.size

    def axis_of(spec):
        return next((at for at, name in enumerate(spec) if name), None)

    def is_spec(node):
        return isinstance(node, P)

    def cut(at, tree):
        if at is None:
            return tree
        return jax.tree.map(lambda v: v.reshape(*v.shape[:at], n, -1, *v.shape[at + 1 :]), tree)

    def join(at, tree):
        if at is None:
            return tree
        return jax.tree.map(lambda v: v.reshape(*v.shape[:at], -1, *v.shape[at + 2 :]), tree)

    def mapped(*args):
        ins = jax.tree.map(axis_of, in_specs, is_leaf=is_spec)
        outs = jax.tree.map(axis_of, out_specs, is_leaf=is_spec)
        none = lambda node: node is None or isinstance(node, int)  # noqa: E731
        args = jax.tree.map(cut, ins, args, is_leaf=none)
        made = jax.pmap(f, axis_name=DATA, in_axes=ins, out_axes=outs, devices=mesh.devices.ravel().tolist())(*args)
        return jax.tree.map(join, outs, made, is_leaf=none)

    return mapped


def _same(v: Any) -> Any:
    return v


def _given(mask: Any) -> dict[str, Any]:
    return {} if mask is None else {"mask": mask}


def replicated_state(way: Way, state: Tree) -> Tree:
    """Return a fresh model state as this way keeps it: as it is, or once for each part of the batch."""
    if not way.of_parts:
        return state
    return jax.tree.map(lambda s: jnp.broadcast_to(s[None], (way.parts, *s.shape)), state)


def pooled_state(way: Way, state: Tree) -> Tree:
    """Return the state to evaluate with: of one record for each part, those of the union of what they saw.

    The parts saw equally many values, so each counts as one: the pooled variance is the mean of the variances plus
    the variance of the means.
    """
    if not way.of_parts:
        return state

    def is_record(node):
        return hasattr(node, "mean") or (isinstance(node, dict) and "mean" in node)

    def pool(node):
        if isinstance(node, dict):
            m = jaxbn.pool(jaxbn.Moments(jnp.ones(()), node["mean"], node["var"]))
            return {"mean": m.mean, "var": m.var}
        m = jaxbn.pool(jaxbn.Moments(jnp.ones(()), node.mean, node.var))
        return node._replace(mean=m.mean, var=m.var, count=jnp.max(node.count, 0))

    return jax.tree.map(pool, state, is_leaf=is_record)
