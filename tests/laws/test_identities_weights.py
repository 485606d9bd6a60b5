"""Exact laws of a linear layer before the normalization: the scale of its weights, their gradient, its bias."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from law_cases import EPSILONS, LAWS, SEEDS, VANISHING, all_near, compiled, example, fresh, near

import jaxbn
from jaxbn import BatchNormParams

pytestmark = pytest.mark.usefixtures("float64")


@compiled("epsilon")
def dense_passes(u, weight, before, scale, bias, dy, epsilon):
    """Return the output of the layer after a dense one, and the gradient with respect to the first five."""

    def network(u, weight, before, scale, bias):
        h = u @ weight + before[None]
        return jaxbn.bn_apply(BatchNormParams(scale, bias), fresh(3), h, True, epsilon=epsilon)[0]

    y, pull = jax.vjp(network, u, weight, before, scale, bias)
    return y, pull(dy)


def dense_example(seed):
    """`(u, weight, before, scale, bias)` and `dy`: every output of the dense layer has variance 1."""
    rng = np.random.default_rng(seed)
    u, weight = rng.normal(size=(8, 4)), rng.normal(size=(4, 3))
    _, dy, scale, bias = example(seed, (8, 3))
    return (u, weight / (u @ weight).std(0), rng.normal(size=3), scale, bias), dy


@LAWS
@given(SEEDS, EPSILONS)
def test_weight_gradient_along_the_weight(seed, epsilon):
    """w . dL/dw = scale dg epsilon / (var + epsilon) for each output: orthogonal but for epsilon."""
    inputs, dy = dense_example(seed)
    weight, scale = inputs[1], inputs[3]
    _, (_, dw, _, dg, _) = dense_passes(*inputs, dy, epsilon)
    wanted = scale * dg * epsilon / (1 + epsilon)
    near((weight * dw).sum(0), wanted, 100 * np.linalg.norm(weight, axis=0))
    assert epsilon == VANISHING or np.all(abs(wanted) > 1e-9), "there is something to see"


@LAWS
@given(SEEDS, EPSILONS, st.sampled_from([1e-2, 3.0, -1.0, -40.0]))
def test_scale_of_the_weight(seed, epsilon, a):
    """Weights a W with a^2 epsilon do what W do, with gradient 1 / a; a negative `a` changes the sign of the scale."""
    (u, weight, before, scale, bias), dy = dense_example(seed)
    sign = np.sign(a)
    y, (du, dw, db, dg, dbias) = dense_passes(u, weight, before, sign * scale, bias, dy, epsilon)
    scaled = VANISHING if epsilon == VANISHING else a * a * epsilon
    other, grads = dense_passes(u, a * weight, a * before, scale, bias, dy, scaled)
    near(other, y, 10)
    all_near(grads, (du, dw / a, db / a, sign * dg, dbias), 100 * max(1, 1 / abs(a)))
    if epsilon != VANISHING and abs(a) != 1:  # with epsilon itself it is only nearly so, or not at all
        same = dense_passes(u, a * weight, a * before, scale, bias, dy, epsilon)[0]
        assert np.abs(same - y).max() > 0.01


@LAWS
@given(SEEDS, EPSILONS, st.floats(-100, 100))
def test_shift_before(seed, epsilon, shift):
    """A bias before the layer changes nothing, in value or any gradient, and has none."""
    (u, weight, before, scale, bias), dy = dense_example(seed)
    wanted = dense_passes(u, weight, before, scale, bias, dy, epsilon)
    got = dense_passes(u, weight, before + shift, scale, bias, dy, epsilon)
    all_near(got, wanted, 100)
    near(got[1][2], 0, 100)
