"""`moments`, `normalize` and `update_state`: composed they are `bn_apply`, in values, gradients and state."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.test_util import check_grads
from params import param

import jaxbn

CASES = {
    "last axis": {},
    "channels first": {"axis": 1},
    "two axes": {"axis": (2, 1)},
    "masked": {"mask": True},
    "masked, channels first": {"axis": 1, "mask": True},
    "float16": {"dtype": jnp.float16},
    "bfloat16": {"dtype": jnp.bfloat16},
    "without scale and bias": {"scale": None, "bias": None},
}

SLOW = ("channels first", "masked", "float16")


def case(axis=-1, mask=False, dtype=jnp.float32, **affine):
    """Make input, cotangent, mask, parameters and state of a case; masked entries hold NaN."""
    rng = np.random.default_rng(0)
    x, dy = rng.normal(3, 2, (6, 4, 5)), rng.normal(size=(6, 4, 5))
    keep = rng.random((6, 4, 5)) < 0.7 if mask else None
    shape = oracle.feature_shape(x, axis)
    affine = {"scale": rng.normal(1, 0.3, shape), "bias": rng.normal(size=shape), **affine}
    params, state = jaxbn.bn_init(shape, mean=rng.normal(size=shape), var=1 + rng.random(shape), **affine)
    x = x if keep is None else np.where(keep, x, np.nan)
    return jnp.asarray(x, dtype), jnp.asarray(dy, dtype), keep, params, state


def compose(params, state, x, axis=-1, mask=None, **options):
    m = jaxbn.moments(x, axis=axis, mask=mask)
    return jaxbn.normalize(params, m, x, axis=axis, mask=mask), jaxbn.update_state(state, m, **options)


@pytest.mark.parametrize("name", [param(n, quick=n not in SLOW, id=n) for n in CASES])
def test_training_equals_bn_apply_and_float64(name):
    x, dy, mask, params, state = case(**CASES[name])
    axis = CASES[name].get("axis", -1)

    def run(layer, params, state, x):
        def f(params, x):
            return layer(params, state, x)

        y, pull, new = jax.vjp(f, params, x, has_aux=True)
        return y, *pull(dy), new

    @jax.jit
    def both(*args):
        return (
            run(lambda *args: compose(*args, axis, mask, momentum=0.9), *args),
            run(lambda *args: jaxbn.bn_apply(*args, True, axis=axis, mask=mask, momentum=0.9), *args),
        )

    composed, fused = both(params, state, x)
    assert jax.tree.map(jnp.result_type, composed) == jax.tree.map(jnp.result_type, fused)
    epsilon = float(jnp.finfo(x.dtype).eps)
    for one, other in zip(jax.tree.leaves(composed), jax.tree.leaves(fused), strict=True):
        np.testing.assert_allclose(np.float64(one), np.float64(other), rtol=4 * epsilon, atol=16 * epsilon)

    wide = np.where(True if mask is None else mask, np.float64(x), 0)
    exact = oracle.training(wide, params.scale, params.bias, axis=axis, mask=mask)
    dx, *affine = oracle.gradients(wide, np.where(True if mask is None else mask, dy, 0), params.scale, axis=axis)
    y, params_bar, x_bar, new = composed
    counted = np.ones(x.shape, bool) if mask is None else mask
    np.testing.assert_allclose(np.float64(y)[counted], exact.y[counted], rtol=4 * epsilon, atol=4 * epsilon)
    np.testing.assert_allclose(new.mean, 0.9 * np.float64(state.mean) + 0.1 * exact.mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(new.var, 0.9 * np.float64(state.var) + 0.1 * exact.var, rtol=1e-5)
    assert new.count == 1
    if mask is None:
        np.testing.assert_allclose(np.float64(x_bar), dx, rtol=4 * epsilon, atol=16 * epsilon)
        for one, other in zip(params_bar, affine, strict=True):
            if one is not None:
                np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_float64_equals_bn_apply():
    with jax.enable_x64(True):
        x, dy, mask, params, state = case(axis=1, mask=True, dtype=jnp.float64)

        def grads(layer):
            def loss(params, x):
                return jnp.sum(layer(params, state, x)[0] * dy)

            return jax.jit(jax.grad(loss, (0, 1)))(params, x)

        composed = grads(lambda *args: compose(*args, 1, mask))
        fused = grads(lambda *args: jaxbn.bn_apply(*args, True, axis=1, mask=mask))
        for one, other in zip(jax.tree.leaves(composed), jax.tree.leaves(fused), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [param(n, quick=n not in SLOW, id=n) for n in (*CASES, "complex")])
def test_running_statistics_give_evaluation(name):
    x, _, mask, params, state = case(**CASES.get(name, {}))
    if name == "complex":
        x, state = jax.lax.complex(x, x[::-1]), state._replace(mean=state.mean.astype(jnp.complex64))
    options = {"axis": CASES.get(name, {}).get("axis", -1), "mask": mask}
    y = jaxbn.normalize(params, state, x, **options)
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y, jaxbn.bn_apply(params, state, x, False, **options)[0])


def test_gradients_of_everything_by_finite_differences():
    with jax.enable_x64(True):
        x, dy, _, params, _ = case(dtype=jnp.float64)
        params = jax.tree.map(lambda v: v.astype(jnp.float64), params)
        m = jaxbn.moments(x)

        @jax.jit
        def f(params, m, x):
            return jnp.sum(dy * jaxbn.normalize(params, m, x))

        check_grads(f, (params, m, x), order=2, modes=("fwd", "rev"), atol=1e-6, rtol=1e-6)
        bar = jax.grad(f, 1)(params, m, x)
        assert all(np.all(v != 0) for v in (bar.mean, bar.var, bar.tail))


def test_mean_of_a_million_std():
    x = (np.random.default_rng(0).normal(size=(4096, 2)) + 1e6).astype(np.float32)
    y, _ = compose(*jaxbn.bn_init(2), x)
    np.testing.assert_allclose(y, oracle.training(x).y, rtol=0, atol=2e-6)


def test_scale_and_bias_by_example():
    x, _, _, _, state = case()
    rng = np.random.default_rng(1)
    params = jaxbn.BatchNormParams(*(jnp.asarray(rng.normal(size=(6, 5)), jnp.float32) for _ in range(2)))
    expected, _ = jaxbn.bn_apply(params, state, x, True)
    np.testing.assert_allclose(compose(params, state, x)[0], expected, rtol=1e-5, atol=1e-6)


def test_ghost_batches_by_composition():
    x, _, _, params, state = case()

    @jax.jit
    def composed(parts):
        m = jax.vmap(jaxbn.moments)(parts)
        y = jax.vmap(lambda m, x: jaxbn.normalize(params, m, x))(m, parts).reshape(x.shape)
        return y, jaxbn.update_state(state, jaxbn.pool(m), unbiased_running_var=True)

    y, new = composed(x.reshape(3, 2, 4, 5))
    expected = jaxbn.bn_apply(params, state, x, True, ghost_batches=3, unbiased_running_var=True)
    for one, other in zip(jax.tree.leaves((y, new)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_cross_replica_statistics_by_composition():
    x, dy, _, params, state = case()

    def layer(x, dy):
        def f(params, x):
            m = jaxbn.pool_named(jaxbn.moments(x), "batch")
            return jaxbn.normalize(params, m, x), jaxbn.update_state(state, m)

        y, pull, new = jax.vjp(f, params, x, has_aux=True)
        return y, pull(dy)[1], new

    y, x_bar, new = jax.jit(jax.vmap(layer, axis_name="batch"))(x.reshape(2, 3, 4, 5), dy.reshape(2, 3, 4, 5))
    exact = oracle.training(x, params.scale, params.bias)
    np.testing.assert_allclose(y.reshape(x.shape), exact.y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(x_bar.reshape(x.shape), oracle.gradients(x, dy, params.scale)[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(new.var[0], new.var[1])
    np.testing.assert_allclose(new.mean[0], 0.99 * np.float64(state.mean) + 0.01 * exact.mean, rtol=1e-5, atol=1e-5)


def test_a_feature_without_values_gives_the_bias_and_keeps_its_statistics():
    x, _, _, params, state = case()
    mask = np.arange(5) > 0
    y, new = compose(params, state, x, mask=mask.reshape(1, 1, 5))
    np.testing.assert_array_equal(y[..., 0], jnp.full((6, 4), params.bias[0]))
    assert new.mean[0] == state.mean[0]
    assert np.all(np.asarray(new.mean != state.mean) == mask)
    assert new.count == 1


def test_moments_that_are_not_finite_do_not_enter_the_state():
    _, state = jaxbn.bn_init(2)
    m = jaxbn.moments(jnp.array([[1.0, jnp.nan], [3.0, 1.0]]))
    new = jaxbn.update_state(state, m, momentum=jaxbn.cumulative_average)
    np.testing.assert_array_equal(new.mean, [2, 0])
    nothing = jaxbn.update_state(state, m._replace(mean=jnp.full(2, jnp.inf)))
    assert nothing.count == 0


def test_the_update_has_no_gradient():
    _, state = jaxbn.bn_init(2)
    grad = jax.grad(lambda x: jaxbn.update_state(state, jaxbn.moments(x)).mean.sum())(jnp.ones((3, 2)))
    np.testing.assert_array_equal(grad, 0)


PARAMS, STATE = jaxbn.bn_init(2)
X = jnp.array([[1.0, 2.0], [3.0, 5.0]])
Z = X.astype(jnp.complex64)
M = jaxbn.Moments(jnp.full(2, 2.0), jnp.ones(2), jnp.ones(2))
NONE: Any = None
TYPES: Any = jax.eval_shape(lambda: PARAMS)
REFUSED = [
    (lambda: jaxbn.normalize(PARAMS, M, jnp.arange(4).reshape(2, 2)), TypeError, "`x` must be floating point"),
    (lambda: jaxbn.normalize(PARAMS, (0.0, 1.0), X), TypeError, "`m` must be `jaxbn.Moments`, or a state"),
    (lambda: jaxbn.normalize(PARAMS, {"mean": 0}, X), TypeError, r"BatchNormState\(\*\*m\)"),
    (lambda: jaxbn.normalize(PARAMS, jaxbn.Moments(*jnp.ones((4, 3))), X), ValueError, r"`m` must have shape \(2,\)"),
    (lambda: jaxbn.normalize(PARAMS, jaxbn.bn_init(3)[1], X), ValueError, r"`m.mean` must have shape \(2,\)"),
    (lambda: jaxbn.normalize(jaxbn.bn_init(3)[0], M, X), ValueError, r"`params.scale` must have shape \(2,\)"),
    (lambda: jaxbn.normalize(PARAMS, M, X, axis=2), ValueError, "`axis` must lie in"),
    (lambda: jaxbn.normalize(PARAMS, M, X, epsilon=0.0), ValueError, "`epsilon` must be positive"),
    (lambda: jaxbn.normalize(PARAMS, M, X, mask=jnp.ones(3, bool)), ValueError, "`mask` must broadcast"),
    (lambda: jaxbn.normalize(PARAMS, M, Z), TypeError, "`m` must be a state for complex `x`"),
    (lambda: jaxbn.moments(Z), TypeError, "`x` must be floating point"),
    (lambda: jaxbn.update_state(STATE, STATE), TypeError, "`m` must be `jaxbn.Moments`"),
    (lambda: jaxbn.update_state(M[:2], M), TypeError, "`state` must be the state"),
    (lambda: jaxbn.update_state(jaxbn.bn_init(3)[1], M), ValueError, r"shape of the state, \(3,\)"),
    (lambda: jaxbn.update_state(STATE, M, momentum=1.5), ValueError, r"must lie in \[0, 1\]"),
    (lambda: jaxbn.update_state(STATE, M, momentum=None), TypeError, "`momentum` must be a number"),
    (lambda: jaxbn.update_state(STATE, M, unbiased_running_var=1), TypeError, "must be True or False"),
    # Each of these once ended in an error of JAX or Python, or in numbers that mean nothing.
    (lambda: jaxbn.pool(STATE), TypeError, "`m` must be `jaxbn.Moments`"),  # its mean would be taken for a count
    (lambda: jaxbn.pool_named(None, ()), TypeError, "`m` must be `jaxbn.Moments`"),
    (lambda: jaxbn.pool(M._replace(mean=Z[0])), TypeError, "`mean` must be floating point"),
    (lambda: jaxbn.normalize(PARAMS, M._replace(var=Z[0]), X), TypeError, "`m.var` must be real"),
    (lambda: jaxbn.normalize(PARAMS, M._replace(count=NONE), X), TypeError, "`m.count` must be a number"),
    (lambda: jaxbn.normalize(PARAMS, M, X, epsilon=NONE), TypeError, "`epsilon` must be a Python float"),
    (lambda: jaxbn.normalize(PARAMS, STATE._replace(mean=jnp.arange(2)), X), TypeError, "`m.mean` must be floating"),
    (lambda: jaxbn.normalize(TYPES, M, X), TypeError, "`params.scale` must be an array"),
    (lambda: jaxbn.bn_apply(PARAMS._replace(scale=jnp.arange(2)), STATE, X, True), TypeError, "must be floating point"),
    (lambda: jaxbn.update_state(STATE._replace(mean=NONE), M), TypeError, "`state.mean` must be an array"),
    (lambda: jaxbn.update_state(STATE._replace(mean=Z[0]), M), TypeError, "`state.mean` must be real"),
    (lambda: jaxbn.update_state(STATE._replace(var=jnp.ones(3)), M), ValueError, "of one shape"),
    (lambda: jaxbn.update_state(STATE._replace(count=jnp.arange(2)), M), ValueError, "scalar count"),
    (lambda: jaxbn.update_state(STATE, M, momentum=jnp.asarray(0.5j)), TypeError, "`momentum` must be a number"),
    (lambda: jaxbn.update_state(STATE, M, momentum=jnp.asarray(True)), TypeError, "`momentum` must be a number"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
