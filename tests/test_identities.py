"""What batch normalization is known to satisfy exactly, in float64, for a batch of eight rows and three features."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jaxbn
from jaxbn import BatchNormParams

ROWS, FEATURES, EPSILON = 8, 3, 0.1  # an epsilon that is seen
RNG = np.random.default_rng(0)
X, DY = RNG.normal(1, 2, (2, ROWS, FEATURES))
SCALE, BIAS = RNG.normal(1, 0.5, (2, FEATURES))
TIGHT = {"rtol": 1e-11, "atol": 1e-11}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def bn(x, scale=SCALE, bias=BIAS, epsilon=EPSILON, train=True, state=None):
    """The layer's output in training, or in evaluation by `state`."""
    params, fresh = jaxbn.bn_init(x.shape[-1], dtype=jnp.float64, scale=scale, bias=bias)
    return jaxbn.bn_apply(params, state or fresh, jnp.asarray(x), train, epsilon=epsilon)[0]


def pulled(x, dy, epsilon=EPSILON):
    """`(dx, dscale, dbias)`."""
    return jax.vjp(lambda x, s, b: bn(x, s, b, epsilon), x, SCALE, BIAS)[1](jnp.asarray(dy))


def unit_and_std(x, epsilon=EPSILON):
    """x^ and sqrt(var + epsilon), by NumPy."""
    std = np.sqrt(x.var(0) + epsilon)
    return (x - x.mean(0)) / std, std


def test_gradient_is_the_closed_form():
    """dx = scale / (m s) (m dy - db - x^ dg), and what follows from it."""
    (dx, dg, db), (unit, std) = pulled(X, DY), unit_and_std(X)
    np.testing.assert_allclose(dx, SCALE / (ROWS * std) * (ROWS * DY - db - unit * np.asarray(dg)), **TIGHT)
    for got, want in zip((dx, dg, db), oracle.gradients(X, DY, SCALE, epsilon=EPSILON), strict=True):
        np.testing.assert_allclose(got, want, **TIGHT)
    np.testing.assert_allclose(dx.sum(0), 0, atol=1e-12)
    np.testing.assert_allclose((dx * unit).sum(0), SCALE / std * dg * EPSILON / std**2, **TIGHT)


def test_gradient_norm_without_epsilon():
    """|dx|^2 = (scale / s)^2 (|dy|^2 - db^2 / m - dg^2 / m): the layer removes two directions of dy."""
    dx, dg, db = pulled(X, DY, epsilon=1e-300)
    std = X.std(0)
    want = (SCALE / std) ** 2 * ((DY**2).sum(0) - (np.asarray(db) ** 2 + np.asarray(dg) ** 2) / ROWS)
    np.testing.assert_allclose((dx**2).sum(0), want, **TIGHT)


def test_unit_output_has_known_moments():
    unit = bn(X, None, None)
    np.testing.assert_allclose(unit.sum(0), 0, atol=1e-12)
    np.testing.assert_allclose((unit**2).sum(0), ROWS * X.var(0) / (X.var(0) + EPSILON), **TIGHT)


def test_weight_gradient_is_nearly_orthogonal_to_the_weight():
    """w . dL/dw = scale dg epsilon / (var + epsilon) for each output of a linear layer before."""
    weight, inputs = RNG.normal(size=(4, FEATURES)), RNG.normal(size=(ROWS, 4))
    grad = jax.grad(lambda w: jnp.sum(DY * bn(inputs @ w)))(jnp.asarray(weight))
    h = inputs @ weight
    _, dg, _ = pulled(h, DY)
    np.testing.assert_allclose((weight * grad).sum(0), SCALE * dg * EPSILON / (h.var(0) + EPSILON), **TIGHT)


def test_jacobian_is_symmetric_with_known_eigenvalues():
    """Scale / s (m - 2 times), 0, and (scale / s) epsilon / (var + epsilon)."""
    jacobian = jax.jacrev(lambda x: bn(x))(jnp.asarray(X))
    for c in range(FEATURES):
        block = np.asarray(jacobian[:, c, :, c])
        np.testing.assert_allclose(block, block.T, **TIGHT)
        std = np.sqrt(X[:, c].var() + EPSILON)
        expected = SCALE[c] / std * np.array([1.0] * (ROWS - 2) + [0.0, EPSILON / std**2])
        np.testing.assert_allclose(np.linalg.eigvalsh(block), np.sort(expected), **TIGHT)
        assert not np.any(jacobian[:, c, :, np.arange(FEATURES) != c]), "features do not mix"


