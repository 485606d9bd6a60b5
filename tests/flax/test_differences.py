"""Show each difference from flax's layers that the page for users of flax lists, and no other test has."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_layers import KEY, STATS, X, rngs
from params import named, pairs

import jaxbn.linen
import jaxbn.nnx

pytestmark = pytest.mark.usefixtures("ordinary_promotion")

CUBE = np.asarray(np.random.default_rng(2).normal(size=(3, 3, 3)), np.float32)
BIAS = 0.5
REFUSED: dict[str, dict[str, Any]] = {
    "epsilon of zero": {"epsilon": 0.0},
    "negative epsilon": {"epsilon": -1e-6},
    "epsilon of several": {"epsilon": np.full(3, 1e-5, np.float32)},
    "momentum above 1": {"momentum": 1.5},
    "negative momentum": {"momentum": -0.5},
    "momentum of several": {"momentum": np.full(3, 0.9, np.float32)},
    "an axis twice": {"axis": (1, -1)},
    "integers": {"param_dtype": jnp.int32},
}


def run(theirs: bool, kind: str, x=X, mask=None, train=True, **options):
    """Return the output and the new mean and variance of a layer, whose bias is BIAS."""
    options = {"use_running_average": not train} | options
    if kind == "nnx":
        layer: Any = (nnx if theirs else jaxbn.nnx).BatchNorm(3, **options, rngs=rngs())
        layer.bias.set_value(jnp.full(3, BIAS))
        y = layer(x, mask=mask)
        return y, layer.mean[...], layer.var[...]
    module = (nn if theirs else jaxbn.linen).BatchNorm(**options, bias_init=nn.initializers.constant(BIAS))
    y, new = module.apply(module.init(KEY, x), x, mask=mask, mutable=STATS)
    return y, new["batch_stats"]["mean"], new["batch_stats"]["var"]


BOTH = pytest.mark.parametrize("kind", ["linen", "nnx"])


@pairs("name, kind, train", named(*REFUSED), named("linen", "nnx"), named(True, False))
def test_refused_where_flax_computes(name, kind, train):
    run(True, kind, train=train, **REFUSED[name])
    with pytest.raises((TypeError, ValueError), match=f"`{next(iter(REFUSED[name]))}`"):
        run(False, kind, train=train, **REFUSED[name])


@BOTH
def test_a_traced_epsilon_and_no_momentum_are_refused(kind):
    def call(theirs):
        return jax.jit(lambda e: run(theirs, kind, epsilon=e)[0])(1e-5)

    call(True)
    with pytest.raises(TypeError, match="`epsilon`"):
        call(False)
    run(True, kind, momentum=None, train=False)
    with pytest.raises(TypeError, match="`momentum`"):
        run(False, kind, momentum=None, train=False)


@BOTH
def test_a_mode_that_is_no_bool_is_refused(kind):
    for mode in (1, jnp.int32(1)):
        run(True, kind, use_running_average=mode)
        with pytest.raises(TypeError, match="`use_running_average` must be True"):
            run(False, kind, use_running_average=mode)


@BOTH
def test_a_mask_of_unclear_axes_is_refused(kind):
    run(True, kind, CUBE, np.array([True, True, False]))
    with pytest.raises(ValueError, match="`mask` must say which axes"):
        run(False, kind, CUBE, np.array([True, True, False]))


def test_a_mask_of_floats_is_refused():
    run(True, "linen", mask=np.ones((8, 1), np.float32))  # nnx refuses it as well
    with pytest.raises(TypeError, match="`mask` must be an array of bools"):
        run(False, "linen", mask=np.ones((8, 1), np.float32))


@BOTH
def test_features_without_values_are_the_bias(kind):
    theirs, ours = (run(flax, kind, mask=np.zeros((8, 1), bool)) for flax in (True, False))
    assert all(np.isnan(v).all() for v in theirs)
    for v, wanted in zip(ours, (BIAS, 0, 1), strict=True):
        np.testing.assert_array_equal(v, np.full(v.shape, wanted))


@pairs("value, kind, train", named(np.nan, np.inf, 1e30), named("linen", "nnx"), named(True, False))
def test_bad_values_under_the_mask_are_the_bias(value, kind, train):
    x, mask = np.concatenate([[[value] * 3], X[1:]]).astype(np.float32), np.arange(8)[:, None] > 0
    theirs, ours = (run(flax, kind, x, mask, train)[0] for flax in (True, False))
    np.testing.assert_array_equal(ours[0], np.full(3, BIAS))
    assert not np.any(np.abs(theirs[0]) < 1e28)
    np.testing.assert_allclose(ours[1:], theirs[1:], atol=1e-5)


@BOTH
def test_an_unbound_axis_name(kind):
    for theirs, error in ((True, NameError), (False, ValueError)):
        with pytest.raises(error, match="axis"):
            run(theirs, kind, axis_name="data")


def test_half_precision_sums_are_float32():
    x = jnp.asarray(300 + np.random.default_rng(0).normal(size=(4096, 3)), jnp.bfloat16)
    theirs, ours = (
        run(flax, "linen", x, force_float32_reductions=False, param_dtype=jnp.bfloat16)[0].astype(jnp.float32)
        for flax in (True, False)
    )
    wanted = run(False, "linen", x)[0]
    np.testing.assert_allclose(ours, wanted, atol=0.02)
    assert np.abs(theirs - wanted).max() > 1


def test_statistics_keep_their_dtype():
    with jax.enable_x64(True):
        theirs, ours = (run(flax, "linen", jnp.asarray(X, jnp.float64)) for flax in (True, False))
        assert [v.dtype for v in theirs] == [jnp.float64] * 3
        assert [v.dtype for v in ours] == [jnp.float64, jnp.float32, jnp.float32]
    for module, dtype in ((nn.BatchNorm(False), jnp.float32), (jaxbn.linen.BatchNorm(False), jnp.bfloat16)):
        cast = jax.tree.map(lambda v: v.astype(jnp.bfloat16), module.init(KEY, X))
        assert module.apply(cast, X, mutable=STATS)[1]["batch_stats"]["mean"].dtype == dtype
