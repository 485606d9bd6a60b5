"""Derivatives over several members, in every mode, against the plain formula in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from device_cases import FEATURES, shards
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from params import param
from ways import AXIS, MEMBERS, ONE, assert_close, each_named_way, mesh_of

import jaxbn


def plain_formula(params, x, mask=True):
    """Batch normalization as JAX differentiates it unaided."""
    mean, var = (v[None] for v in (jnp.mean(x, 0, where=mask), jnp.var(x, 0, where=mask)))
    return (x - mean) / jnp.sqrt(var + 1e-5) * params.scale[None] + params.bias[None]


def derivatives(layer, total, params, x, directions, weights):
    """Return derivatives of `y = layer(params, x)` by x, and of `sum(weights sin(y))` by both, nested in four ways."""

    def loss(params, x):
        return jnp.sum(weights * jnp.sin(layer(params, x)))

    forward = jax.jvp(partial(layer, params), (x,), (directions,))[1]
    gradient, by_x = jax.grad(loss, argnums=(0, 1))(params, x), jax.grad(loss, argnums=1)
    over_reverse = jax.jvp(partial(by_x, params), (x,), (directions,))[1]
    twice = jax.grad(lambda p, x: jnp.sum(by_x(p, x) * directions), argnums=(0, 1))(params, x)
    shared, own = zip(gradient, twice, strict=True)
    return (forward, over_reverse, *own), total(shared)


@each_named_way
def test_derivatives(way):
    """Forward, reverse, forward over reverse and reverse over reverse, taken by each member, to 1e-9.

    What the mask hides is finite here, and its outputs enter the loss: normalized by the statistics, not part of them.
    """
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        params, state = jaxbn.bn_init(FEATURES, dtype=jnp.float64, scale=rng.standard_normal(FEATURES), bias=0.5)
        parts = {name: rng.standard_normal((16, FEATURES)) for name in ("directions", "weights")}
        parts |= {"x": shards(16).astype(np.float64), "mask": np.arange(16)[:, None] % 5 > 1}

        def layer(params, x, mask):
            return jaxbn.bn_apply(params, state, x, True, mask=mask, axis_name=AXIS)[0]

        def member(formula, total, whole, parts):
            of = {name: v for name, v in parts.items() if name != "mask"}
            return derivatives(partial(formula, mask=parts["mask"]), total, whole["params"], **of)

        got = way.run(partial(member, layer, way.total), {"params": params}, parts)
        wanted = ONE.run(partial(member, plain_formula, lambda v: v), {"params": params}, parts)
        assert_close(got, wanted, atol=1e-9)


@pytest.mark.parametrize(
    "check_vma",
    [param(True, quick=True, id="vma"), param(False, quick=False, id="unchecked"), param(None, quick=False, id="vmap")],
)
def test_jacobians(check_vma):
    """Differentiated from outside, forward and reverse mode give the plain formula's Jacobian, to 1e-9.

    `jit` is outermost: a `jit` between `vmap(axis_name=)` and the derivative puts off JAX's look at the derivative
    rule until the name is no longer bound.
    """
    with jax.enable_x64(True):
        params, state = jaxbn.bn_init(2, dtype=jnp.float64, scale=np.array([0.5, 2.0]))
        x = shards(MEMBERS, features=2).astype(np.float64)

        def member(params, x):
            return jaxbn.bn_apply(params, state, x, True, axis_name=AXIS)[0]

        if check_vma is None:
            by_row = jax.vmap(member, in_axes=(None, 0), axis_name=AXIS)
            everything = lambda params, x: by_row(params, x[:, None])[:, 0]  # noqa: E731
        else:
            mesh, ins = mesh_of(AxisType.Auto), (P(), P(AXIS))
            everything = jax.shard_map(member, mesh=mesh, in_specs=ins, out_specs=P(AXIS), check_vma=check_vma)
        wanted = jax.jit(jax.jacrev(plain_formula, argnums=(0, 1)))(params, x)
        for jacobian in (jax.jacfwd, jax.jacrev):
            assert_close(jax.jit(jacobian(everything, argnums=(0, 1)))(params, x), wanted, atol=1e-9)
