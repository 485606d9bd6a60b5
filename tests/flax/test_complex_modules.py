"""Keep the types of variables where x is complex."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_layers import KEY, STATS, X, norm

import jaxbn
import jaxbn.linen
import jaxbn.nnx

pytestmark = pytest.mark.usefixtures("ordinary_promotion")


def in_cond(layer, x):
    return nnx.cond(jnp.array(True), lambda m, x: m(x, False), lambda m, x: m(x, True), layer, x)


def in_scan(layer, x):
    def body(layer, x):
        return layer, layer(x)

    carry = nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    return carry(layer, x[None])[1][0]


@pytest.mark.parametrize("how", [in_cond, in_scan, lambda layer, x: layer(x)], ids=["cond", "scan", "plain"])
@pytest.mark.parametrize("option", ["param_dtype", "dtype"])
def test_complex_layers_are_so_from_the_start(how, option):
    x, layer = (X + 1j * X[::-1]).astype(np.complex64), norm(**{option: jnp.complex64}, momentum=0.0)
    assert (layer.mean.dtype, layer.var.dtype) == (jnp.complex64, jnp.float32)
    y = how(layer, x)
    np.testing.assert_allclose(layer.mean[...], x.mean(0), atol=1e-5)
    np.testing.assert_allclose(y, (x - x.mean(0)) / np.sqrt(np.var(x, 0) + 1e-5), atol=1e-5)


@pytest.mark.parametrize("train", [True, "traced"])
def test_a_real_mean_does_not_become_complex(train):
    x = X.astype(np.complex64)
    layer, linen = norm(), jaxbn.linen.BatchNorm()
    variables = linen.init(KEY, X, True)
    evaluate = jnp.array(False) if train == "traced" else False
    for call in (lambda: layer(x, evaluate), lambda: linen.apply(variables, x, evaluate, mutable=STATS)):
        with pytest.raises(TypeError, match="complex64"):
            call()
    for y in (layer(x, True), layer(x, False, update=False), linen.apply(variables, x, True)):
        assert y.dtype == jnp.complex64
    assert layer.mean.dtype == jnp.float32
    variables = linen.init(KEY, x, True)
    _, update = linen.apply(variables, x, False, mutable=STATS)
    chex.assert_trees_all_equal_shapes_and_dtypes(update["batch_stats"], variables["batch_stats"])
