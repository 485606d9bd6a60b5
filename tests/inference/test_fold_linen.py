"""Fold linen models: the same outputs from the same definition."""

from functools import partial
from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from folded_models import KEY, X, near, trained

import jaxbn.linen

BOTH = pytest.mark.parametrize(
    "norm", [pytest.param(nn.BatchNorm, marks=pytest.mark.slow), jaxbn.linen.BatchNorm], ids=["flax", "ours"]
)
pytestmark = pytest.mark.usefixtures("ordinary_promotion")


class Block(nn.Module):
    """Every kind of layer, normalized; with and without biases."""

    norm: Any = nn.BatchNorm
    use_bias: bool = True

    @nn.compact
    def __call__(self, x, train=False):
        """Logits."""
        norm = partial(self.norm, use_running_average=not train, epsilon=1e-3)
        with_bias = {"use_bias": self.use_bias}
        x = nn.relu(norm()(nn.Conv(4, (3, 3), strides=2, **with_bias)(x)))
        x = nn.relu(norm(use_scale=False)(nn.Conv(4, (3, 2), feature_group_count=2, kernel_dilation=2, **with_bias)(x)))
        x = norm(use_bias=False)(nn.ConvTranspose(3, (2, 2), strides=(2, 2), transpose_kernel=True, **with_bias)(x))
        x = nn.relu(norm()(nn.ConvTranspose(4, (3, 3), **with_bias)(x)))
        x = norm(axis=(-2, -1))(nn.DenseGeneral((2, 3), axis=(-3, -2, -1), **with_bias)(x))
        return nn.Dense(3, name="last")(nn.relu(x).reshape(len(x), -1))


class Net(nn.Module):
    """A block deeper down, and a head."""

    norm: Any = nn.BatchNorm
    use_bias: bool = True

    @nn.compact
    def __call__(self, x, train=False):
        """Logits."""
        x = Block(self.norm, self.use_bias, name="block")(x, train)
        return nn.relu(self.norm(use_running_average=not train)(nn.Dense(3, use_bias=self.use_bias, name="head")(x)))


PAIRS = {
    "block/Conv_0": "block/BatchNorm_0",
    "block/Conv_1": "block/BatchNorm_1",
    "block/ConvTranspose_0": "block/BatchNorm_2",
    "block/ConvTranspose_1": "block/BatchNorm_3",
    "block/DenseGeneral_0": "block/BatchNorm_4",
    "head": "BatchNorm_0",
}


def norms_of(variables):
    """Return the flattened variables of normalizations."""
    flat = traverse_util.flatten_dict(variables)
    return {path: v for path, v in flat.items() if "BatchNorm" in path[-2]}


