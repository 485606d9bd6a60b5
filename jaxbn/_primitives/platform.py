"""Choices by platform, made where JAX lowers a program, never by the devices that the tracing process sees."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def choose_by_platform(*args: Any, default: Callable[..., Any], **branches: Callable[..., Any]) -> Any:
    """Return `branches[platform](*args)`, or `default(*args)`, which compute the same.

    The functions close over no arrays. As `jax.lax.platform_dependent`, but that is a `lax.cond`, which outside of
    `jit` is compiled again at every call. The derivative is that of the default.
    """
    flat, tree = jax.tree.flatten(args)
    shapes = []

    def flatten_function(f):
        def run(*flat):
            leaves, out = jax.tree.flatten(f(*tree.unflatten(flat)))
            shapes.append(out)
            return leaves

        return run

    jaxprs = {name: jax.make_jaxpr(flatten_function(f))(*flat) for name, f in {**branches, "default": default}.items()}
    return shapes[-1].unflatten(platform_p.bind(*flat, jaxprs=tuple(jaxprs.items())))


platform_p = Primitive("platform")
platform_p.multiple_results = True


def _run(platform):
    def run(*args, jaxprs):
        jaxprs = dict(jaxprs)
        return jaxpr_as_fun(jaxprs.get(platform, jaxprs["default"]))(*args)

    return run


def _differentiate(primals, tangents, *, jaxprs):
    out = platform_p.bind(*primals, jaxprs=jaxprs)
    return out, push_moving(jaxpr_as_fun(dict(jaxprs)["default"]), primals, tangents)


def push_moving(f: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
    """Return the tangents of `f(*primals)` where only some arguments have one."""
    moving = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]

    def call_with_moving(*values):
        args = list(primals)
        for i, value in zip(moving, values, strict=True):
            args[i] = value
        return f(*args)

    return jax.jvp(call_with_moving, tuple(primals[i] for i in moving), tuple(tangents[i] for i in moving))[1]


def _batch(axis_data, args, dims, *, jaxprs):
    branches = {name: map_members(jaxpr_as_fun(jaxpr), axis_data, dims) for name, jaxpr in jaxprs}
    out = choose_by_platform(*args, **branches)
    return out, [None if all(d is None for d in dims) else 0] * len(out)


def map_members(f: Callable[..., Any], axis_data: Any, dims: Sequence[int | None]) -> Callable[..., Any]:
    """Return `f` of arrays that are mapped along `dims`, in a batching rule; if none is, that of one member."""
    options = dict(axis_name=axis_data.name, axis_size=axis_data.size, spmd_axis_name=axis_data.spmd_name)
    if not all(d is None for d in dims):
        return jax.vmap(f, in_axes=list(dims), **options)

    def one(*args):  # its collectives over the mapped axis still count all members
        mapped = jax.vmap(lambda _: f(*args), **options)(jnp.zeros(axis_data.size))
        return jax.tree.map(lambda v: v[0], mapped)

    return one


platform_p.def_impl(_run("default"))
platform_p.def_abstract_eval(lambda *args, jaxprs: dict(jaxprs)["default"].out_avals)
mlir.register_lowering(platform_p, mlir.lower_fun(_run("default"), multiple_results=True))
for name in PLATFORMS:
    mlir.register_lowering(platform_p, mlir.lower_fun(_run(name), multiple_results=True), platform=name)
ad.primitive_jvps[platform_p] = _differentiate
batching.fancy_primitive_batchers[platform_p] = _batch


def fusion_barrier(*arrays: Any) -> Any:
    """Return the arrays; on a CPU, XLA fuses and shares nothing across this point.

    XLA for CPUs stores a value that several sums share, such as a difference or a wider dtype, and writing it takes
    longer than computing it twice; per-feature values it recomputes for every entry. On accelerators one fused pass
    makes all sums of one difference.
    """

    return platform_p.bind(*arrays, jaxprs=_barriers(tuple(map(jax.typeof, arrays))))


@cache
def _barriers(types: tuple[Any, ...]) -> tuple[tuple[str, Any], ...]:
    # Traced once for arrays of the same types: a layer has several barriers.
    cpu = jax.make_jaxpr(lambda *arrays: list(lax.optimization_barrier(arrays)))(*types)
    return ("cpu", cpu), ("default", jax.make_jaxpr(lambda *arrays: list(arrays))(*types))
