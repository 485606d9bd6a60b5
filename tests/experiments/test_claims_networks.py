"""Compare the claims' own layers with their formulas, networks with plain ones, closed forms with tables."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from experiments.claims._lib import networks
from experiments.claims._lib.study import BASE
from experiments.claims._lib.trained import Log, Trained
from experiments.claims.covariate_shift import measure as covariate_shift
from experiments.claims.depth import judge as depth
from experiments.claims.initialization import judge as initialization
from experiments.training import layers
from experiments.training.data import Data, Split
from experiments.training.layers import Layer, Pass
from experiments.training.models import Model, gaussian, mlp
from experiments.training.train import Carry, loss_of

pytestmark = pytest.mark.usefixtures("ordinary_promotion")

rng = np.random.default_rng(0)
X = jnp.asarray(rng.standard_normal((12, 8)) * 2 + 1, jnp.float32)
TRAIN, EVALUATE = Pass(train=True, key=jax.random.key(0)), Pass(train=False)
NOTHING = Layer(lambda features: (None, None), lambda params, state, x, run: (x, state))
ROUNDING = {"rtol": 0, "atol": 2e-6}  # outputs below 10 after a few float32 operations
kernel = gaussian(0.4, he=False)


def run(layer, x=X, how=TRAIN):
    return layer.apply(*layer.init(x.shape[-1]), x, how)[0]


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_group_norm_is_flax_s(groups):
    images = jnp.asarray(rng.standard_normal((3, 5, 5, 8)), jnp.float32)
    for x in (X, images):
        theirs = nn.GroupNorm(num_groups=groups, epsilon=1e-5)
        wanted = jnp.tanh(theirs.apply(theirs.init(jax.random.key(0), x), x))
        # A group of one feature and one position is 0: flax's variance by squares leaves rounding there.
        np.testing.assert_allclose(run(layers.group_norm(groups, jnp.tanh), x), wanted, rtol=0, atol=1e-5)


def test_noise_has_the_moments_of_the_paper():
    """Zeros get uniform shifts, large values the deviation too; evaluation has no noise."""
    layer = networks.noisy(NOTHING, lambda v: v)
    shift = np.asarray(run(layer, jnp.zeros((2000, 200))))
    assert np.max(np.abs(shift)) <= 0.6
    means = shift.mean(0)  # of each unit, uniform in [-0.5, 0.5]
    assert np.std(means) == pytest.approx(1 / np.sqrt(12), rel=0.15)
    assert np.std(shift - means) == pytest.approx(0.2 / np.sqrt(12), rel=0.02)
    factor = np.asarray(run(layer, jnp.full((2000, 200), 1e4))) / 1e4
    assert 0.99 < factor.mean(0).min() < 1.02 < 1.22 < factor.mean(0).max() < 1.26  # uniform in [1, 1.25]
    assert np.std(factor - factor.mean(0)) == pytest.approx(0.1, rel=0.02)
    assert np.array_equal(run(layer, X, EVALUATE), X)


def test_a_stack_is_an_mlp():
    layer = layers.batch_norm(activation=jnp.tanh)
    stack = networks.stack(layer, 3, 5, kernel, 8)
    params, state = stack.init(jax.random.key(1))
    y, new = stack.apply(params, state, X, True, None)
    x, states = X, []
    for at, weight in enumerate([params["first"], *params["kernels"]]):
        own = jax.tree.map(lambda v, at=at: v[at], (params["shifts"], state))
        out, after = layer.apply(*own, x @ weight, TRAIN)
        x = out
        states.append(after)
    np.testing.assert_allclose(y, x @ params["head"] + params["last"], **ROUNDING)
    for at, wanted in enumerate(states):
        np.testing.assert_allclose(new.mean[at], wanted.mean, **ROUNDING)
    spread = np.std(params["kernels"], axis=(1, 2))
    assert np.all(np.abs(spread / 0.4 - 1) < 0.5)
    assert len(set(spread.tolist())) == 2  # drawn for each layer


def convolve(x, weight):
    square = weight.reshape(3, 3, x.shape[-1], -1)
    return lax.conv_general_dilated(x, square, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def test_pooled_cnn_by_hand():
    """Four layers against XLA's convolutions, the last at one position."""
    model = networks.pooled_cnn(layers.batch_norm(activation=jax.nn.relu), 4, 3, kernel, 64)
    params, state = model.init(jax.random.key(2))
    images = jnp.asarray(rng.random((6, 64)), jnp.float32)
    y, new = model.apply(params, state, images, True, None)
    x = images.reshape(6, 8, 8, 1)
    for weight in params["kernels"]:
        out = convolve(x, weight)
        x = jax.nn.relu((out - jnp.mean(out, (0, 1, 2))) / jnp.sqrt(jnp.var(out, (0, 1, 2)) + 1e-5))
        x = nn.avg_pool(x, (2, 2), (2, 2)) if x.shape[1] > 1 else x
    assert x.shape == (6, 1, 1, 3)
    np.testing.assert_allclose(y, x[:, 0, 0] @ params["head"] + params["last"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(new[-1].mean, 0.01 * jnp.mean(out, (0, 1, 2)), rtol=0, atol=1e-5)


def test_residual_cnn_by_hand():
    """Two blocks against XLA's convolutions; with SkipInit the blocks do nothing at first."""
    layer = layers.batch_norm(activation=jax.nn.relu)
    model = networks.residual_cnn(layer, 2, 4, kernel, 64)
    params, state = model.init(jax.random.key(2))
    images = jnp.asarray(rng.random((6, 64)), jnp.float32)
    y, new = model.apply(params, state, images, True, None)

    def normal(x):
        return jax.nn.relu((x - jnp.mean(x, (0, 1, 2))) / jnp.sqrt(jnp.var(x, (0, 1, 2)) + 1e-5))

    def through(x, blocks):
        x = convolve(x.reshape(6, 8, 8, 1), params["first"])
        x = nn.avg_pool(x, (2, 2), (2, 2))
        for kernels in params["kernels"][:blocks]:
            x = x + convolve(normal(convolve(normal(x), kernels[0])), kernels[1])
        return x

    np.testing.assert_allclose(
        y, jnp.mean(normal(through(images, 2)), (1, 2)) @ params["head"] + params["last"], rtol=0, atol=1e-4
    )
    last = through(images, 2)
    np.testing.assert_allclose(new["end"].mean, 0.01 * jnp.mean(last, (0, 1, 2)), rtol=0, atol=1e-5)
    skip = networks.residual_cnn(layers.plain(jax.nn.relu), 2, 4, kernel, 64, skip=True)
    own, state = skip.init(jax.random.key(2))
    y, _ = skip.apply(own, state, images, True, None)
    still = jnp.mean(jax.nn.relu(through(images, 0)), (1, 2)) @ params["head"]
    np.testing.assert_allclose(y, still, rtol=0, atol=1e-5)
    again, _ = skip.apply(own | {"branches": jnp.ones(2)}, state, images, True, None)
    assert jnp.max(jnp.abs(again - y)) > 0.1


@pytest.mark.slow
def test_alignment_by_hand():
    """Each layer's is taken with only the layers before it moved; it is 1 where nothing moves."""
    model = mlp([layers.plain(jnp.tanh)] * 2, (5, 4), kernel, 8, 3)
    params, state = model.init(jax.random.key(3))
    labels, rate = jnp.asarray(rng.integers(0, 3, 12), jnp.int32), 0.5

    def gradient(p):
        return jax.grad(lambda p: loss_of(model.apply(p, state, X, True, None)[0], labels))(p)

    before = gradient(params)
    moved = jax.tree.map(lambda p, g: p - rate * g, params, before)
    found = np.asarray(covariate_shift.alignment(model, rate, params, state, X, labels))
    assert found.shape == (3, 2)
    for layer in (1, 2):
        mixed = params | {
            kind: [moved[kind][at] if at < layer else old for at, old in enumerate(params[kind])]
            for kind in ("kernels", "shifts")
        }
        g, h = (np.asarray(v["kernels"][layer], np.float64).ravel() for v in (before, gradient(mixed)))
        wanted = g @ h / np.linalg.norm(g) / np.linalg.norm(h), np.linalg.norm(h - g) / np.linalg.norm(g)
        np.testing.assert_allclose(found[:2, layer - 1], wanted, rtol=1e-4)
        assert found[0, layer - 1] < 0.999
    still = np.asarray(covariate_shift.alignment(model, 0.0, params, state, X, labels))
    np.testing.assert_allclose(still, [[1, 1], [0, 0], [0, 0]], atol=1e-6)


def test_along_the_gradient_of_a_square():
    """Its Hessian H is constant: the gradient g changes by t H g, and the loss by t g g - t^2 g H g / 2."""
    x, y, weight = (rng.standard_normal(shape) for shape in ((7, 3), (7, 2), (3, 2)))
    model, rate = Model(lambda key: (None, None), lambda p, state, x, *_: (x @ p, state)), 0.05
    given = [jnp.asarray(v, jnp.float32) for v in (weight, x, y)]
    found = jax.jit(lambda w, x, y: covariate_shift.along(model, rate, w, None, x, y))(*given)
    hessian = 2 * x.T @ x / 7
    g = 2 * x.T @ (x @ weight - y) / 7
    slope = np.linalg.norm(hessian @ g) / np.linalg.norm(g)
    drops = [t * rate * np.sum(g * g) - (t * rate) ** 2 * np.sum(g * (hessian @ g)) / 2 for t in (0, 0.5, 1, 2, 4)]
    np.testing.assert_allclose(found, [np.ptp(drops), 4 * rate * slope, slope], rtol=1e-4)


def test_drift_of_quantiles():
    """The biases of a plain layer move by 1 between observations, and all three quantiles of each unit with them."""
    model = mlp([layers.plain(jax.nn.sigmoid)], (4,), kernel, 8, 3)
    params, state = jax.tree.map(lambda v: v[None, None], model.init(jax.random.key(0)))
    watch, read = covariate_shift.drifts(BASE, model, [Data(*[Split(X, jnp.zeros(12, jnp.int32))] * 3)])
    for step in range(3):
        shifts = [v + step for v in params["shifts"]]
        watch(step, Carry(params | {"shifts": shifts}, state, None))
    nothing = Log(*[np.zeros(1)] * 5)
    found = read(Trained(nothing, Carry(params, state, None), None))
    np.testing.assert_allclose(found["inputs"], [[3.0]], rtol=1e-5)
    low, high = np.quantile(np.asarray(X @ params["kernels"][0][0, 0], np.float64), (0.15, 0.85), axis=0)
    np.testing.assert_allclose(found["inputs_scaled"], [[np.mean(3 / (high - low))]], rtol=1e-4)


@pytest.mark.parametrize(("batch", "relu"), [(8, 1.788), (32, 1.522), (64, 1.493), (256, 1.473)])
def test_growth_of_gradients_in_closed_form(batch, relu):
    """The closed form has the printed digits, and pi / (pi - 1) in the limit."""
    assert depth.growth_of(batch) == pytest.approx(relu, abs=6e-4)
    assert depth.growth_of(10**6) == pytest.approx(np.pi / (np.pi - 1), abs=1e-4)


def test_spans_have_no_gaps():
    scales = [0.01, 0.1, 1.0, 10.0]
    runs = [[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1], [0, 0, 1, 0], [0, 1, 1, 0]]
    assert initialization.spans(runs, scales).tolist() == [3.0, 1.0, 0.0, 0.0, 1.0]
