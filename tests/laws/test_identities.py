"""Exact laws of one layer, in float64 for any data, scale and epsilon, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from law_cases import (
    EPSILONS,
    LAWS,
    NONE,
    RATIOS,
    SEEDS,
    SHAPES,
    STDS,
    VANISHING,
    all_near,
    compiled,
    example,
    fresh,
    near,
    passes,
)

import jaxbn

pytestmark = pytest.mark.usefixtures("float64")


@LAWS
@given(SEEDS, SHAPES, EPSILONS, STDS, RATIOS)
def test_sums_of_output_and_gradient(seed, shape, epsilon, std, ratio):
    """Let m be the rows and r = var / (var + epsilon), which is 1 without epsilon:

    sum x_hat = 0, |x_hat|^2 = m r, sum dx = 0, dx . x_hat = scale / s dg (1 - r), and
    |dx|^2 = (scale / s)^2 (|dy|^2 - db^2 / m - (2 - r) dg^2 / m).
    """
    x, dy, scale, bias = example(seed, shape, std, ratio)
    y, (dx, dg, db), state = passes(x, dy, scale, bias, epsilon)
    m, s, r, rest = len(x), np.sqrt(std**2 + epsilon), std**2 / (std**2 + epsilon), epsilon / (std**2 + epsilon)
    unit, gain, length = (y - bias) / scale, scale / s, np.linalg.norm(dy, axis=0)
    near(unit, (x - x.mean(0)) / s, np.sqrt(m))
    near(state.var, std**2, std**2)
    near(unit.sum(0), 0, m)
    near((unit**2).sum(0), m * r, m)
    near(db, dy.sum(0), m)
    near(dg, (dy * unit).sum(0), m)
    near(dx.sum(0), 0, m * abs(gain) * length)
    near((dx * unit).sum(0), gain * dg * rest, m * abs(gain) * length)
    near((dx**2).sum(0), gain**2 * (length**2 - (db**2 + (1 + rest) * dg**2) / m), m * (gain * length) ** 2)
    near(dx, gain * (dy - (db + unit * dg) / m), abs(gain) * length)


@compiled("epsilon")
def jacobian(x, epsilon):
    return jax.jacrev(lambda x: jaxbn.bn_apply(NONE, fresh(1), x[:, None], True, epsilon=epsilon)[0][:, 0])(x)


@LAWS
@given(SEEDS, st.sampled_from([2, 6]), EPSILONS, STDS)
def test_jacobian(seed, rows, epsilon, std):
    """I - 1 1^T / m - x_hat x_hat^T / m, over s: two directions go, of which epsilon gives the second a little back."""
    x = example(seed, (rows, 1), std)[0][:, 0]
    s, rest = np.sqrt(std**2 + epsilon), epsilon / (std**2 + epsilon)
    unit = x / s
    found = s * jacobian(x, epsilon)
    near(found, np.eye(rows) - 1 / rows - np.outer(unit, unit) / rows)
    near(np.linalg.eigvalsh(found), np.sort([0, rest, *[1] * (rows - 2)]))


@LAWS
@given(SEEDS, EPSILONS, STDS, RATIOS)
def test_one_row_and_two(seed, epsilon, std, ratio):
    """One gives the bias and no gradient. Two: plus and minus the same; without epsilon one, and no gradient either."""
    x, dy, scale, bias = example(seed, (2, 3), std, ratio)
    # So near to the running mean of 0 no second pass is made, and a vanishing epsilon is too small: docs/core.md.
    one = np.where((epsilon == VANISHING) & (np.abs(x[:1]) < 1e-8), 1.0, x[:1])
    y, (dx, dg, _), _ = passes(one, dy[:1], scale, bias, epsilon)
    np.testing.assert_array_equal(y, bias[None])
    np.testing.assert_array_equal(dx, np.zeros((1, 3)))
    np.testing.assert_array_equal(dg, np.zeros(3))
    y, (dx, _, _), _ = passes(x, dy, scale, bias, epsilon)
    s, rest = np.sqrt(std**2 + epsilon), epsilon / (std**2 + epsilon)
    sign = np.sign(x - x.mean(0))
    near(y, scale * sign * std / s + bias, 10)
    near(dx, scale / s * rest * sign * (dy * sign).mean(0), abs(scale / s) * 10)


@LAWS
@given(SEEDS, EPSILONS, st.permutations(range(8)), STDS, RATIOS)
def test_rows_are_exchangeable(seed, epsilon, order, std, ratio):
    """Output and gradient go along; parameters' gradients and statistics do not change."""
    x, dy, scale, bias = example(seed, (8, 3), std, ratio)
    y, (dx, *rest), state = passes(x, dy, scale, bias, epsilon)
    other, (other_dx, *other_rest), other_state = passes(x[order], dy[order], scale, bias, epsilon)
    near(other, y[order], 10)
    near(other_dx, dx[order], 10 * np.abs(dx).max(0) + 1 / std)
    all_near(other_rest, rest, 100)
    near(other_state.mean, state.mean, std)
    near(other_state.var, state.var, std**2)


@LAWS
@given(SEEDS, EPSILONS, STDS, RATIOS)
def test_undone_and_done_twice(seed, epsilon, std, ratio):
    """A scale of s and a bias of the mean undo it, in value. Done twice, it is once more by sqrt(r + epsilon)."""
    x, dy, _, _ = example(seed, (8, 3), std, ratio)
    s, r = np.sqrt(std**2 + epsilon), std**2 / (std**2 + epsilon)
    near(passes(x, dy, np.full(3, s), x.mean(0), epsilon)[0], x, s)
    one, zero = np.ones(3), np.zeros(3)
    once, _, _ = passes(x, dy, one, zero, epsilon)
    twice, (outer, _, _), _ = passes(once, dy, one, zero, epsilon)
    near(twice, once / np.sqrt(r + epsilon), 10)
    if epsilon == VANISHING:  # the second passes on the gradient that the first would
        _, (through, _, _), _ = passes(x, outer, one, zero, epsilon)
        near(through, passes(x, dy, one, zero, epsilon)[1][0], 10 / s)


@compiled()
def evaluated(params, state, x, dy):
    """`(y, dx)`."""
    y, pull = jax.vjp(lambda x: jaxbn.bn_apply(params, state, x, False)[0], x)
    return y, pull(dy)[0]


@LAWS
@given(SEEDS, STDS, RATIOS)
def test_evaluation_is_affine_and_folds(seed, std, ratio):
    """Each row by itself: its gradient is that of a gain. The layer before or after takes it in, bias and all."""
    x, dy, scale, bias = example(seed, (8, 3), std, ratio)
    rng = np.random.default_rng(seed)
    mean, var = rng.normal(ratio * std, std, 3), rng.uniform(0.5, 2, 3) * std**2
    params, state = jaxbn.bn_init(3, dtype=jnp.float64, scale=scale, bias=bias, mean=mean, var=var)
    gain = scale / np.sqrt(var + 1e-5)
    y, dx = evaluated(params, state, x, dy)
    near(y, (x - mean) * gain + bias, 100)
    near(dx, dy * gain, 10 * abs(gain))
    before, after, own = rng.normal(size=(3, 3)), rng.normal(size=(3, 4)), rng.normal(size=4)
    kernel, shift = jaxbn.inference.fold(params, state, before, mean)
    near(x @ np.asarray(kernel) + np.asarray(shift), evaluated(params, state, x @ before + mean, dy)[0], 1000)
    kernel, shift = jaxbn.inference.fold_into_next(params, state, after, own)
    near(x @ np.asarray(kernel) + np.asarray(shift), y @ after + own, 1000)
