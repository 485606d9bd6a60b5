"""Diagnose layers that run under `vmap` and in compiled functions."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_layers import KEY, X, norm
from params import named, pairs

import jaxbn
import jaxbn.linen
import jaxbn.nnx

pytestmark = pytest.mark.usefixtures("ordinary_promotion")


MEANS, VARIANCES = np.array([[0.0, 0, 0], [9, 1, 2]], np.float32), np.array([[1.0, 1, 1], [9, 9, 4]], np.float32)


def compare(x, mean, var, scale):
    """Return the gaps of a member of the map, by the layer alone."""
    params, state = jaxbn.bn_init(3, mean=mean, var=var)
    params = params._replace(scale=scale * params.scale)
    batch = jaxbn.diagnostics.health(params, state, x)[0].batch
    assert batch is not None
    return batch


NORMS = {"flax": nn.BatchNorm, "ours": jaxbn.linen.BatchNorm}


@pairs("mapped, dense, norm", named("params", "batch_stats", "both"), {"raw": False, "dense": True}, NORMS)
def test_health_of_mapped_layers(norm, mapped, dense):
    """A twin critic, whose normalization gets the raw input or that of a mapped layer: the worst member is shown."""
    axes: Any = {"params": 0 if mapped != "batch_stats" else None, "batch_stats": 0 if mapped != "params" else None}
    rng = {"params": axes["params"] == 0}

    class Critic(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(3, use_bias=False, kernel_init=lambda *_: 2 * jnp.eye(3))(x) if dense else x
            return norm(use_running_average=True, name="norm")(x)

    twin = nn.vmap(Critic, variable_axes=axes, split_rngs=rng, in_axes=None, axis_size=2)()
    variables: Any = twin.init(KEY, X)
    scale, stats = variables["params"]["norm"]["scale"], variables["batch_stats"]["norm"]
    assert scale.ndim == (2 if mapped != "batch_stats" else 1)
    if stats["mean"].ndim == 2:
        stats |= {"mean": jnp.asarray(MEANS), "var": jnp.asarray(VARIANCES)}
    if scale.ndim == 2:
        variables["params"]["norm"]["scale"] = scale * jnp.array([[1.0], [7]])
    found = jaxbn.linen.health(variables, twin.apply, X)
    members = [
        compare(
            2 * X if dense else X,
            MEANS[i if mapped != "params" else 0],
            VARIANCES[i if mapped != "params" else 0],
            [1, 7][i] if mapped != "batch_stats" else 1,
        )
        for i in range(2)
    ]
    wanted = max(members, key=lambda batch: max(batch[1:4]))
    assert found[0].path == "norm"
    np.testing.assert_allclose(found[0].batch[:4], wanted[:4], rtol=1e-4)


def test_health_of_mapped_nnx_layers():
    layer = norm()

    @nnx.vmap(in_axes=(nnx.StateAxes({nnx.Param: None, nnx.BatchStat: None}), None, 0))
    def call(layer, x, scale):
        return layer(x, residual=scale * x)

    found = jaxbn.nnx.health(layer, X, lambda layer, x: call(layer, x, jnp.arange(2.0)))
    np.testing.assert_allclose(found[0].batch[:4], compare(X, MEANS[0], VARIANCES[0], 1)[:4], rtol=1e-4)


def test_health_of_an_nnx_twin():
    """Stacked variables, mapped, on the raw input."""
    twin = nnx.vmap(lambda rngs: jaxbn.nnx.BatchNorm(3, rngs=rngs))(nnx.Rngs(0).split(2))
    twin.mean.set_value(jnp.asarray(MEANS))
    twin.var.set_value(jnp.asarray(VARIANCES))
    found = jaxbn.nnx.health(twin, X, lambda twin, x: nnx.vmap(lambda m, x: m(x), in_axes=(0, None))(twin, x))
    wanted = max((compare(X, *own, 1) for own in zip(MEANS, VARIANCES, strict=True)), key=lambda b: max(b[1:4]))
    np.testing.assert_allclose(found[0].batch[:4], wanted[:4], rtol=1e-4)


def test_a_mapped_layer_in_a_compiled_function_stays_as_it_was():
    """Nothing of the comparison is compiled into the user's function."""
    model = jaxbn.linen.BatchNorm(use_running_average=True)
    variables = model.init(KEY, X)
    inner = jax.jit(jax.vmap(model.apply, in_axes=(None, 0)))
    with pytest.warns(UserWarning, match="compared"):
        jaxbn.linen.health(variables, lambda v, x: inner(v, x), X[None])
    np.testing.assert_allclose(inner(variables, X[None])[0], model.apply(variables, X))


@pytest.mark.parametrize("compiled", [jax.jit, lambda f: jax.jit(jax.jit(f))])
def test_health_sees_into_a_compiled_function(compiled):
    """And says so where one is inside another."""
    model = jaxbn.linen.BatchNorm(use_running_average=True)
    variables = model.init(KEY, X)
    assert jaxbn.linen.health(variables, compiled(model.apply), X)[0].batch is not None
    inner = jax.jit(model.apply)
    with pytest.warns(UserWarning, match="plain function"):
        found = jaxbn.linen.health(variables, lambda v, x: inner(v, x), X)
    assert found[0].batch is None


def test_health_sees_into_a_compiled_call():
    model = nnx.Sequential(norm())
    assert jaxbn.nnx.health(model, X, nnx.jit(lambda model, x: model(x)))[0].batch is not None
