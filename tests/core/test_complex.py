"""Complex input: a complex mean, a real variance of both parts together, and derivatives of the plain formula."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from params import named, pairs

import jaxbn
import jaxbn.linen
import jaxbn.nnx

RNG = np.random.default_rng(0)
X = (RNG.standard_normal((32, 4)) * [1, 2, 3, 4] + 2j * RNG.standard_normal((32, 4)) + (3 - 1j)).astype(np.complex64)
MASK = RNG.random((32, 1)) < 0.7


def plain(x, mask, np=np, epsilon=1e-5):
    """Compute the formula: in complex128 by NumPy, or by `jax.numpy` for JAX to differentiate."""
    x = x.astype(np.complex64 if np is jnp else np.complex128)
    mean = np.sum(np.where(mask, x, 0), 0, keepdims=True) / np.sum(mask).astype(x.dtype)
    var = np.mean(np.abs(x - mean) ** 2, 0, keepdims=True, where=np.broadcast_to(mask, x.shape))
    return (x - mean) / np.sqrt(var + epsilon).astype(x.dtype), mean[0], var[0]


@pytest.mark.parametrize(
    ("wrap", "mask"), [(lambda f: f, MASK), (jax.jit, np.ones((32, 1), bool))], ids=["eager, masked", "jit, plain"]
)
def test_values_and_gradients(wrap, mask):
    params, state = jaxbn.bn_init(4, dtype=jnp.complex64)
    hidden = np.where(mask, X, np.nan)
    cotangent = (RNG.standard_normal(X.shape) + 1j * RNG.standard_normal(X.shape)).astype(np.complex64)
    cotangent = np.where(mask, cotangent, 0)

    def derive(layer, x):
        y, pull, new = jax.vjp(layer, x, has_aux=True)
        return y, new, pull(cotangent)[0]

    layer = partial(jaxbn.bn_apply, params, state, train=True, mask=mask, momentum=0.0)
    y, new, dx = wrap(partial(derive, lambda x: layer(x=x)))(hidden)
    exact, mean, var = plain(X, mask)
    np.testing.assert_allclose(np.where(mask, y, 0), np.where(mask, exact, 0), atol=2e-6)
    np.testing.assert_allclose(new.mean, mean, atol=2e-6)
    np.testing.assert_allclose(new.var, var, rtol=2e-6)
    assert (y.dtype, new.mean.dtype, new.var.dtype) == (jnp.complex64, jnp.complex64, jnp.float32)
    evaluated, _ = jaxbn.bn_apply(params, new, X, False)
    np.testing.assert_allclose(evaluated, exact, atol=5e-6)
    wanted = jax.jit(partial(derive, lambda x: (plain(x, mask, jnp)[0], None)))(X)[-1]
    np.testing.assert_allclose(dx, wanted, atol=5e-5)


def test_shards_are_one_batch():
    params, state = jaxbn.bn_init(4, dtype=jnp.complex64)
    one = jaxbn.bn_apply(params, state, X, True, mask=MASK)
    step = jax.vmap(lambda x, m: jaxbn.bn_apply(params, state, x, True, mask=m, axis_name="d"), axis_name="d")
    y, new = jax.jit(step)(X.reshape(4, 8, 4), MASK.reshape(4, 8, 1))
    np.testing.assert_allclose(y.reshape(32, 4), one[0], atol=2e-6)
    for part, whole in zip(new, one[1], strict=True):
        np.testing.assert_allclose(part, np.broadcast_to(whole, part.shape), atol=2e-6)


@pytest.mark.usefixtures("ordinary_promotion")
@pytest.mark.parametrize("options", [{}, {"param_dtype": jnp.complex64}, {"dtype": jnp.complex64}])
def test_linen_as_flax(options):
    outcomes = []
    for kind in (nn.BatchNorm, jaxbn.linen.BatchNorm):
        layer = kind(use_running_average=False, **options)
        variables = layer.init(jax.random.key(0), X)
        outcomes.append(layer.apply(variables, X, mutable=["batch_stats"]))
    (theirs, their_stats), (y, stats) = outcomes
    np.testing.assert_allclose(y, theirs, atol=5e-6)
    for name in ("mean", "var"):
        np.testing.assert_allclose(stats["batch_stats"][name], their_stats["batch_stats"][name], atol=1e-6)
        assert stats["batch_stats"][name].dtype == their_stats["batch_stats"][name].dtype


def test_nnx_keeps_the_imaginary_part():
    """Flax's own module drops it from the running mean, with a warning."""
    layer = jaxbn.nnx.BatchNorm(4, momentum=0.0, dtype=jnp.complex64, rngs=nnx.Rngs(0))
    y = layer(X)
    exact, mean, _ = plain(X, np.ones((32, 1), bool))
    np.testing.assert_allclose(y, exact, atol=2e-6)
    np.testing.assert_allclose(layer.mean[...], mean, atol=2e-6)


@jax.jit
def derive_complex(z, dy):
    y, pull = jax.vjp(lambda z: jaxbn.bn_apply(*jaxbn.bn_init(2, dtype=jnp.complex64), z, True)[0], z)
    return y, pull(dy)[0]


@pairs("ratio, std", named(0.0, 1e2, 1e6), named(1.0, 1e6, 1e13))
def test_complex_derivatives_are_exact(std, ratio):
    parts = RNG.normal(size=(2, 64, 2)) + ratio
    z = ((parts[0] + 1j * parts[1]) * std).astype(np.complex64)
    dy = (RNG.normal(size=z.shape) + 1j * RNG.normal(size=z.shape)).astype(np.complex64)
    y, dz = derive_complex(z, dy)
    # In pairs of real numbers: one variance of both, a mean each.
    wide, g = z.astype(np.complex128), dy.astype(np.complex128)
    d = wide - wide.mean(0)
    s = np.sqrt((np.abs(d) ** 2).mean(0) + 1e-5)
    np.testing.assert_allclose(y, d / s, atol=2e-6)
    # JAX's cotangent of a complex number is the conjugate of the pair's.
    g = g.conj()
    wanted = (g - g.mean(0) - d / s * (g * (d / s).conj()).real.mean(0)) / s
    got = np.asarray(dz).conj()
    assert np.max(np.abs(got - wanted)) <= 5e-6 * np.max(np.abs(wanted))


@pytest.mark.parametrize("compiled", [False, True])
def test_complex_padding_is_the_mean(compiled):
    """This holds also where the mean is known to more digits than its dtype has.

    Those are some 1e-2 std here, of which a fused multiply-add leaves the rounding error.
    """
    params, state = jaxbn.bn_init(1, dtype=jnp.complex64)
    z = np.array([1e6 + 1, 1e6 + 2, np.nan, 1e6 + 4], np.complex64)[:, None]
    mask = np.array([True, True, False, True])[:, None]
    apply = jax.jit(jaxbn.bn_apply, static_argnames="train") if compiled else jaxbn.bn_apply
    y, _ = apply(params, state, z, train=True, mask=mask)
    assert np.abs(y[2, 0]) <= 1e-2 * np.finfo(np.float32).eps
