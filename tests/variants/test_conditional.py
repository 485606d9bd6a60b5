"""Scale and bias that are given for each example."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from ways import assert_close, each_way

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn import BatchNormParams, Renorm

ROWS, PLACES, FEATURES = 16, 2, 3
rng = np.random.default_rng(0)
X = (rng.standard_normal((ROWS, PLACES, FEATURES)) * 2 + 5).astype(np.float32)
G = rng.standard_normal(X.shape).astype(np.float32)
SCALE, BIAS = (rng.standard_normal((ROWS, FEATURES)).astype(np.float32) for _ in range(2))
_, STATE = jaxbn.bn_init(FEATURES, mean=5.5, var=3.0)


def by_example(scale, bias, x, train=True, **options):
    return jaxbn.bn_apply(BatchNormParams(scale, bias), STATE, x, train, **options)


def spread(v):
    return None if v is None else jnp.asarray(v)[:, None, :]


def composed(scale, bias, x, train=True, activation=None, residual=None, **options):
    """Compute the same by hand: a layer without parameters, then the rest."""
    y, state = jaxbn.bn_apply(BatchNormParams(None, None), STATE, x, train, **options)
    y = y if scale is None else y * spread(scale)
    y = y if bias is None else y + spread(bias)
    y = y if residual is None else y + residual
    return (y if activation is None else activation(y)), state


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False, "traced"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": jnp.tanh, "residual": G},
        {"ghost_batches": 4},
        {"renorm": Renorm(1.2, 0.1), "ghost_batches": 2},
    ],
    ids=["plain", "epilogue", "ghosts", "renorm"],
)
def test_is_the_composition(train, options):
    """They agree in value, in all first derivatives, and in a second one."""
    flag = jnp.array(True) if train == "traced" else train

    def loss(f, scale, bias, x):
        y, state = f(scale, bias, x, flag, **options)
        return jnp.sum(jnp.sin(y) * G), (y, state)

    results = []
    for f in (by_example, composed):

        @jax.jit
        def everything(scale, bias, x, f=f):
            first = jax.grad(lambda *a: loss(f, *a), argnums=(0, 1, 2), has_aux=True)
            second = jax.jvp(lambda x: jax.grad(lambda x: loss(f, scale, bias, x)[0])(x), (x,), (G,))[1]
            return first(scale, bias, x), second

        results.append(everything(SCALE, BIAS, X))
    assert_close(results[0], results[1], atol=2e-5)


def test_against_float64():
    unit = oracle.training(X).y
    y, state = by_example(SCALE, BIAS, X)
    np.testing.assert_allclose(y, unit * spread(SCALE).astype(float) + spread(BIAS), atol=1e-5)
    assert_close(state, composed(SCALE, BIAS, X)[1], atol=0.0)


def test_either_alone_and_beside_one_by_feature():
    for scale, bias in ((SCALE, None), (None, BIAS)):
        assert_close(by_example(scale, bias, X), composed(scale, bias, X), atol=1e-6)
    one = np.array([1.0, 2.0, 3.0], np.float32)
    assert_close(by_example(SCALE, one, X), composed(SCALE, np.tile(one, (ROWS, 1)), X), atol=1e-6)
    assert_close(by_example(one, BIAS, X), composed(np.tile(one, (ROWS, 1)), BIAS, X), atol=1e-6)


def test_the_same_for_all_examples_is_the_plain_layer():
    one = np.array([1.0, -2.0, 3.0], np.float32)
    plain = jaxbn.bn_apply(BatchNormParams(one, one), STATE, X, True)
    assert_close(by_example(np.tile(one, (ROWS, 1)), np.tile(one, (ROWS, 1)), X), plain, atol=2e-6)


def test_channels_first_bfloat16_and_complex():
    y, _ = jaxbn.bn_apply(BatchNormParams(SCALE, BIAS), STATE, np.moveaxis(X, -1, 1), True, axis=1)
    np.testing.assert_allclose(np.moveaxis(y, 1, -1), by_example(SCALE, BIAS, X)[0], atol=1e-6)
    small, _ = by_example(SCALE, BIAS, jnp.asarray(X, jnp.bfloat16))
    assert small.dtype == jnp.bfloat16
    wide = by_example(SCALE, BIAS, jnp.asarray(X, jnp.bfloat16).astype(jnp.float32))[0]
    np.testing.assert_array_equal(small, wide.astype(jnp.bfloat16))
    _, state = jaxbn.bn_init(FEATURES, dtype=jnp.complex64)
    y, _ = jaxbn.bn_apply(BatchNormParams(SCALE, BIAS), state, X.astype(np.complex64), True)
    np.testing.assert_allclose(y.real, by_example(SCALE, BIAS, X)[0], atol=1e-5)


def test_nothing_of_the_size_of_x_is_kept_besides_x():
    x = rng.standard_normal((256, 16, FEATURES)).astype(np.float32)
    params = BatchNormParams(*(rng.standard_normal((256, FEATURES)).astype(np.float32) for _ in range(2)))
    f = lambda p, x: jaxbn.bn_apply(p, STATE, x, True, activation=jax.nn.relu)[0]  # noqa: E731
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(jax.vjp(f, params, x)[1]))
    assert x.nbytes <= kept <= x.nbytes * (1 + 3 / 16)


@each_way
def test_on_many_devices(way):
    mask = np.ones((32, 1), bool)
    mask[4:6], mask[31] = False, False
    x = np.where(mask, rng.standard_normal((32, FEATURES)), np.nan).astype(np.float32)
    scale, bias = (rng.standard_normal((32, FEATURES)).astype(np.float32) for _ in range(2))

    def member(whole, pieces, name=way.axis_name):
        def value(scale, bias, x):
            y, new = by_example(scale, bias, x, mask=pieces["mask"], axis_name=name)
            return jnp.sum(jnp.where(pieces["mask"], jnp.sin(y), 0)), (y, new)

        gradient = jax.grad(value, argnums=(0, 1, 2), has_aux=True)
        gradients, (y, new) = gradient(pieces["scale"], pieces["bias"], pieces["x"])
        return [y, *gradients], new

    parts = {"x": x, "mask": mask, "scale": scale, "bias": bias}
    got = way.run(member, {"none": np.zeros(1)}, parts)
    assert_close(got, jax.jit(lambda p: member({}, p, None))(parts))
    chex.assert_tree_all_finite(got)


@pytest.mark.parametrize("shape", [(ROWS - 1, FEATURES), (1, FEATURES), (ROWS, PLACES, FEATURES), (FEATURES, ROWS)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"`params\.scale`"):
        by_example(np.ones(shape, np.float32), None, X)


def test_both_modules_take_them_at_the_call():
    wanted, _ = jaxbn.bn_apply(BatchNormParams(SCALE, BIAS), jaxbn.bn_init(FEATURES)[1], X, True)
    layer = jaxbn.linen.BatchNorm(use_running_average=False, use_scale=False, use_bias=False)
    variables = layer.init(jax.random.key(0), X, scale=SCALE, bias=BIAS)
    assert "params" not in variables
    y, _ = layer.apply(variables, X, scale=SCALE, bias=BIAS, mutable=["batch_stats"])
    stateful = jaxbn.nnx.BatchNorm(FEATURES, use_scale=False, use_bias=False, rngs=nnx.Rngs(0))
    assert_close((y, stateful(X, scale=SCALE, bias=BIAS)), (wanted, wanted), atol=1e-6)
    owner = jaxbn.linen.BatchNorm(use_running_average=False)
    with pytest.raises(ValueError, match="use_scale=False"):
        owner.init(jax.random.key(0), X, scale=SCALE)
    with pytest.raises(ValueError, match="use_bias=False"):
        jaxbn.nnx.BatchNorm(FEATURES, rngs=nnx.Rngs(0))(X, bias=BIAS)