@pytest.mark.parametrize("factor", [1e-3, 3.0, 1e4])
def test_scale_and_shift_invariance(factor):
    y = bn(X)
    np.testing.assert_allclose(bn(factor * X, epsilon=factor**2 * EPSILON), y, **TIGHT)
    np.testing.assert_allclose(bn(-X), bn(X, scale=-SCALE), **TIGHT)
    np.testing.assert_allclose(bn(X + factor), y, rtol=1e-9, atol=1e-9)
    dx = pulled(factor * X, DY, factor**2 * EPSILON)[0]
    np.testing.assert_allclose(factor * dx, pulled(X, DY)[0], **TIGHT)


def test_a_bias_before_the_layer_has_no_gradient():
    grad = jax.grad(lambda b: jnp.sum(DY * bn(X + b[None])))(jnp.zeros(FEATURES))
    np.testing.assert_allclose(grad, 0, atol=1e-12)


def test_one_row_and_two():
    """One row: the bias. Two rows, no epsilon: plus and minus one, whatever they are; no gradient."""
    np.testing.assert_allclose(bn(X[:1]), BIAS[None], **TIGHT)
    np.testing.assert_allclose(pulled(X[:1], DY[:1])[0], 0, atol=1e-12)
    np.testing.assert_allclose(np.abs(bn(X[:2], None, None, 1e-300)), 1, **TIGHT)
    np.testing.assert_allclose(pulled(X[:2], DY[:2], 1e-300)[0], 0, atol=1e-12)


def test_rows_are_exchangeable_and_in_evaluation_independent():
    order = RNG.permutation(ROWS)
    np.testing.assert_allclose(bn(X[order]), bn(X)[order], **TIGHT)
    companions = X.copy()
    companions[1:] = 1e6
    np.testing.assert_array_equal(bn(X, train=False)[0], bn(companions, train=False)[0])
    assert np.abs(bn(X)[0] - bn(companions)[0]).max() > 0.1, "in training they are not"


def test_evaluation_folds_into_the_layer_before():
    params, state = jaxbn.bn_init(
        FEATURES, dtype=jnp.float64, mean=RNG.normal(size=FEATURES), var=np.full(FEATURES, 2.0)
    )
    weight, inputs, before = RNG.normal(size=(4, FEATURES)), RNG.normal(size=(ROWS, 4)), RNG.normal(size=FEATURES)
    gain = SCALE / np.sqrt(np.asarray(state.var) + EPSILON)
    folded = inputs @ (weight * gain) + ((before - np.asarray(state.mean)) * gain + BIAS)
    np.testing.assert_allclose(bn(inputs @ weight + before, train=False, state=state), folded, **TIGHT)


def test_identity_and_idempotence():
    undone = bn(X, np.sqrt(X.var(0) + EPSILON), X.mean(0))
    np.testing.assert_allclose(undone, X, **TIGHT)
    once = bn(X, None, None, 1e-300)
    np.testing.assert_allclose(bn(once, None, None, 1e-300), once, **TIGHT)


@pytest.mark.parametrize("cut", [1, 3, 7])
def test_two_parts_merge_as_chan_has_it(cut):
    """mean = mean1 + d n2 / n and M2 = M2a + M2b + d^2 n1 n2 / n, and so does `pool`, as the whole has it."""
    a, b = X[:cut], X[cut:]
    d = b.mean(0) - a.mean(0)
    mean = a.mean(0) + d * len(b) / ROWS
    var = (a.var(0) * len(a) + b.var(0) * len(b) + d**2 * len(a) * len(b) / ROWS) / ROWS
    pooled = jaxbn.pool(jax.tree.map(lambda *v: jnp.stack(v), jaxbn.moments(a), jaxbn.moments(b)))
    for m in (pooled, jaxbn.moments(X)):
        np.testing.assert_allclose(m.mean, mean, **TIGHT)
        np.testing.assert_allclose(m.var, var, **TIGHT)


def test_batch_variance_is_biased_by_its_size():
    """E[var of m draws] = (m - 1) / m sigma^2, exactly: over all draws of three from five values."""
    values = RNG.normal(size=5)
    draws = np.array(list(itertools.product(values, repeat=3))).T  # one feature a draw
    got = jaxbn.moments(draws).var
    np.testing.assert_allclose(got.mean(), 2 / 3 * values.var(), **TIGHT)
    state = jaxbn.bn_init(draws.shape[1], dtype=jnp.float64)[1]
    _, state = jaxbn.bn_apply(
        BatchNormParams(None, None), state, jnp.asarray(draws), True, momentum=0.0, unbiased_running_var=True
    )
    np.testing.assert_allclose(state.var.mean(), values.var(), **TIGHT)
