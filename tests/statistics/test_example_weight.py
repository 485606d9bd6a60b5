"""Examples that weigh in their own normalization: the formula in float64, its limits, gradients, and masks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracle import EPSILON, evaluation
from params import named, pairs
from ways import ONE, SHARDED, assert_close

import jaxbn.linen
import jaxbn.nnx
from jaxbn import BatchNormParams, BatchNormState
from jaxbn.statistics import apply_with_example_weight

rng = np.random.default_rng(0)
STATE = BatchNormState(jnp.array([0.3, 1.0, -4.0]), jnp.array([0.5, 4.0, 9.0]), jnp.array(7))
PARAMS = BatchNormParams(jnp.array([1.0, -2.0, 0.5]), jnp.array([0.0, 1.0, 2.0]))
VARIABLES = {"params": PARAMS._asdict(), "batch_stats": {"mean": STATE.mean, "var": STATE.var}}
IMAGES = (rng.standard_normal((4, 3, 5, 3)) * [0.5, 2, 8] + [0, 3, -5]).astype(np.float32)


def masked(params, weight, x, mask):
    """Gradients of a scalar of what counts, with respect to all three, and the output."""

    def loss(params, weight, x):
        y = apply_with_example_weight(params, STATE, x, weight, mask=mask)
        return jnp.sum(jnp.where(mask, jnp.sin(y), 0)), y

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(params, weight, x)


MASKED = jax.jit(masked)


def exact(x, params, state, weight, axis=-1):
    """Compute from the raw moments, in float64, one example and feature at a time."""
    wide = np.moveaxis(np.asarray(x, np.float64), axis, -1)
    flat = wide.reshape(len(wide), -1, wide.shape[-1])
    mean, var = (np.asarray(v, np.float64) for v in (state.mean, state.var))
    first = (1 - weight) * mean + weight * flat.mean(1, keepdims=True)
    second = (1 - weight) * (var + mean**2) + weight * np.square(flat).mean(1, keepdims=True)
    scale, bias = (np.asarray(d if v is None else v, np.float64) for v, d in zip(params, (1, 0), strict=True))
    y = (flat - first) / np.sqrt(second - first**2 + EPSILON) * scale + bias
    return np.moveaxis(y.reshape(wide.shape), -1, axis)


GIVEN = {"both": PARAMS, "none": BatchNormParams(None, None), "scale": PARAMS._replace(bias=None)}


@pairs("weight, params", named(0.0, 0.1, 0.5, 1.0), GIVEN)
def test_formula(weight, params):
    y = apply_with_example_weight(params, STATE, IMAGES, weight)
    # Outputs of size 5 and a few roundings.
    np.testing.assert_allclose(y, exact(IMAGES, params, STATE, weight), rtol=0, atol=5e-6)
    channels_first = apply_with_example_weight(params, STATE, np.moveaxis(IMAGES, -1, 1), jnp.float32(weight), axis=1)
    np.testing.assert_allclose(np.moveaxis(channels_first, 1, -1), y, rtol=0, atol=5e-6)


def test_weight_zero_is_evaluation():
    """They agree to the bit or a rounding, for outputs of size 5; and far from zero too."""
    for shift in (0, 1e4):
        x, state = IMAGES + np.float32(shift), STATE._replace(mean=STATE.mean + np.float32(shift))
        y = apply_with_example_weight(PARAMS, state, x, 0.0)
        np.testing.assert_allclose(y, jaxbn.bn_apply(PARAMS, state, x, False)[0], rtol=2e-7, atol=5e-7)
        np.testing.assert_allclose(y, evaluation(x, state.mean, state.var, *PARAMS), rtol=0, atol=5e-6)


def test_weight_one_is_instance_normalization():
    """This holds for any running statistics, and exactly for a mean of 1e4 standard deviations."""
    x = IMAGES + np.float32(1e4)
    for state in (STATE, STATE._replace(mean=STATE.mean - 1e3)):
        y = apply_with_example_weight(PARAMS, state, x, 1.0)
        for one, row in zip(np.asarray(y), x, strict=True):
            alone, _ = jaxbn.bn_apply(PARAMS, STATE, row, True)
            np.testing.assert_allclose(one, alone, rtol=0, atol=5e-6)


def test_examples_do_not_affect_each_other():
    """NaN in one stays there; and each is normalized as if it were alone."""
    x = IMAGES.copy()
    x[1] = np.nan
    y = apply_with_example_weight(PARAMS, STATE, x, 0.3)
    assert np.all(np.isnan(y[1]))
    np.testing.assert_allclose(y[2:3], apply_with_example_weight(PARAMS, STATE, x[2:3], 0.3), rtol=0, atol=2e-6)
    assert np.all(np.isfinite(np.delete(y, 1, 0)))


def test_without_positions_and_in_half_precision():
    x = IMAGES[:, 0, 0]
    np.testing.assert_allclose(
        apply_with_example_weight(PARAMS, STATE, x, 0.3), exact(x, PARAMS, STATE, 0.3), rtol=0, atol=5e-6
    )
    half = jnp.asarray(IMAGES, jnp.bfloat16)
    y = apply_with_example_weight(PARAMS, STATE, half, 0.3)
    assert y.dtype == jnp.bfloat16
    wide = exact(np.asarray(half, np.float32), PARAMS, STATE, 0.3)
    np.testing.assert_allclose(y.astype(jnp.float32), wide, rtol=2**-8, atol=1e-5)  # one rounding to 8 bits


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_gradient(weight):
    """Compare with central differences in float64 by x, scale, bias, the statistics and the weight."""
    g = rng.standard_normal(IMAGES.shape)

    def loss(x, params, mean, var, weight):
        y = apply_with_example_weight(params, BatchNormState(mean, var, STATE.count), x, weight)
        return jnp.sum(y * jnp.asarray(g, jnp.float32))

    inputs = IMAGES, PARAMS, STATE.mean, STATE.var, jnp.float32(weight)
    gradient, tree = jax.tree.flatten(jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4)))(*inputs))
    wide = [np.asarray(v, np.float64) for v in jax.tree.leaves(inputs)]

    def value(leaves):
        x, params, mean, var, w = jax.tree.unflatten(tree, leaves)
        return np.sum(exact(x, params, BatchNormState(mean, var, STATE.count), w) * g)

    for i, leaf in enumerate(wide):
        for at in {tuple(0 for _ in leaf.shape), tuple(n - 1 for n in leaf.shape)}:
            step = np.zeros(leaf.shape)
            step[at] = 1e-5
            up, down = ([*wide[:i], leaf + s, *wide[i + 1 :]] for s in (step, -step))
            slope = (value(up) - value(down)) / 2e-5
            # Sums of 180 terms of size up to 10.
            np.testing.assert_allclose(gradient[i][at], slope, rtol=1e-4, atol=1e-4)


def test_a_mask_leaves_out_what_it_hides():
    """Each example's moments are of what counts, NaN elsewhere or not; without anything it is plain evaluation.

    NaN gives the bias, as in the layer, and a gradient of zero; no other gradient knows what it hides.
    """
    counted = rng.random((*IMAGES.shape[:-1], 1)) < 0.6
    counted[0], counted[1] = False, True
    x = np.where(counted, IMAGES, np.nan).astype(np.float32)
    y = np.asarray(apply_with_example_weight(PARAMS, STATE, x, 0.3, mask=counted))
    np.testing.assert_array_equal(y, np.where(counted, y, PARAMS.bias))
    for one, kept, whole in zip(y[1:], counted[1:], IMAGES[1:], strict=True):
        rows = whole[kept[..., 0]][None]
        np.testing.assert_allclose(one[kept[..., 0]], exact(rows, PARAMS, STATE, 0.3)[0], rtol=0, atol=5e-6)
    finite = np.asarray(apply_with_example_weight(PARAMS, STATE, IMAGES, 0.3, mask=counted))
    np.testing.assert_allclose(finite[0], jaxbn.bn_apply(PARAMS, STATE, IMAGES[:1], False)[0][0], rtol=0, atol=5e-6)

    hidden = [MASKED(PARAMS, 0.3, np.where(counted, IMAGES, np.float32(v)), counted)[0] for v in (7, np.nan, np.inf)]
    for other in hidden[1:]:
        assert_close(other, hidden[0], atol=1e-6)


def test_extreme_input_gives_finite_output_and_gradients():
    """Constant images, tiny and huge ones: outputs and gradients; the weight's is of third order in x."""
    everything = np.ones((*IMAGES.shape[:-1], 1), bool)
    for x in (np.zeros_like(IMAGES), np.full_like(IMAGES, 7e4), IMAGES * np.float32(1e-30), IMAGES * np.float32(1e10)):
        for weight in (0.0, 0.3, 1.0):
            for leaf in jax.tree.leaves(MASKED(PARAMS, weight, x, everything)):
                assert np.all(np.isfinite(leaf))


