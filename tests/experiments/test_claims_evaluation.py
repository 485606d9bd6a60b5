"""Claim 10: many averages in one training, and statistics pooled at once and layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from experiments.claims.evaluation.measure import AVERAGES, _by_batches, averages, layerwise, precise
from experiments.training import layers
from experiments.training.layers import Pass
from experiments.training.models import gaussian, mlp

pytestmark = pytest.mark.usefixtures("ordinary_promotion")
WIDTHS, PIXELS, SIZE = (3, 3), 5, 4
IMAGES = np.random.default_rng(0).random((3, SIZE, PIXELS), np.float32)
MODEL = mlp([layers.batch_norm(activation=jnp.tanh)] * 2, WIDTHS, gaussian(1.0, he=True), PIXELS)


def test_each_average_is_that_of_its_momentum():
    both = averages(AVERAGES, jnp.tanh)
    params, states = both.init(PIXELS)
    alone = dict.fromkeys(AVERAGES, jaxbn.bn_init(PIXELS)[1])
    for x in jnp.asarray(IMAGES):
        y, states = both.apply(params, states, x, Pass(train=True))
        for name, momentum in AVERAGES.items():
            expected, alone[name] = jaxbn.bn_apply(params, alone[name], x, True, momentum=momentum, activation=jnp.tanh)
    # The same computation in the same order; eagerly and compiled, products and sums may be rounded together or apart.
    jax.tree.map(np.testing.assert_array_equal, states, alone)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-7)
    assert len({float(s.mean[0]) for s in states.values()}) == len(AVERAGES)


def hidden(x, params, norms):
    """Return the inputs of each layer, in float64, normalized by `norms`: `(x, layer) -> (mean, var)`."""
    entering = []
    for at in range(len(WIDTHS)):
        x = x @ np.asarray(params["kernels"][at], np.float64)
        entering.append(x)
        mean, var = norms(x, at)
        x = np.tanh((x - mean) / np.sqrt(var + 1e-5))
    return entering


def test_pooled_at_once_and_layer_by_layer():
    """Pooling at once takes each batch by its own moments; layer by layer, inputs come from layers in evaluation."""
    params, state = MODEL.init(jax.random.key(0))
    by_batch = [hidden(x.astype(np.float64), params, lambda v, _: (v.mean(0), v.var(0))) for x in IMAGES]
    everything = IMAGES.reshape(-1, PIXELS).astype(np.float64)
    in_order = hidden(everything, params, lambda v, _: (v.mean(0), v.var(0)))
    one, other = jax.jit(lambda *given: [f(MODEL, *given) for f in (precise, layerwise)])(params, state, IMAGES)
    for at in range(len(WIDTHS)):
        pooled = np.concatenate([found[at] for found in by_batch])
        for made, x in ((one[at], pooled), (other[at], in_order[at])):
            # Some tens of float32 roundings of values of about 1.
            np.testing.assert_allclose(made.mean, x.mean(0), atol=1e-5)
            np.testing.assert_allclose(made.var, x.var(0), rtol=1e-4)
    assert np.max(np.abs(one[1].var - other[1].var)) > 1e-3


def test_the_last_batch_is_filled_up():
    params, state = MODEL.init(jax.random.key(0))
    images = IMAGES.reshape(-1, PIXELS)[:6]
    found = _by_batches(MODEL, SIZE, params, state, images)
    parts = [images[:4], np.concatenate([images[4:], images[:2]])]
    expected = np.concatenate([MODEL.apply(params, state, part, True, None)[0] for part in parts])[:6]
    np.testing.assert_allclose(found, expected, atol=1e-5)  # compiled in another way
