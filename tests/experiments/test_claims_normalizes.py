"""Correlations and deviations from a normalized unit, against NumPy and closed forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims._lib import study
from experiments.claims.normalizes.measure import EPSILON, _through, correlations, deviations, pairs
from experiments.training import layers, networks
from experiments.training.data import Split
from experiments.training.models import mlp

RNG = np.random.default_rng(0)


def test_correlations():
    """NumPy's, for each network of a stack; a unit that does not vary has none."""
    x = RNG.normal(size=(2, 50, 4)) @ RNG.normal(size=(4, 4))
    x[1, :, 2] = 3.0
    found = correlations(x)
    np.testing.assert_allclose(found[0], np.corrcoef(x[0].T), atol=1e-12)
    others = [0, 1, 3]
    np.testing.assert_allclose(found[1][np.ix_(others, others)], np.corrcoef(x[1][:, others].T), atol=1e-12)
    assert not found[1][2].any()


def test_pairs_are_of_different_units_and_of_one_group():
    """Two groups of two equal units: 1 within a group; over all pairs 1 in 2 of 6 pairs, and 0.5 in the others."""
    a = np.tile([1.0, 1.0, -1.0, -1.0], 3)
    b = np.tile([1.0, 1.0, 1.0, -1.0], 3) - 0.5
    rho = abs(np.corrcoef(a, b)[0, 1])
    x = np.stack([a, a, b, -b], -1)[None]
    np.testing.assert_allclose(pairs(x, 2), 1.0, atol=1e-12)
    np.testing.assert_allclose(pairs(x), (2 + 4 * rho) / 6, atol=1e-12)


def test_deviations():
    """0 for what is normalized with the same epsilon; else by how much mean and variance are off, of the worst unit."""
    x = RNG.normal(size=(1, 60, 3))
    normal = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + EPSILON)
    assert deviations(x, normal).max() < 1e-12
    off = normal.copy()
    off[..., 1] = 2 * off[..., 1] + 0.25
    mean, var = deviations(x, off)
    v = x[0, :, 1].var()
    np.testing.assert_allclose(mean, 0.25, atol=1e-12)
    np.testing.assert_allclose(var, 3 * v / (v + EPSILON), atol=1e-12)


def test_the_share_of_a_gradient_through_the_statistics():
    """Compare with the formula of the gradient with constant statistics: of a linear layer `x.T @ dy / std`."""
    s = dataclasses.replace(study.BASE, widths=(4,), activation="sigmoid")
    model = mlp([layers.batch_norm(activation=jax.nn.sigmoid)], (4,), networks.weights(s), 5)
    params, state = jax.tree.map(lambda v: v[None], model.init(jax.random.key(0)))
    x, labels = np.float32(RNG.normal(size=(20, 5))), np.int32(RNG.integers(0, 10, 20))
    found = _through(s, model, params, state, Split(jnp.asarray(x), jnp.asarray(labels)))
    kernels, last = (np.float64(k[0]) for k in params["kernels"])
    entering = x @ kernels
    std = np.sqrt(entering.var(0) + EPSILON)
    normal = (entering - entering.mean(0)) / std
    hidden = 1 / (1 + np.exp(-normal))
    scores = np.exp(hidden @ last)
    upstream = ((scores / scores.sum(1, keepdims=True) - np.eye(10)[labels]) / 20 @ last.T) * hidden * (1 - hidden)
    without = x.T @ (upstream / std)
    whole = x.T @ ((upstream - upstream.mean(0) - normal * (upstream * normal).mean(0)) / std)
    np.testing.assert_allclose(found, [np.linalg.norm(whole - without) / np.linalg.norm(without)], rtol=1e-3)
