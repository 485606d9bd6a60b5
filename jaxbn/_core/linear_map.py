"""Linear maps with their transpose: a derivative written by hand for forward and reverse mode.

`jax.custom_derivatives.linear_call` is the same without `vmap` and without derivatives of the residuals. Here all of
JAX's transformations hold: forward mode is `forward`, reverse mode is `transpose`, `vmap` maps both, and higher
derivatives are JAX's own, of `forward`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir, partial_eval


def apply_linear(forward: Callable[..., Any], transpose: Callable[..., Any], residuals: Any, operands: Any) -> Any:
    """Return the array `forward(residuals, operands)`, which is linear in the operands.

    Args:
        forward: a function of residuals and operands that returns one array.
        transpose: a function of residuals and a cotangent of that array. It returns the cotangents of the operands.
        residuals: a tree of arrays that both directions use, and the only arrays kept for the backward pass.
        operands: a tree of floating point arrays.
    """
    residuals, residuals_tree = jax.tree.flatten(residuals)
    operands, operands_tree = jax.tree.flatten(operands)
    n = len(residuals)

    def there(*args):
        return [forward(residuals_tree.unflatten(args[:n]), operands_tree.unflatten(args[n:]))]

    def back(*args):
        return jax.tree.leaves(transpose(residuals_tree.unflatten(args[:n]), args[n]))

    return _bind(there, back, residuals, operands)[0]


def convert_closure(f: Callable[[jax.Array], jax.Array], x: Any) -> tuple[Callable[..., jax.Array], list[Any]]:
    """Return `f` as a function of the arrays that it closes over and of its argument, and these arrays.

    As `jax.closure_convert`, but of all arrays, so that `vmap` maps them too.
    """
    closed = jax.make_jaxpr(f)(x)
    jaxpr = closed.jaxpr  # without the arrays, which may be tracers and must not stay in a rule
    return lambda arrays, x: jaxpr_as_fun(ClosedJaxpr(jaxpr, list(arrays)))(x)[0], list(closed.consts)


linear_p = Primitive("linear")
linear_p.multiple_results = True


def _bind(there, back, residuals, operands):
    # Both directions are traced here, where the names of mapped axes are bound.
    n, m = len(residuals), len(operands)
    there = jax.make_jaxpr(there)(*residuals, *operands)
    back = jax.make_jaxpr(back)(*residuals, *there.out_avals)
    # A residual that neither direction uses need not be kept.
    used = [_find_used(closed)[:n] for closed in (there, back)]
    kept = [a or b for a, b in zip(*used, strict=True)]
    there, back = (_restrict(c, [*kept, *[True] * k]) for c, k in ((there, m), (back, len(there.out_avals))))
    residuals = [r for r, keep in zip(residuals, kept, strict=True) if keep]
    return linear_p.bind(*residuals, *operands, there=there, back=back, n=len(residuals))


def _find_used(closed):
    """Return which inputs a jaxpr uses."""
    return partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.out_avals))[1]


def _restrict(closed, kept):
    """Return a jaxpr of fewer inputs."""
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.out_avals), instantiate=kept)
    return closed.replace(jaxpr=jaxpr)


def _run(*args, there, back, n):
    return jaxpr_as_fun(there)(*args)


def _differentiate(primals, tangents, *, there, back, n):
    out, parts = linear_p.bind(*primals, there=there, back=back, n=n), []
    if any(type(t) is not ad.Zero for t in tangents[n:]):
        operands = map(ad.instantiate_zeros, tangents[n:])
        parts.append(linear_p.bind(*primals[:n], *operands, there=there, back=back, n=n))
    if any(type(t) is not ad.Zero for t in tangents[:n]):
        there_of_residuals = lambda *residuals: jaxpr_as_fun(there)(*residuals, *primals[n:])  # noqa: E731
        parts.append(_push_moving(there_of_residuals, primals[:n], tangents[:n]))
    return out, [sum(t[1:], t[0]) for t in zip(*parts, strict=True)]


def _transpose(cotangents, *args, there, back, n):
    cotangents = map(ad.instantiate_zeros, cotangents)
    out = linear_p.bind(*args[:n], *cotangents, there=back, back=there, n=n)
    return [None] * n + [ct if ad.is_undefined_primal(a) else None for ct, a in zip(out, args[n:], strict=True)]


def _batch(axis_data, args, dims, *, there, back, n):
    mapped = not all(d is None for d in dims)

    def map_back(*args):
        cotangents = [0 if mapped else None] * (len(args) - n)
        out = _map_members(jaxpr_as_fun(back), axis_data, [*dims[:n], *cotangents])(*args)
        # The cotangent of an operand that all members share is the sum of theirs.
        return [
            (o.sum(0) if d is None else jnp.moveaxis(o, 0, d)) if mapped else o
            for o, d in zip(out, dims[n:], strict=True)
        ]

    out = _bind(_map_members(jaxpr_as_fun(there), axis_data, dims), map_back, args[:n], args[n:])
    return out, [0 if mapped else None] * len(out)


def _push_moving(f: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
    """Return the tangents of `f(*primals)` where only some arguments have one."""
    moving = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]

    def call_with_moving(*values):
        args = list(primals)
        for i, value in zip(moving, values, strict=True):
            args[i] = value
        return f(*args)

    return jax.jvp(call_with_moving, tuple(primals[i] for i in moving), tuple(tangents[i] for i in moving))[1]


def _map_members(f: Callable[..., Any], axis_data: Any, dims: Sequence[int | None]) -> Callable[..., Any]:
    """Return `f` of arrays that are mapped along `dims`, in a batching rule; if none is, that of one member."""
    options = dict(axis_name=axis_data.name, axis_size=axis_data.size, spmd_axis_name=axis_data.spmd_name)
    if not all(d is None for d in dims):
        return jax.vmap(f, in_axes=list(dims), **options)

    def one(*args):  # its collectives over the mapped axis still count all members
        mapped = jax.vmap(lambda _: f(*args), **options)(jnp.zeros(axis_data.size))
        return jax.tree.map(lambda v: v[0], mapped)

    return one


linear_p.def_impl(_run)
linear_p.def_abstract_eval(lambda *args, there, back, n: there.out_avals)
mlir.register_lowering(linear_p, mlir.lower_fun(_run, multiple_results=True))
ad.primitive_jvps[linear_p] = _differentiate
ad.primitive_transposes[linear_p] = _transpose
batching.fancy_primitive_batchers[linear_p] = _batch