@BOTH
@pytest.mark.parametrize("use_bias", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_linen(norm, use_bias):
    """Every kind of layer: same outputs; the normalizations are the identity, or a shift where layers have no bias."""
    model = Net(norm, use_bias)
    variables = trained(jax.jit(model.init)(KEY, X))
    before = jax.tree.map(np.asarray, variables)
    apply = jax.jit(model.apply)
    wanted = apply(variables, X)
    new = jaxbn.linen.fold(lambda v, x: model.apply(v, x, train=False), variables, X, pairs=PAIRS)
    near(apply(new, X), wanted)
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    assert jax.tree.map(lambda v: (v.shape, v.dtype), new) == jax.tree.map(lambda v: (v.shape, v.dtype), variables)
    for path, value in norms_of(new).items():
        epsilon = 1e-3 if path[1] == "block" else 1e-5
        if path[-1] == "mean" and not use_bias:
            assert np.any(np.asarray(value) != 0)
        else:
            exact = {"scale": 1, "bias": 0, "mean": 0, "var": np.float32(1) - np.float32(epsilon)}[path[-1]]
            np.testing.assert_array_equal(value, np.full(value.shape, exact, np.float32))
    # Folding again changes nothing: the normalizations are the identity to the last bit.
    if use_bias:
        jax.tree.map(np.testing.assert_array_equal, jaxbn.linen.fold(model.apply, new, X, pairs=PAIRS), new)
    # Without them: the same model with the identity in their place and biases in its layers.
    dropped = jaxbn.linen.fold(model.apply, variables, X, pairs=PAIRS, drop=True)
    assert "batch_stats" not in dropped
    near(jax.jit(Net(lambda **_: lambda x: x).apply)(dropped, X), wanted)


@pytest.mark.parametrize("epsilon", [1e-12, 1e-5, 1e-3, 3e-4, 0.3, 5.0])
def test_the_identity_is_exact(epsilon):
    """`sqrt((1 - epsilon) + epsilon)` is 1 in float32, so that a layer folded again stays as it is."""
    model = nn.Sequential([nn.Dense(3), jaxbn.linen.BatchNorm(use_running_average=True, epsilon=epsilon)])
    x = X[:, 0, 0]
    new = jaxbn.linen.fold(model.apply, trained(model.init(KEY, x)), x)
    np.testing.assert_array_equal(model.apply(new, x), model.layers[0].apply({"params": new["params"]["layers_0"]}, x))


def test_linen_stacked_boxed_frozen_and_counted():
    """Layers that `nn.scan` stacks, sharded initializers, `FrozenDict`, a count: all kept as they came."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            kernel = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
            x = nn.Dense(2, use_bias=False, kernel_init=kernel)(x)
            norm = jaxbn.linen.BatchNorm(use_running_average=True, momentum=jaxbn.cumulative_average)
            return nn.relu(norm(x)), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"params": 0, "batch_stats": 0}
            name = {nn.PARTITION_NAME: "layers"}
            return nn.scan(Layer, axes, split_rngs={"params": True}, length=3, metadata_params=name)()(x, None)[0]

    model, x = Stack(), X[:, 0, 0]
    start = model.init(KEY, x)
    boxed = start["params"]["ScanLayer_0"]["Dense_0"]["kernel"]
    assert isinstance(boxed, nn.Partitioned)
    values = trained(nn.unbox(start))
    variables = {
        "params": {**values["params"], "ScanLayer_0": dict(values["params"]["ScanLayer_0"])},
        "batch_stats": values["batch_stats"],
    }
    variables["params"]["ScanLayer_0"]["Dense_0"] = {"kernel": boxed}
    variables = flax.core.freeze(variables)
    new = jaxbn.linen.fold(model.apply, variables, x)
    near(model.apply(new, x), model.apply(variables, x))
    kernel = new["params"]["ScanLayer_0"]["Dense_0"]["kernel"]
    assert kernel.names == boxed.names
    assert np.any(np.asarray(kernel.unbox()) != np.asarray(boxed.unbox()))
    assert "count" in new["batch_stats"]["ScanLayer_0"]["BatchNorm_0"]


@pytest.mark.parametrize("tolerance", [1e-4, 3e-2])
def test_half_precision_needs_more_room(tolerance):
    """bfloat16 rounds by 4e-3: refused by default, with the way out in the message."""
    model = nn.Sequential([nn.Dense(8), jaxbn.linen.BatchNorm(use_running_average=True, dtype=jnp.bfloat16)])
    x = X.reshape(3, -1).astype(jnp.bfloat16)
    variables = jax.tree.map(lambda v: v.astype(jnp.bfloat16), trained(model.init(KEY, x)))
    call = partial(jaxbn.linen.fold, model.apply, variables, x, tolerance=tolerance)
    if tolerance == 1e-4:
        with pytest.raises(ValueError, match="tolerance=3e-2"):
            call()
    else:
        new = call()
        assert new["params"]["layers_0"]["kernel"].dtype == jnp.bfloat16
        near(model.apply(new, x).astype(np.float32), np.asarray(model.apply(variables, x), np.float32), 3e-2)


def test_the_call_that_recalibrates_folds_too():
    """It returns statistics beside the output; only the output is compared."""
    model = nn.Sequential([nn.Dense(3), jaxbn.linen.BatchNorm(use_running_average=True)])
    x = np.random.default_rng(0).standard_normal((4, 2)).astype(np.float32)
    variables = model.init(jax.random.key(0), x)
    new = jaxbn.linen.fold(lambda v, x: model.apply(v, x, mutable=["batch_stats"]), variables, x)
    np.testing.assert_allclose(model.apply(new, x), model.apply(variables, x), atol=1e-6)