def test_a_traced_weight_compiles_once():
    def apply(weight):
        return apply_with_example_weight(PARAMS, STATE, IMAGES, weight)

    traced = jax.jit(chex.assert_max_traces(apply, n=1))
    for weight in (0.0, 0.3, 1.0):
        assert_close(traced(weight), apply(weight), atol=5e-6)


@pytest.mark.parametrize("way", SHARDED, ids=lambda way: way.name)
def test_eight_devices_are_one(way):
    """Outputs and gradients agree under sharded `jit`, with unequal masks over NaN."""
    own = np.random.default_rng(1)
    mask = own.random((16, 3, 2, 1)) < 0.6
    mask[0], mask[1] = False, True
    x = np.where(mask, own.standard_normal((16, 3, 2, 3)), np.nan).astype(np.float32)

    def member(whole, parts):
        (d_params, d_weight, dx), y = masked(whole["params"], whole["weight"], parts["x"], parts["mask"])
        return {"y": y, "dx": dx}, (d_params, d_weight)

    whole, parts = {"params": PARAMS, "weight": jnp.float32(0.3)}, {"x": x, "mask": mask}
    assert_close(way.run(member, whole, parts), ONE.run(member, whole, parts), atol=2e-5)


def test_both_modules_weigh_in_evaluation_only():
    mask = np.ones((*IMAGES.shape[:-1], 1), bool)
    mask[0, 0] = False
    wanted = np.tanh(apply_with_example_weight(PARAMS, STATE, IMAGES, 0.3, mask=mask) + IMAGES)
    trained = np.tanh(jaxbn.bn_apply(PARAMS, STATE, IMAGES, True, mask=mask)[0] + IMAGES)
    given = {"activation": jnp.tanh, "example_weight": 0.3}
    layer = jaxbn.linen.BatchNorm(**given)
    y = layer.apply(VARIABLES, IMAGES, True, mask=mask, residual=IMAGES)
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-6)
    y, _ = layer.apply(VARIABLES, IMAGES, False, mask=mask, residual=IMAGES, mutable=["batch_stats"])
    np.testing.assert_allclose(y, trained, rtol=0, atol=1e-6)
    other = jaxbn.nnx.BatchNorm(len(STATE.mean), rngs=nnx.Rngs(0), **given)
    for name, value in (VARIABLES["params"] | VARIABLES["batch_stats"]).items():
        getattr(other, name).set_value(value)
    np.testing.assert_allclose(other(IMAGES, True, mask=mask, residual=IMAGES), wanted, rtol=0, atol=1e-6)
    np.testing.assert_allclose(other(IMAGES, False, mask=mask, residual=IMAGES), trained, rtol=0, atol=1e-6)
    with pytest.raises(TypeError, match="use_running_average"):
        jax.jit(lambda flag: layer.apply(VARIABLES, IMAGES, flag))(True)
    with pytest.raises(ValueError, match="several domains"):
        jaxbn.nnx.BatchNorm(3, num_domains=2, example_weight=0.3, rngs=nnx.Rngs(0))(IMAGES, True, domain=0)


