"""Nothing poisons the running statistics, and the state keeps its structure under every transformation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from params import WRAPS, named, pairs

import jaxbn

ROWS, FEATURES = 16, 3
PARAMS, FRESH = jaxbn.bn_init(FEATURES, scale=np.array([1.0, -2.0, 0.5], np.float32), bias=0.25)
EARLIER = np.random.default_rng(1).normal(2, 3, (ROWS, FEATURES)).astype(np.float32)
STATE = jaxbn.bn_apply(PARAMS, FRESH, EARLIER, True)[1]
X = np.random.default_rng(0).normal(1, 2, (ROWS, FEATURES)).astype(np.float32)
JITTED = pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])


def grads(x, mask=None, weight=None, **options):
    """Output, new state, and the gradients of a weighted sum of outputs with respect to params and x."""

    def loss(params, x):
        y, state = jaxbn.bn_apply(params, STATE, x, True, mask=mask, **options)
        return jnp.sum(jnp.sin(y) if weight is None else jnp.where(weight, jnp.sin(y), 0)), (y, state)

    (_, (y, state)), (d_params, d_x) = jax.value_and_grad(loss, (0, 1), has_aux=True)(PARAMS, x)
    return y, state, d_params, d_x


@pairs("bad, rows, wrap", named(np.nan, np.inf, -np.inf, 3e38), named(1, ROWS), WRAPS)
def test_a_bad_value_never_enters_the_state(wrap, bad, rows):
    """The feature that it hits keeps its statistics; the others move; the count grows."""
    x = X[:rows].copy()
    x[0, 1] = bad
    y, state, _, d_x = wrap(grads)(x)
    clean = jaxbn.bn_apply(PARAMS, STATE, X[:rows], True)[1]
    for got, kept, moved in zip(state[:2], STATE[:2], clean[:2], strict=True):
        np.testing.assert_array_equal(got[1], kept[1])
        np.testing.assert_allclose(got[jnp.array([0, 2])], moved[jnp.array([0, 2])], rtol=1e-6)
    assert state.count == STATE.count + 1
    if rows > 1:
        assert not np.isfinite(y[:, 1]).all(), "the output shows what was in the data"
        assert not np.isfinite(d_x[:, 1]).all(), "and so does the gradient"
        assert np.isfinite(np.asarray(y)[:, [0, 2]]).all()


@JITTED
def test_a_batch_that_is_all_bad_does_not_count(wrap):
    _, state, _, _ = wrap(grads)(np.full_like(X, np.nan))
    chex.assert_trees_all_equal(state, STATE)


@JITTED
@pytest.mark.parametrize("hidden", [0.0, np.nan, np.inf, 3e38])
def test_all_masked_keeps_the_state(wrap, hidden):
    y, state, d_params, d_x = wrap(grads)(np.full_like(X, hidden), mask=np.zeros((ROWS, 1), bool))
    chex.assert_trees_all_equal(state, STATE)
    chex.assert_tree_all_finite((y, d_params, d_x))
    np.testing.assert_array_equal(y, np.full_like(X, 0.25))  # no statistics, no information: x_hat = 0


@JITTED
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_an_empty_batch_keeps_the_state(wrap, dtype):
    y, state, d_params, d_x = wrap(grads)(X[:0].astype(dtype))
    chex.assert_trees_all_equal(state, STATE)
    assert y.shape == d_x.shape == (0, FEATURES)
    chex.assert_trees_all_equal(d_params, jax.tree.map(jnp.zeros_like, PARAMS))


@JITTED
@pytest.mark.parametrize("value", [0.0, 7.0, -1e6, 1e-30, 1e18])
def test_constant_input_gives_the_bias(wrap, value):
    y, state, d_params, d_x = wrap(grads)(np.full_like(X, value))
    np.testing.assert_array_equal(y, np.full_like(X, 0.25))
    chex.assert_tree_all_finite((state, d_params, d_x))


@JITTED
def test_one_value_per_feature_gives_the_bias(wrap):
    """x_hat = 0, and nothing flows back: x minus its own mean is 0 for any x."""
    y, _, d_params, d_x = wrap(grads)(X[:1])
    np.testing.assert_array_equal(y, np.full((1, FEATURES), 0.25, np.float32))
    np.testing.assert_array_equal(d_x, np.zeros((1, FEATURES)))
    np.testing.assert_array_equal(d_params.scale, np.zeros(FEATURES))


def test_one_value_has_no_unbiased_variance():
    """It leaves the statistics alone rather than entering 0 / 0."""
    state = jaxbn.bn_apply(PARAMS, STATE, X[:1], True, unbiased_running_var=True)[1]
    chex.assert_trees_all_equal(state, STATE)


@pairs("hidden, train, wrap", named(np.nan, np.inf, -np.inf, 3e38, -3e38), named(True, False), WRAPS)
def test_masked_values_affect_nothing_else(wrap, hidden, train):
    """Neither other outputs, nor the state, nor any gradient of a loss over the values that count."""
    mask = np.random.default_rng(2).random((ROWS, FEATURES)) < 0.6
    options = {"activation": jax.nn.gelu, "residual": X}

    def run(x):
        def loss(params, x):
            y, state = jaxbn.bn_apply(params, STATE, x, train, mask=mask, **options)
            return jnp.sum(jnp.where(mask, jnp.sin(y), 0)), (jnp.where(mask, y, 0), state)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(PARAMS, x)

    dirty = wrap(run)(np.where(mask, X, np.float32(hidden)))
    clean = wrap(run)(np.where(mask, X, 0))
    chex.assert_tree_all_finite(dirty)
    chex.assert_trees_all_close(dirty, clean, rtol=1e-6, atol=1e-7)


def test_masked_finite_entries_are_normalized():
    """The mask selects the entries of the statistics, not those that are normalized, as in flax."""
    mask = np.arange(ROWS)[:, None] < 10
    y, _ = jaxbn.bn_apply(PARAMS, STATE, X, True, mask=mask)
    part = X[:10].astype(np.float64)
    exact = (X - part.mean(0)) / np.sqrt(part.var(0) + 1e-5) * np.asarray(PARAMS.scale, np.float64) + 0.25
    np.testing.assert_allclose(y, exact, atol=5e-6)


def test_a_feature_without_values_keeps_its_statistics():
    mask = np.array([[True, False, True]])
    y, state = jaxbn.bn_apply(PARAMS, STATE, X, True, mask=mask)
    np.testing.assert_array_equal(state.mean[1], STATE.mean[1])
    np.testing.assert_array_equal(y[:, 1], np.full(ROWS, 0.25, np.float32))
    assert float(abs(state.mean[0] - STATE.mean[0])) > 1e-3


@pytest.mark.parametrize("update", [True, False])
def test_update_decides(update):
    """A Python bool and a traced one, in one compiled program for both values."""
    wanted = jaxbn.bn_apply(PARAMS, STATE, X, True)[1] if update else STATE
    chex.assert_trees_all_close(jaxbn.bn_apply(PARAMS, STATE, X, True, update=update)[1], wanted, rtol=1e-6)
    chex.clear_trace_counter()  # which does not tell cases of a test apart
    f = jax.jit(chex.assert_max_traces(lambda u: jaxbn.bn_apply(PARAMS, STATE, X, True, update=u), n=1))
    f(jnp.array(not update))
    y, state = f(jnp.array(update))
    chex.assert_trees_all_close(state, wanted, rtol=1e-6)
    np.testing.assert_allclose(y, jaxbn.bn_apply(PARAMS, STATE, X, True)[0], atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_state_is_a_scan_carry(dtype):
    params, state = jaxbn.bn_init(FEATURES, dtype=dtype)
    assert state.mean.dtype == state.var.dtype == jnp.float32
    batches = jnp.asarray(X, dtype).reshape(4, 4, FEATURES)
    last, ys = jax.lax.scan(lambda s, x: jaxbn.bn_apply(params, s, x, True)[::-1], state, batches)
    chex.assert_trees_all_equal_shapes_and_dtypes(last, state)
    assert ys.dtype == dtype
    assert last.count == 4
    step = state
    for x in batches:
        step = jaxbn.bn_apply(params, step, x, True)[1]
    chex.assert_trees_all_close(last, step, rtol=1e-6)


def test_a_state_of_lower_precision_keeps_its_dtype():
    """Mixed in float32 and rounded once: 0.999 is 1 in bfloat16."""
    state = jaxbn.BatchNormState(jnp.zeros(FEATURES, jnp.bfloat16), jnp.ones(FEATURES, jnp.bfloat16), FRESH.count)
    new = jaxbn.bn_apply(PARAMS, state, X + 100, True, momentum=0.999)[1]
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    assert (new.mean > 0.05).all()


def test_compiles_once():
    """One program serves both values of a traced flag."""
    traced = chex.assert_max_traces(lambda s, x, t: jaxbn.bn_apply(PARAMS, s, x, t, momentum=0.9), n=1)
    f = jax.jit(traced)
    state = f(FRESH, X, jnp.array(True))[1]
    state = f(state, X, jnp.array(True))[1]
    f(state, X, jnp.array(False))


@pytest.mark.parametrize("train", [True, False])
def test_a_second_eager_call_compiles_nothing(train, caplog):
    """Neither with a new activation of the same code, nor of the gradient."""

    def call():
        def loss(x):
            return jnp.sum(jaxbn.bn_apply(PARAMS, STATE, x, train, activation=lambda y: jnp.tanh(y) * 2)[0])

        return loss(X), jax.grad(loss)(X)

    call()
    with jax.log_compiles():
        call()
    assert not [record for record in caplog.records if "Compiling" in record.message]


def test_an_activation_that_changes_is_seen():
    """The values that a function closes over may differ from call to call, also eagerly."""

    class Scaled:
        by = jnp.float32(1.0)

        def __call__(self, y):
            return y * self.by

    scaled = Scaled()
    one = jaxbn.bn_apply(PARAMS, STATE, X, True, activation=scaled)[0]
    scaled.by = jnp.float32(2.0)
    np.testing.assert_allclose(jaxbn.bn_apply(PARAMS, STATE, X, True, activation=scaled)[0], 2 * one, rtol=1e-6)


@pytest.mark.slow
def test_no_tracer_leaks():
    with jax.checking_leaks():
        jax.jit(grads)(X)
        jax.jit(lambda x, a: jaxbn.bn_apply(PARAMS, STATE, x, True, activation=lambda y: a * y))(X, 2.0)


@pytest.mark.parametrize("train", [True, False])
def test_rematerialization_updates_once(train):
    def loss(x, wrap):
        y, state = wrap(lambda x: jaxbn.bn_apply(PARAMS, STATE, x, train))(x)
        return jnp.sum(jnp.sin(y)), state

    plain = jax.grad(loss, has_aux=True)(X, lambda f: f)
    again = jax.grad(loss, has_aux=True)(X, jax.checkpoint)
    chex.assert_trees_all_close(again, plain, rtol=1e-5, atol=1e-6)
    assert again[1].count == STATE.count + int(train)


def test_a_layer_applied_twice_updates_twice():
    state = jaxbn.bn_apply(PARAMS, jaxbn.bn_apply(PARAMS, STATE, X, True)[1], X, True)[1]
    assert state.count == STATE.count + 2


def test_the_new_state_has_no_gradient():
    d = jax.grad(lambda x: sum(jnp.sum(v) for v in jaxbn.bn_apply(PARAMS, STATE, x, True)[1][:2]))(X)
    np.testing.assert_array_equal(d, np.zeros_like(X))


def test_importing_jaxbn_imports_no_flax():
    import subprocess
    import sys

    code = "import jaxbn, sys; assert not {'flax', 'optax', 'chex'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
