"""NaN and infinity: shown where they are, hidden by the mask, and never found by JAX's checks in what is sound."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.experimental import checkify

import jaxbn

PARAMS, STATE = jaxbn.bn_init(3)
RNG = np.random.default_rng(0)
X = RNG.normal(2, 3, (16, 3)).astype(np.float32)
MASK = np.arange(16)[:, None] % 3 > 0
HIDDEN = np.where(MASK, X, np.nan).astype(np.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
@pytest.mark.parametrize("train", [False, "traced"])
def test_infinity_in_evaluation_stays_where_it_is(dtype, train):
    params, state = jaxbn.bn_init(3, dtype=dtype)
    x = jnp.asarray(X, dtype).at[2, 1].set(np.inf)
    flag = jnp.array(False) if train == "traced" else False

    @jax.jit
    def loss(x):
        y = jaxbn.bn_apply(params, state, x, flag)[0]
        return jnp.sum(jnp.abs(jnp.delete(y, 2, 0)))

    finite = np.isfinite(np.asarray(jax.grad(loss)(x)))
    finite[2, 1] = True
    assert finite.all()


def test_a_variance_beyond_the_dtype_is_shown():
    """100 values of std 5e18: each square is finite, their sum is not. NaN, and not 0; the state stays."""
    x = (RNG.normal(size=(100, 3)) * np.array([1, 5e18, 1])).astype(np.float32)
    y, new = jaxbn.bn_apply(PARAMS, STATE, x, True)
    assert np.isnan(y[:, 1]).all()
    assert np.isfinite(np.asarray(y)[:, [0, 2]]).all()
    assert (new.mean[1], new.var[1]) == (STATE.mean[1], STATE.var[1])
    below = (x / np.array([1, 10, 1])).astype(np.float32)
    np.testing.assert_allclose(jaxbn.bn_apply(PARAMS, STATE, below, True)[0], oracle.training(below).y, atol=2e-6)


@pytest.mark.parametrize("train", [True, False])
def test_masked_nan_passes_checks_for_nan(train):
    def loss(x):
        y = jaxbn.bn_apply(PARAMS, STATE, x, train, mask=MASK)[0]
        return jnp.sum(jnp.where(MASK, y**3, 0))

    hidden = jnp.asarray(HIDDEN)
    with jax.debug_nans(True):
        assert np.isfinite(jax.grad(loss)(hidden)).all()
        assert np.isfinite(jax.jit(jax.grad(loss))(hidden)).all()
    error, _ = checkify.checkify(jax.jit(loss), errors=checkify.float_checks)(HIDDEN)
    assert error.get() is None


def test_one_value_passes_checks_for_nan():
    layer = partial(jaxbn.bn_apply, PARAMS, STATE, train=True, unbiased_running_var=True)
    error, _ = checkify.checkify(layer, errors=checkify.float_checks)(x=X[:1])
    assert error.get() is None


@pytest.mark.parametrize("mean", [1e25, -1e30])
def test_running_means_whose_square_overflows_pass_checks_for_nan(mean):
    """The pass about such a mean is repeated; its infinities are no fault."""
    state = STATE._replace(mean=jnp.full(3, mean))
    layer = partial(jaxbn.bn_apply, PARAMS, state, train=True)
    error, (y, _) = checkify.checkify(layer, errors=checkify.float_checks)(x=X)
    assert error.get() is None
    np.testing.assert_allclose(y, oracle.training(X).y, atol=2e-6)
