"""The backward pass keeps x itself, and vectors of one entry per feature.

Counted where it is really kept: the arrays that the function returned by `jax.vjp` holds, and those that a `lax.scan`
over layers stacks for its backward loop.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from params import WRAPS, named, pairs

import jaxbn
import jaxbn.linen

ROWS, FEATURES = 1024, 32
SIZE = ROWS * FEATURES
# Statistics, scale and bias, in float32: at most this many vectors, and a handful of scalars.
SLACK = (12 * FEATURES * 4 + 64) / SIZE


def saved_bytes(f, *args) -> float:
    """Bytes of the arrays that the backward pass of `f` holds, per element of x."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(jax.vjp(f, *args)[1])) / SIZE


def inputs(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(1, 2, (ROWS, FEATURES)), dtype)
    return (*jaxbn.bn_init(FEATURES), x)


ACTIVATIONS = {"none": None, "relu": jax.nn.relu, "gelu": jax.nn.gelu, "tanh": jnp.tanh}


@pairs("activation, dtype, train, wrap", ACTIVATIONS, named(jnp.float32, jnp.bfloat16), named(True, "traced"), WRAPS)
def test_only_x_is_kept(wrap, activation, dtype, train):
    params, state, x = inputs(dtype)
    train = jnp.array(True) if train == "traced" else train
    f = wrap(lambda params, x: jaxbn.bn_apply(params, state, x, train, activation=activation)[0])
    saved = saved_bytes(f, params, x)
    assert x.dtype.itemsize <= saved <= x.dtype.itemsize + SLACK


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_residual_is_kept_only_for_the_activation(dtype):
    params, state, x = inputs(dtype)

    def saved(activation):
        return saved_bytes(
            lambda p, x, r: jaxbn.bn_apply(p, state, x, True, activation=activation, residual=r)[0], params, x, x + 1
        )

    assert saved(None) <= x.dtype.itemsize + SLACK
    assert saved(jax.nn.relu) <= 2 * x.dtype.itemsize + SLACK


def test_a_mask_adds_itself_alone():
    params, state, x = inputs(jnp.float32)
    mask = jnp.arange(ROWS)[:, None] % 3 > 0
    saved = saved_bytes(lambda p, x: jaxbn.bn_apply(p, state, x, True, mask=mask)[0], params, x)
    assert saved <= 4 + ROWS / SIZE + SLACK


@pytest.mark.parametrize(("dtype", "itemsize"), [(jnp.float32, 4), (jnp.bfloat16, 2)])
def test_a_scan_over_layers_stacks_one_array_a_layer(dtype, itemsize):
    """Elementwise layers between, so that all that a layer adds is seen: 4 or 2 bytes an element and layer."""
    layers = 3
    params, state, x = inputs(dtype)
    stacked = jax.tree.map(lambda v: jnp.stack([v] * layers), params)

    def f(stacked, x):
        def step(x, p):
            return jaxbn.bn_apply(p, state, x, True, activation=jax.nn.relu)[0], None

        return jax.lax.scan(step, x, stacked)[0]

    assert itemsize * layers <= saved_bytes(f, stacked, x) <= itemsize * layers + layers * SLACK


@pytest.mark.parametrize(("dtype", "least"), [(jnp.float32, 9), (jnp.bfloat16, 7)])
def test_the_instrument_sees_what_others_keep(dtype, least):
    """The control: flax with a ReLU after it keeps more, and is seen to."""
    x = inputs(dtype)[-1]
    layer = nn.BatchNorm(use_running_average=False, dtype=dtype)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        variables = layer.init(jax.random.key(0), x)

        def f(params, x):
            y, _ = layer.apply({**variables, "params": params}, x, mutable=["batch_stats"])
            return jax.nn.relu(y)

        assert saved_bytes(f, variables["params"], x) > least


@pytest.mark.parametrize(("dtype", "itemsize"), [(jnp.float32, 4), (jnp.bfloat16, 2)])
def test_the_flax_module_keeps_as_little(dtype, itemsize):
    x = inputs(dtype)[-1]
    layer = jaxbn.linen.BatchNorm(use_running_average=False, dtype=dtype, activation=jax.nn.relu)
    variables = layer.init(jax.random.key(0), x)

    def f(params, x):
        return layer.apply({**variables, "params": params}, x, mutable=["batch_stats"])[0]

    assert saved_bytes(f, variables["params"], x) <= itemsize + SLACK
