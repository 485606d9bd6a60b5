"""The output and the first gradients, against the float64 reference, jitted and eager alike."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxbn
from jaxbn import BatchNormParams, BatchNormState

# mean / std of the four features of `data`: from easy to where float32 resolves a sixteenth of a standard deviation.
RATIOS = np.array([0.0, 1e2, 1e4, 1e6])


def train_plainly(x):
    """Training by a layer without parameters, as one compiled function."""
    params, state = jaxbn.bn_init(x.shape[-1], scale=None, bias=None)
    return jaxbn.bn_apply(params, state, x, True, momentum=0.0)


WAYS = [pytest.param(train_plainly, id="eager"), pytest.param(jax.jit(train_plainly), id="jit")]


@cache
def data(rows: int) -> tuple[np.ndarray, oracle.Forward]:
    """Float32 input of std 1 and means `RATIOS`, and what float64 makes of the very same numbers."""
    rng = np.random.default_rng(rows)
    x = (rng.normal(size=(rows, len(RATIOS))) + RATIOS).astype(np.float32)
    return x, oracle.training(x)


@pytest.mark.parametrize("rows", [64, 4096, 65536, 2**20])
@pytest.mark.parametrize("apply", WAYS)
def test_float32_output_is_exact(apply, rows):
    x, exact = data(rows)
    y, state = apply(x)
    # x_hat of 2^20 values reaches 5, where half a unit of the last place is 2.4e-7, and it has a few roundings.
    worst = np.max(np.abs(np.asarray(y, np.float64) - exact.y), axis=0)
    assert np.all(worst <= 2e-6), dict(zip(RATIOS, worst, strict=True))
    # What is kept is the float32 nearest to the mean, but for the rounding of an average that keeps none of the past.
    np.testing.assert_allclose(state.mean, exact.mean, rtol=2e-7, atol=1e-6)
    np.testing.assert_allclose(state.var, exact.var, rtol=2e-6)


@pytest.mark.parametrize("rows", [64, 65536])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_float32_output_is_exact_with_a_mask(jit, rows):
    x, _ = data(rows)
    mask = np.random.default_rng(1).random((rows, 1)) < 0.7
    exact = oracle.training(x, mask=mask)
    apply = partial(jaxbn.bn_apply, *jaxbn.bn_init(len(RATIOS)), train=True)
    y, _ = (jax.jit(apply) if jit else apply)(x=x, mask=mask)
    assert np.max(np.abs(np.asarray(y, np.float64) - exact.y)) <= 2e-6


def test_float32_output_is_exact_channels_first():
    x, exact = data(4096)
    first = np.moveaxis(x.reshape(16, 16, 16, len(RATIOS)), -1, 1)
    y, _ = jaxbn.bn_apply(*jaxbn.bn_init(len(RATIOS)), first, True, axis=1)
    assert np.max(np.abs(np.moveaxis(np.asarray(y, np.float64), 1, -1).reshape(x.shape) - exact.y)) <= 2e-6


@pytest.mark.parametrize("rows", [64, 4096, 65536])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_float32_gradients_are_exact_at_a_mean_of_100(jit, rows):
    rng = np.random.default_rng(7)
    x = (rng.normal(size=(rows, 3)) + 100).astype(np.float32)
    # A cotangent with a mean, so that dbias and dscale are sums of some size and not of pure rounding.
    dy = (rng.normal(size=x.shape) + 0.5 + 0.1 * x - 10).astype(np.float32)
    params, state = jaxbn.bn_init(3, scale=np.array([0.5, 1.0, 2.0]), bias=0.1)

    def pulled(params, x, dy):
        _, pull, _ = jax.vjp(lambda p, x: jaxbn.bn_apply(p, state, x, True), params, x, has_aux=True)
        return pull(dy)

    (ours, dx) = (jax.jit(pulled) if jit else pulled)(params, x, dy)
    exact = oracle.gradients(x, dy, params.scale)
    for name, got, want in zip(("dx", "dscale", "dbias"), (dx, ours.scale, ours.bias), exact, strict=True):
        error = np.max(np.abs(np.asarray(got, np.float64) - want)) / np.max(np.abs(want))
        assert error <= 5e-6, (name, error)


def test_the_running_mean_has_no_gradient_in_training():
    params, state = jaxbn.bn_init(len(RATIOS))
    x, _ = data(64)

    def loss(mean, train):
        return jnp.sum(jnp.sin(jaxbn.bn_apply(params, state._replace(mean=mean), x, train)[0]))

    for train in (True, jnp.array(True)):
        np.testing.assert_array_equal(jax.grad(loss)(state.mean, train), np.zeros(len(RATIOS)))
    assert np.any(jax.grad(loss)(state.mean, jnp.array(False)) != 0)


def test_jitted_and_eager_agree_to_the_last_bit():
    """The sums are the same program; after them a compiler may fuse a product and a sum into one rounding."""
    x, _ = data(4096)
    (y, state), (jitted, jitted_state) = train_plainly(x), jax.jit(train_plainly)(x)
    np.testing.assert_allclose(y, jitted, rtol=2.5e-7, atol=2.5e-7)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2.5e-7), state, jitted_state)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    mean=st.floats(-1e6, 1e6),
    std=st.floats(1e-3, 1e3),
    scale=st.floats(-4, 4, width=32),
    train=st.booleans(),
)
def test_any_data_is_normalized_to_rounding(seed, mean, std, scale, train):
    """One shape, so that one program serves all examples."""
    x = np.random.default_rng(seed).normal(mean, std, (32, 2)).astype(np.float32)
    exact = oracle.training(x)
    params = BatchNormParams(jnp.full(2, scale, jnp.float32), jnp.full(2, 0.5, jnp.float32))
    state = BatchNormState(
        jnp.asarray(exact.mean, jnp.float32), jnp.asarray(exact.var, jnp.float32), jnp.zeros((), jnp.int32)
    )
    y, _ = jaxbn.bn_apply(params, state, x, train)
    if train:
        want = oracle.training(x, params.scale, params.bias).y
    else:
        want = oracle.evaluation(x, state.mean, state.var, params.scale, params.bias)
    # |x_hat| of 32 values is below sqrt(31); a handful of roundings of it, times the gain.
    np.testing.assert_allclose(np.asarray(y, np.float64), want, rtol=0, atol=2e-6 * max(1.0, abs(scale)))


@pytest.mark.parametrize("axis", [(1, 3), (3, 1), (-1, 1), (2, 0, 3), (0,), 2, ()])
def test_feature_axes_in_any_order(axis):
    """Parameters and state have one axis for each of `axis`, in its order; `()` is one for the whole array."""
    x = np.random.default_rng(5).normal(2, 3, (4, 3, 2, 5)).astype(np.float32)
    shape = oracle.feature_shape(x, axis)
    rng = np.random.default_rng(6)
    scale, bias = rng.normal(1, 0.3, (2, *shape)).astype(np.float32)
    params, state = jaxbn.bn_init(shape, scale=scale, bias=bias)
    apply = jax.jit(partial(jaxbn.bn_apply, axis=axis, momentum=0.0), static_argnums=3)
    y, new = apply(params, state, x, True)
    exact = oracle.training(x, scale, bias, axis=axis)
    np.testing.assert_allclose(y, exact.y, atol=4e-6)
    np.testing.assert_allclose(new.mean, exact.mean, rtol=1e-5, atol=1e-6)
    evaluated, _ = apply(params, new, x, False)
    np.testing.assert_allclose(evaluated, exact.y, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (6, 1, 1), (1, 4, 1), (1, 1, 3), (6, 1, 3), (4, 3), (6, 4, 3)])
def test_mask_of_every_broadcastable_shape(shape):
    """A mask may differ between features, or hide one altogether."""
    x = np.random.default_rng(7).normal(2, 3, (6, 4, 3)).astype(np.float32)
    mask = np.random.default_rng(8).random(shape) < 0.6 if np.prod(shape) > 1 else np.ones(shape, bool)
    exact = oracle.training(x, mask=mask)
    y, new = jax.jit(lambda x: jaxbn.bn_apply(*jaxbn.bn_init(3), x, True, mask=mask, momentum=0.0))(x)
    present = exact.count > 0
    np.testing.assert_allclose(y[..., present], exact.y[..., present], atol=4e-6)
    np.testing.assert_allclose(new.mean, np.where(present, exact.mean, 0), rtol=1e-5)
    np.testing.assert_allclose(new.var, np.where(present, exact.var, 1), rtol=1e-5)
