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
    """The batch as a step sees it: one device's part where the axes are named, else all of it, divided by the compiler.

    Attributes:
        name: of the way, as in `Settings`.
        mesh: the devices.
        axes: of the mesh, along which the batch is divided.
        parts: how many parts of the batch have statistics of their own; 1 for global statistics.
        of_parts: the axes along which the running statistics of the parts are divided.
    """

    name: str
    mesh: jax.sharding.Mesh
    axes: tuple[str, ...]
    parts: int
    of_parts: tuple[str, ...]

    @property
    def named(self) -> bool:
        """Return whether the program is that of one device, which says what is communicated."""
        return self.name in ("shard_map", "pmap")

    def place(self, x: jax.Array, spec: P) -> jax.Array:
        """Divide an array over the devices."""
        placed = NamedSharding(self.mesh, spec)
        return jax.sharding.reshard(x, placed) if self.name == "explicit" else lax.with_sharding_constraint(x, placed)

    def split(self, x: jax.Array) -> jax.Array:
        """Divide an array whose leading axis is the batch over the devices."""
        return self.place(x, P(self.axes))

    def spread(self, f: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """Run `f` over the devices; without named axes the shardings of the arguments say how."""
        if self.name == "shard_map":
            return jax.shard_map(f, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=True)
        return _mapped(f, self.mesh, in_specs, out_specs) if self.name == "pmap" else f

    def mean(self, v: Any) -> Any:
        """Return the mean over the whole batch, from that over the part that is seen here."""
        return lax.pmean(v, self.axes) if self.named else v

    def gradients(self, given: Tree) -> Tree:
        """Return those of the loss over the whole batch, from what differentiating it gives here."""
        # Under `pmap` the derivative of a mean over devices is of the part that is seen here alone.
        return self.mean(given) if self.name == "pmap" else given

    def forward(self, apply: Callable[..., Any], params: Any, state: Any, x: Any, mask: Any) -> tuple[Any, Any]:
        """Return the logits in training and the new state."""
        given = {} if mask is None else {"mask": mask}
        within = tuple(axis for axis in self.axes if axis not in self.of_parts)
        over: Any = within[0] if len(within) == 1 else within or None
        if not self.of_parts:
            return apply(params, state, x if self.named else self.split(x), True, over if self.named else None, **given)
        if self.named:
            mine = jax.tree.map(lambda s: lax.squeeze(s, [0]), state)
            logits, mine = apply(params, mine, x, True, over, **given)
            return logits, jax.tree.map(lambda s: s[None], mine)

        # Parts whose boundaries are those of the shards: each normalizes by its own statistics.
        def whole(v):  # whole batches are reshaped, since a sharded axis of an Explicit mesh is not cut in two
            return self.place(v, P()) if self.name == "explicit" else v

        def cut(v):
            return self.place(whole(v).reshape(self.parts, -1, *v.shape[1:]), P(self.of_parts, within or None))

        def one(s, part, given):
            return apply(params, s, part, True, None, **given)

        logits, state = jax.vmap(one)(state, cut(x), jax.tree.map(cut, given))
        return self.split(whole(logits).reshape(-1, logits.shape[-1])), state


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
    by_process = [[d for d in jax.devices() if d.process_index == p] for p in range(jax.process_count())]
    devices = [d for own in by_process for d in own[:per_process]]
    shape, axes = (settings.devices,), (DATA,)
    if settings.groups > 1:
        shape, axes = (settings.groups, settings.devices // settings.groups), (GROUP, DATA)
    kind = AxisType.Explicit if settings.way == "explicit" else AxisType.Auto
    mesh = jax.make_mesh(shape, axes, axis_types=(kind,) * len(axes), devices=devices)
    of_parts = {"global": (), "groups": (GROUP,), "per_device": axes}[settings.statistics]
    return Way(settings.way, mesh, axes, settings.parts, of_parts)


def _mapped(f: Callable[..., Any], mesh: jax.sharding.Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Run `f` under `jax.pmap`, whose mapped axes have the length of the devices: sharded axes are cut and joined."""

    def axis_of(spec):
        return next((at for at, name in enumerate(spec) if name), None)

    def is_spec(node):
        return isinstance(node, P)

    def cut(spec, tree):
        at = axis_of(spec)
        if at is None:
            return tree
        return jax.tree.map(lambda v: v.reshape(*v.shape[:at], mesh.size, -1, *v.shape[at + 1 :]), tree)

    def join(spec, tree):
        at = axis_of(spec)
        return tree if at is None else jax.tree.map(lambda v: v.reshape(*v.shape[:at], -1, *v.shape[at + 2 :]), tree)

    def mapped(*args):
        ins, outs = (jax.tree.map(axis_of, specs, is_leaf=is_spec) for specs in (in_specs, out_specs))
        over = jax.pmap(f, axis_name=DATA, in_axes=ins, out_axes=outs, devices=mesh.devices.ravel().tolist())
        made = over(*jax.tree.map(cut, in_specs, args, is_leaf=is_spec))
        return jax.tree.map(join, out_specs, made, is_leaf=is_spec)

    return mapped


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

    def pool(node):
        own = fields_of(node)
        m = jaxbn.pool(jaxbn.Moments(jnp.ones(()), own["mean"], own["var"]))
        if isinstance(node, dict):
            return {"mean": m.mean, "var": m.var}
        return node._replace(mean=m.mean, var=m.var, count=jnp.max(node.count, 0))

    return jax.tree.map(pool, state, is_leaf=lambda node: bool(fields_of(node)))


def fields_of(node: Any) -> dict[str, Any]:
    """Return the running statistics of a norm by name, where `node` of a state has them."""
    fields = node if isinstance(node, dict) else getattr(node, "_asdict", dict)()
    return fields if {"mean", "var"} <= fields.keys() else {}
