"""Whitening: the identity as covariance, the limits of the iteration, gradients, and masks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ways import assert_close
from whiten_oracle import FEATURES, MIX, NONE, PARAMS, ROWS, STATE, G, X, covariance, exact

import jaxbn
from jaxbn.whitening import WhitenState, whiten_apply, whiten_init

rng = np.random.default_rng(2)


def conditioned(condition, features=8, rows=4096):
    """Return data whose covariance has eigenvalues from 1 to 1 / condition, in no special directions."""
    rng = np.random.default_rng(1)
    basis, _ = np.linalg.qr(rng.standard_normal((features, features)))
    z = rng.standard_normal((rows, features))
    z = (z - z.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(z.T, bias=True))).T
    return ((z * np.geomspace(1, condition**-0.5, features)) @ basis.T).astype(np.float32)


@pytest.mark.parametrize("condition", [*(pytest.param(c, marks=pytest.mark.slow) for c in (1.0, 1e2)), 1e4])
def test_the_covariance_is_the_identity(condition):
    """It is so to 1e-3 after enough iterations, and stays so: the coupled iteration does not diverge."""
    x = conditioned(condition)
    for steps in (25, 60):
        y, _ = whiten_apply(NONE, whiten_init(8)[1], x, True, iterations=steps, epsilon=1e-9)
        np.testing.assert_allclose(covariance(y), np.eye(8), atol=1e-3)


@pytest.mark.parametrize("std", [3.0, 10.0])
def test_more_features_than_examples(std):
    """However many iterations: rounding makes eigenvalues of 0 negative, and 28 gave NaN at the default epsilon."""
    x = (std * np.random.default_rng(0).standard_normal((8, 64))).astype(np.float32)
    largest = [float(abs(whiten_apply(NONE, whiten_init(64)[1], x, True, iterations=n)[0]).max()) for n in (20, 100)]
    assert 1 < largest[0] < 1.2
    assert largest[1] == pytest.approx(largest[0], rel=1e-3)


@pytest.mark.parametrize("mask", [None, np.arange(ROWS)[:, None] < ROWS - 2])
def test_a_distant_mean_costs_no_digits(mask):
    x = np.asarray(X + 1e5, np.float32)
    y, _ = whiten_apply(NONE, STATE, x, True, iterations=5, mask=mask)
    kept = slice(None) if mask is None else mask[:, 0]
    # The examples differ by multiples of 1/128, which is all that x has of them; what is computed loses nothing more.
    np.testing.assert_allclose(y[kept], exact(x[kept], 5), atol=1e-5)


def test_no_iterations_divide_by_the_root_of_the_trace():
    y, _ = whiten_apply(NONE, STATE, X, True, iterations=0)
    np.testing.assert_allclose(np.trace(covariance(y)), 1, rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 20])
def test_is_the_definition(steps):
    y, state = whiten_apply(PARAMS, STATE, X, True, iterations=steps, momentum=0.9)
    scale, bias = (np.asarray(v, np.float64) for v in PARAMS)
    # A condition number of some hundreds takes as many of the 24 bits.
    np.testing.assert_allclose(y, exact(X, steps) * scale + bias, atol=2e-4)
    np.testing.assert_allclose(state.mean, 0.1 * X.mean(0, dtype=np.float64), rtol=1e-6, atol=1e-6)
    wanted = 0.9 * np.eye(FEATURES) + 0.1 * covariance(X)
    np.testing.assert_allclose(state.cov[0], wanted, rtol=1e-4, atol=1e-4)
    assert int(state.count) == 1


def test_evaluation_uses_the_running_statistics():
    cov = np.asarray(MIX.T @ MIX, np.float32)
    state = WhitenState(jnp.asarray(X.mean(0)), jnp.asarray(cov)[None], jnp.array(3, jnp.int32))
    y, after = whiten_apply(NONE, state, X, False, iterations=10)
    np.testing.assert_allclose(y, exact(X, 10, mean=X.mean(0, dtype=float), cov=cov.astype(float)), atol=1e-3)
    chex.assert_trees_all_equal(after, state)
    rows = jnp.concatenate([whiten_apply(NONE, state, X[i : i + 8], False, iterations=10)[0] for i in (0, 8)])
    assert_close(rows, y[:16], atol=1e-5)


def test_gradient_by_finite_differences():
    """Compare with central differences in float64, through mean, covariance and iteration."""

    def loss(params, x):
        y, _ = whiten_apply(params, STATE, x, True)
        return jnp.sum(jnp.sin(y) * G)

    d_params, dx = jax.jit(jax.grad(loss, argnums=(0, 1)))(PARAMS, X)
    scale, bias = (np.asarray(v, np.float64) for v in PARAMS)

    def value(x, scale=scale, bias=bias):
        return np.sum(np.sin(exact(x, 5) * scale + bias) * G)

    wide = X.astype(np.float64)
    for at in [(0, 0), (7, 1), (30, 2), (63, 3)]:
        step = np.zeros(X.shape)
        step[at] = 1e-5
        np.testing.assert_allclose(dx[at], (value(wide + step) - value(wide - step)) / 2e-5, rtol=1e-2, atol=1e-3)
    for i in range(FEATURES):
        step = 1e-5 * np.eye(FEATURES)[i]
        up, down = value(wide, scale + step), value(wide, scale - step)
        np.testing.assert_allclose(d_params.scale[i], (up - down) / 2e-5, rtol=1e-2, atol=1e-3)
    # The same shift of all rows changes nothing.
    np.testing.assert_allclose(np.sum(dx, 0), 0, atol=1e-3)


def test_groups_are_whitened_separately():
    params, state = whiten_init(FEATURES, group_size=2)
    y, new = whiten_apply(params, state, X, True)
    half = [whiten_apply(NONE, whiten_init(2)[1], X[:, i : i + 2], True) for i in (0, 2)]
    assert_close(y, jnp.concatenate([v for v, _ in half], 1), atol=1e-5)
    assert_close(new.cov, jnp.concatenate([s.cov for _, s in half]), atol=1e-5)


def test_one_feature_a_group_is_batch_normalization():
    """Each feature is divided by its own standard deviation after enough iterations."""
    params, state = whiten_init(FEATURES, group_size=1)
    y, _ = whiten_apply(params, state, X, True, iterations=12)
    assert_close(y, jaxbn.bn_apply(*jaxbn.bn_init(FEATURES), X, True)[0], atol=1e-4)


def test_rotation_commutes():
    """ZCA: rotating the input rotates the output."""
    turn, _ = np.linalg.qr(rng.standard_normal((FEATURES, FEATURES)))
    centred = X - X.mean(0)
    plain = whiten_apply(NONE, STATE, centred, True)[0]
    turned = whiten_apply(NONE, STATE, (centred @ turn).astype(np.float32), True)[0]
    np.testing.assert_allclose(turned, plain @ turn, atol=2e-3)


def test_channels_first_and_positions():
    image = X.reshape(8, 8, FEATURES)
    y, state = whiten_apply(PARAMS, STATE, image, True)
    first, other = whiten_apply(PARAMS, STATE, np.moveaxis(image, -1, 1), True, axis=1)
    assert_close((jnp.moveaxis(first, 1, -1), other), (y, state), atol=1e-4)
    assert_close(y.reshape(X.shape), whiten_apply(PARAMS, STATE, X, True)[0], atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_half_precision(dtype):
    x = jnp.asarray(X, dtype)
    y, state = whiten_apply(PARAMS, STATE, x, True)
    assert y.dtype == dtype
    assert state.cov.dtype == jnp.float32
    wide, _ = whiten_apply(PARAMS, STATE, x.astype(jnp.float32), True)
    np.testing.assert_array_equal(y, wide.astype(dtype))


def test_masks():
    """NaN, infinity or a number under the mask: nothing of it in what counts; the rest as if it were all there is."""
    mask = (np.arange(ROWS) % 3 > 0)[:, None]

    @jax.jit
    def masked(x):
        def loss(x):
            y, state = whiten_apply(PARAMS, STATE, x, True, mask=mask)
            return jnp.sum(jnp.where(mask, jnp.sin(y), 0)), (y, state)

        return jax.grad(loss, has_aux=True)(x)

    counted = mask.ravel()
    wanted, state = whiten_apply(PARAMS, STATE, X[counted], True)
    for hidden in (np.nan, np.inf, 1e30, 7.0):
        dx, (y, new) = masked(np.where(mask, X, np.float32(hidden)))
        assert_close(y[counted], wanted, atol=1e-4)
        assert_close(new, state, atol=1e-4)
        chex.assert_tree_all_finite((dx, y))
    with pytest.raises(ValueError, match="same for all features"):
        whiten_apply(PARAMS, STATE, X, True, mask=np.ones(X.shape, bool))


@pytest.mark.slow
def test_nothing_to_whiten_changes_nothing():
    for options in ({"mask": np.zeros((ROWS, 1), bool)}, {"update": False}):
        y, state = whiten_apply(PARAMS, STATE, X, True, **options)
        chex.assert_tree_all_finite(y)
        chex.assert_trees_all_equal(state, STATE)
    broken = X.copy()
    broken[0, 0] = np.nan
    chex.assert_trees_all_equal(whiten_apply(PARAMS, STATE, broken, True)[1], STATE)
    for x in (np.zeros_like(X), X[:1], X[:0]):
        gradient = jax.grad(lambda x: jnp.sum(jnp.sin(whiten_apply(PARAMS, STATE, x, True)[0])))(x)
        chex.assert_tree_all_finite(gradient)


def test_a_loop_carries_the_state_and_a_traced_flag_compiles_once():
    step = jax.jit(chex.assert_max_traces(lambda state, train: whiten_apply(PARAMS, state, X, train)[1], n=1))
    state = STATE
    for train in (True, False, True):
        state = step(state, jnp.array(train))
    assert int(state.count) == 2
    scanned, _ = jax.lax.scan(lambda s, x: (whiten_apply(PARAMS, s, x, True)[1], None), STATE, jnp.stack([X, X]))
    assert_close(scanned, state, atol=1e-4)


def test_momentum_schedules():
    _, state = whiten_apply(PARAMS, STATE, X, True, momentum=jaxbn.zero_debiased(0.9))
    np.testing.assert_allclose(state.cov[0], covariance(X), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: whiten_init(6, group_size=4), ValueError, "divide"),
        (lambda: whiten_init(6, group_size=0), ValueError, "divide"),
        (lambda: whiten_init(6, group_size=2.0), TypeError, "group_size"),
        (lambda: whiten_init((2, 3)), ValueError, "one feature axis"),
        (lambda: whiten_init(4, dtype=jnp.complex64), TypeError, "real"),
        (lambda: whiten_init(4, dtype="foo"), TypeError, "`dtype` must be .*; got 'foo'"),
        (lambda: whiten_init(4, var=2.0), TypeError, "var"),
        (lambda: whiten_apply(PARAMS, STATE, X, True, axis=()), ValueError, r"`axis` must be one axis.*; got \(\)"),
        (lambda: whiten_apply(PARAMS, STATE, X, True, axis=(0, 1)), ValueError, r"`axis` must be one axis"),
        (lambda: whiten_apply(PARAMS, STATE, X[:, :3], True), ValueError, "3 features"),
        (lambda: whiten_apply(None, STATE, X, True), TypeError, "`params`"),
        (lambda: whiten_apply(PARAMS, STATE._replace(mean=None), X, True), TypeError, "mean"),
        (lambda: whiten_apply(PARAMS, STATE._replace(mean=STATE.mean.astype(int)), X, True), TypeError, "mean"),
        (
            lambda: whiten_apply(jaxbn.bn_init(4, dtype=jnp.complex64)[0], STATE, X, True),
            TypeError,
            "real",
        ),
        (lambda: whiten_apply(PARAMS, jaxbn.bn_init(4)[1], X, True), TypeError, "whiten_init"),
        (lambda: whiten_apply(PARAMS, STATE, X, True, iterations=-1), ValueError, "iterations"),
        (lambda: whiten_apply(PARAMS, STATE, X, True, iterations=2.5), TypeError, "iterations"),
        (lambda: whiten_apply(PARAMS, STATE, X.astype(int), True), TypeError, "floating"),
        (lambda: whiten_apply(PARAMS, STATE, X, True, axis_name="d"), ValueError, "axis_name"),
        (lambda: whiten_apply(PARAMS, STATE, X, 1), TypeError, "train"),
    ],
)
def test_refused(call, kind, words):
    with pytest.raises(kind, match=words):
        call()