def test_modules_refuse_what_the_plain_layer_refuses():
    apply = jaxbn.linen.BatchNorm(example_weight=0.3).apply
    for residual in (IMAGES[:1], np.ones((2, *IMAGES.shape), np.float32)):
        with pytest.raises(ValueError, match="`residual` must have the shape of `x`"):
            apply(VARIABLES, IMAGES, True, residual=residual)
    for activation in ("relu", jnp.sum):
        with pytest.raises((TypeError, ValueError), match="`activation` must be"):
            jaxbn.linen.BatchNorm(example_weight=0.3, activation=activation).apply(VARIABLES, IMAGES, True)
    with pytest.raises(ValueError, match="`example_weight` must be from 0 to 1"):
        jaxbn.linen.BatchNorm(example_weight=2.0).apply(VARIABLES, IMAGES, False, mutable=["batch_stats"])


def test_modules_round_once_in_half_precision():
    """Weight 0 is the plain layer, whose epilogue is in float32."""
    x = jnp.asarray(IMAGES, jnp.bfloat16)
    y, plain = (
        jaxbn.linen.BatchNorm(activation=jnp.tanh, dtype=jnp.bfloat16, **weight).apply(VARIABLES, x, True, residual=x)
        for weight in ({"example_weight": 0.0}, {})
    )
    assert y.dtype == plain.dtype == jnp.bfloat16
    # A float32 value beside the middle of two bfloat16 ones may go either way: by 2^-8 of it, in few places.
    assert np.mean(y != plain) < 0.02
    np.testing.assert_allclose(y.astype(np.float32), plain.astype(np.float32), rtol=2**-7)


@pytest.mark.parametrize(
    ("x", "weight", "options", "kind", "words"),
    [
        (IMAGES, 1.5, {}, ValueError, "from 0 to 1"),
        (IMAGES, -0.1, {}, ValueError, "from 0 to 1"),
        (IMAGES, True, {}, TypeError, "weight"),
        (IMAGES, 0.1, {"axis": 0}, ValueError, "axis 0"),
        (IMAGES, 0.1, {"mask": np.ones((2, 1), bool)}, ValueError, "mask"),
        (IMAGES, 0.1, {"axis": 1.0}, TypeError, "axis"),
        (IMAGES[..., :2], 0.1, {}, ValueError, "scale"),
        (IMAGES, 0.1, {"epsilon": 0.0}, ValueError, "epsilon"),
        (IMAGES.astype(int), 0.1, {}, TypeError, "floating"),
        (IMAGES.astype(np.complex64), 0.1, {}, TypeError, "floating"),
    ],
)
def test_apply_with_example_weight_refuses(x, weight, options, kind, words):
    with pytest.raises(kind, match=words):
        apply_with_example_weight(PARAMS, STATE, x, weight, **options)
