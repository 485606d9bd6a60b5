"""Collectives in the compiled training step of one layer, forward and backward, on eight devices.

Run as a program of its own: the simulated devices must exist before anything else, and would change every time.

    python -m experiments.benchmark.collectives
"""

import json
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.benchmark import hlo
from experiments.benchmark.layers import LAYERS, MODULES

DEVICES, FEATURES, AXIS = 8, 4, "devices"
WAYS = ("shard_map", "shard_map, check_vma=False", "pmap", "jit, Auto mesh", "jit, Explicit mesh")


def rows() -> Iterator[dict[str, Any]]:
    """Yield a row for each way and layer; where a layer cannot be run in a way, the reason instead of the value."""
    for way, name in product(WAYS, MODULES):
        row = {"measure": "collectives", "contender": name, "way": way}
        try:
            yield row | {"value": count(text(name, way))}
        except Exception as error:  # of any kind: a library's failure is a result, not the end of the run
            yield row | {"value": None, "error": str(error).splitlines()[0][:200]}


def count(program: str) -> int:
    """Return how many collectives of an optimized program, synchronous or begun, every step takes.

    Those in a branch or a loop are left out: jaxbn's runs once in the first steps and after jumps, else not at all.
    """
    _, computations = hlo.parse_program(program)
    rare = {name for body in computations.values() for i in body for name in i.branches}
    always = [i for name, body in computations.items() if name not in rare for i in body]
    return sum(i.operation.removesuffix("-start") in hlo.COLLECTIVES for i in always)


def text(name: str, way: str) -> str:
    """Return the optimized program of the step with a ReLU: new state, all gradients, and the output."""
    jitted = way.startswith("jit")  # where the compiler sees the whole batch, and no axis has a name
    layer = LAYERS[name](FEATURES, axis_name=None if jitted else AXIS)
    summed = jitted or way == "shard_map"  # the gradients of what all devices share
    params = {"scale": jnp.ones(FEATURES), "bias": jnp.zeros(FEATURES)}
    state = layer.start(jnp.zeros(FEATURES), jnp.ones(FEATURES))
    x = jnp.ones((8 * DEVICES, FEATURES))

    def step(params, state, x):
        def loss(params, x):
            y, new = layer.apply(params, state, x, None, True, True)
            return jnp.sum(jnp.sin(y)), (y, new)

        (d_params, dx), (y, new) = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return (new, d_params if summed else jax.lax.psum(d_params, AXIS)), (y, dx)

    if way == "pmap":
        mapped = jax.pmap(step, axis_name=AXIS, in_axes=(None, None, 0), out_axes=(None, 0))
        return _optimized(mapped, params, state, x.reshape(DEVICES, -1, FEATURES))
    kind = AxisType.Explicit if "Explicit" in way else AxisType.Auto
    mesh = jax.make_mesh((DEVICES,), (AXIS,), axis_types=(kind,))
    if not jitted:
        checked = way == "shard_map"
        specs = {"in_specs": (P(), P(), P(AXIS)), "out_specs": (P(), P(AXIS)), "check_vma": checked}
        return _optimized(jax.jit(jax.shard_map(step, mesh=mesh, **specs)), params, state, x)
    with jax.set_mesh(mesh):
        whole = partial(jax.device_put, device=NamedSharding(mesh, P()))
        return _optimized(jax.jit(step), whole(params), whole(state), jax.device_put(x, NamedSharding(mesh, P(AXIS))))


def _optimized(f: Any, *args: Any) -> str:
    return f.lower(*args).compile().as_text()


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_platforms", "cpu")
    print(json.dumps(list(rows())))
