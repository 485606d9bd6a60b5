"""The dtypes of output and state, and values beyond the range of half precision."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from params import named, pairs

import jaxbn

PARAMS, STATE = jaxbn.bn_init(3)
RNG = np.random.default_rng(0)
X = RNG.normal(2, 3, (16, 3)).astype(np.float32)


@pairs(
    "dtype, train, jit",
    named(jnp.bfloat16, jnp.float16, jnp.float32),
    named(True, False, "traced"),
    {"eager": False, "jit": True},
)
def test_dtypes(dtype, jit, train):
    x = jnp.asarray(np.random.default_rng(2).normal(3, 2, (128, 3)), dtype)
    params, state = jaxbn.bn_init(3, dtype=dtype, scale=1.5, bias=-0.25)
    assert params.scale is not None
    assert (params.scale.dtype, state.mean.dtype) == (dtype, jnp.float32)
    flag = jnp.array(False) if train == "traced" else train

    def apply(params, state, x):
        return jaxbn.bn_apply(params, state, x, flag, momentum=0.5)

    y, new = (jax.jit(apply) if jit else apply)(params, state, x)
    assert (y.dtype, new.mean.dtype, new.var.dtype, new.count.dtype) == (dtype, jnp.float32, jnp.float32, jnp.int32)
    batch = oracle.training(x, params.scale, params.bias)
    exact = batch.y if train is True else oracle.evaluation(x, state.mean, state.var, params.scale, params.bias)
    # Everything before the last rounding is float32: the output is the nearest of its dtype, or its neighbour.
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=float(jnp.finfo(dtype).eps), atol=2e-6)
    if train is True:
        np.testing.assert_allclose(new.mean, 0.5 * batch.mean, rtol=1e-6)
        np.testing.assert_allclose(new.var, 0.5 + 0.5 * batch.var, rtol=1e-6)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        x = np.random.default_rng(3).normal(1e6, 1, (64, 3))
        params, state = jaxbn.bn_init(3, dtype=jnp.float64)
        y, new = jaxbn.bn_apply(params, state, x, True)
        exact = oracle.training(x)
        assert {a.dtype for a in (y, params.scale, params.bias, new.mean, new.var)} == {np.dtype(np.float64)}
        np.testing.assert_allclose(y, exact.y, atol=1e-9)
        np.testing.assert_allclose(new.mean, 0.01 * exact.mean, rtol=1e-14)
        # A float32 state of a float64 input stays float32, for its shape and dtype must not change.
        _, new = jaxbn.bn_apply(params, jaxbn.bn_init(3)[1], x, True)
        assert new.mean.dtype == new.var.dtype == np.float32


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_statistics_beyond_float16_survive_evaluation(jit):
    # Squares of deviations of 300 exceed the largest float16, 65504; a mean of 1e4 leaves float16 steps of 8.
    rng = np.random.default_rng(4)
    x = jnp.asarray(np.stack([rng.normal(1e4, 64, 512), rng.normal(0, 300, 512)], axis=1), jnp.float16)
    exact = oracle.training(x)
    assert exact.var[1] > np.finfo(np.float16).max

    def apply(state, x, train):
        return jaxbn.bn_apply(jaxbn.bn_init(2)[0], state, x, train, momentum=0.0)

    apply = jax.jit(apply, static_argnums=2) if jit else apply
    y, state = apply(jaxbn.bn_init(2)[1], x, True)
    evaluated, _ = apply(state, x, False)
    for got in (y, evaluated):
        assert got.dtype == jnp.float16
        np.testing.assert_allclose(np.asarray(got, np.float64), exact.y, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(state.mean, exact.mean, rtol=1e-6, atol=1e-4)
    np.testing.assert_allclose(state.var, exact.var, rtol=1e-6)


def in_half(state):
    return jax.tree.map(lambda v: v.astype(jnp.float16) if jnp.issubdtype(v.dtype, jnp.floating) else v, state)


def plain(state, x):
    return jaxbn.bn_apply(PARAMS, state, x, True, momentum=0.0)[1]


def by_domain(state, x):
    params, states = (jax.tree.map(lambda v: v[None], tree) for tree in (PARAMS, state))
    new = jaxbn.domains.domain_apply(params, states, x, True, 0, momentum=0.0)[1]
    return jax.tree.map(lambda v: v[0], new)


def in_parts(state, x):
    return jaxbn.bn_apply(PARAMS, state, x, True, momentum=0.0, ghost_batches=2)[1]


@pytest.mark.parametrize("layer", [plain, by_domain, in_parts])
@pytest.mark.parametrize("size", [1e3, 1e5])
def test_moments_beyond_the_state_dtype_are_not_stored(layer, size):
    """Finite moments, of which the variance, or the mean too, overflows in the dtype of the state."""
    x = X * np.array([1, 1, size], np.float32)
    state, new = in_half(STATE), layer(in_half(STATE), x)
    assert np.isfinite(np.asarray(jnp.stack(new[:2]))).all()
    assert new.mean[2] == state.mean[2]
    assert new.var[2] == state.var[2]
    np.testing.assert_allclose(new.mean[:2], x.mean(0)[:2], rtol=2e-3)


def test_whitening_stores_no_moments_beyond_the_state_dtype():
    params, state = jaxbn.whitening.whiten_init(3)
    new = jaxbn.whitening.whiten_apply(params, in_half(state), X * np.float32(1e3), True, momentum=0.0)[1]
    jax.tree.map(np.testing.assert_array_equal, new, in_half(state))
