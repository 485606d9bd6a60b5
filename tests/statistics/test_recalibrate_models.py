"""Recalibrate layers that are nested, shared, frozen, subclassed, stacked or transformed."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracle import training
from two_layers import (
    EVEN,
    FEATURES,
    UNEVEN,
    X,
    assert_statistics,
    of_linen,
    of_nnx,
    once,
    recalibrate_linen,
    recalibrate_nnx,
)

import jaxbn
import jaxbn.linen
import jaxbn.nnx


@pytest.mark.slow
def test_count_goes_on_from_the_batches():
    for before, after in ((0, 3), (2, 3), (9, 9)):
        layer = jaxbn.linen.BatchNorm(use_running_average=False, momentum=jaxbn.cumulative_average)
        variables = jaxbn.linen.convert(layer.init(jax.random.key(0), X), count=before)
        new = recalibrate_linen(partial(layer.apply, mutable=["batch_stats"]), variables, EVEN)
        assert int(new["batch_stats"]["count"]) == after
        stateful = jaxbn.nnx.BatchNorm(FEATURES, momentum=jaxbn.cumulative_average, rngs=nnx.Rngs(0))
        stateful.count.set_value(jnp.array(before))
        recalibrate_nnx(stateful, EVEN)
        assert int(stateful.count[...]) == after
        np.testing.assert_array_equal(stateful.mean[...], new["batch_stats"]["mean"])


@pytest.mark.parametrize("options", [{"ghost_batches": 2}, {"renorm": jaxbn.Renorm(3.0, 5.0)}], ids=str)
@pytest.mark.parametrize(("of", "kind"), [(of_linen, jaxbn.linen.BatchNorm), (of_nnx, jaxbn.nnx.BatchNorm)])
def test_layers_normalize_by_the_whole_batch(of, kind, options):
    """An odd last one of ghost batches too."""
    batches = [X[:16], X[16:23]]
    assert_statistics(of(partial(kind, **options), batches), once(batches))


class Odd(nn.Module):
    """Nested, shared, frozen, unused, and one whose subclass changes the input."""

    @nn.compact
    def __call__(self, x):
        shared = Doubling(use_running_average=True, name="shared")
        frozen = jaxbn.linen.BatchNorm(frozen=True, name="frozen")
        if self.is_initializing():
            jaxbn.linen.BatchNorm(use_running_average=True, name="unused")(x)
        y = shared(x) + shared(x + 10)
        return nn.remat(Inner)(name="inner")(x), y, frozen(x)


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True, name="norm")(x)


class Doubling(jaxbn.linen.BatchNorm):
    @nn.compact
    def __call__(self, x):
        return super().__call__(2 * x)


class StatefulOdd(nnx.Module):
    def __init__(self):
        self.shared = StatefulDoubling(FEATURES, rngs=nnx.Rngs(0))
        self.again = nnx.List([self.shared])
        self.frozen = jaxbn.nnx.BatchNorm(FEATURES, frozen=True, rngs=nnx.Rngs(0))
        self.unused = jaxbn.nnx.BatchNorm(FEATURES, rngs=nnx.Rngs(0))
        self.inner = nnx.Dict(norm=nnx.BatchNorm(FEATURES, rngs=nnx.Rngs(0)))

    def __call__(self, x):
        return (
            self.shared(x) + self.again[0](x + 10),
            self.frozen(x),
            nnx.remat(lambda m, x: m(x))(self.inner["norm"], x),
        )


class StatefulDoubling(jaxbn.nnx.BatchNorm):
    def __call__(self, x):
        return super().__call__(2 * x)


@pytest.mark.slow
@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_nested_shared_frozen_unused_and_subclassed(layer_by_layer):
    model, stateful = Odd(), StatefulOdd()
    variables = model.init(jax.random.key(0), X)
    apply = partial(model.apply, mutable=["batch_stats"])
    stats = recalibrate_linen(apply, variables, UNEVEN, layer_by_layer=layer_by_layer)["batch_stats"]
    recalibrate_nnx(stateful, UNEVEN, layer_by_layer=layer_by_layer)
    both = 2 * np.concatenate([X, X + 10]).astype(np.float64)
    for mean, var in (
        (stats["shared"]["mean"], stats["shared"]["var"]),
        (stateful.shared.mean[...], stateful.shared.var[...]),
    ):
        np.testing.assert_allclose(mean, both.mean(0), rtol=1e-6)
        np.testing.assert_allclose(var, both.var(0), rtol=1e-6)
    for norm in (stats["inner"]["norm"], nnx.to_pure_dict(nnx.state(stateful.inner["norm"], nnx.BatchStat))):
        np.testing.assert_allclose(norm["mean"], X.mean(0, np.float64), rtol=1e-6)
    for name in ("frozen", "unused"):
        np.testing.assert_array_equal(stats[name]["var"], 1)
        np.testing.assert_array_equal(getattr(stateful, name).var[...], 1)


@pytest.mark.slow
def test_layers_stacked_by_scan():
    """Each of a stack is a layer of its own, layer by layer too: eight passes at most, exact after three."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            x = jaxbn.linen.BatchNorm(use_running_average=False)(jnp.sin(x))
            return nn.BatchNorm(use_running_average=False)(x * x), None

    stack = nn.scan(Block, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=2)()
    variables = stack.init(jax.random.key(0), X, None)
    apply = lambda v, x: stack.apply(v, x, None, mutable=["batch_stats"])  # noqa: E731
    stats = recalibrate_linen(apply, variables, UNEVEN, layer_by_layer=True)["batch_stats"]
    h = X.astype(np.float64)
    for i in range(2):
        for name, before in (("BatchNorm_0", np.sin), ("BatchNorm_1", np.square)):
            h, mean, var, _ = training(before(h))
            # Where features have a variance of 0.01 or more, errors of the inputs are enlarged up to 10 times a layer.
            np.testing.assert_allclose(stats[name]["mean"][i], mean, rtol=2e-5, atol=2e-6)
            np.testing.assert_allclose(stats[name]["var"][i], var, rtol=2e-5)


@pytest.mark.slow
def test_layers_stacked_by_vmap():
    stack = nnx.vmap(lambda key: jaxbn.nnx.BatchNorm(FEATURES, rngs=nnx.Rngs(key)))(
        jax.random.split(jax.random.key(0), 3)
    )

    def call(stack, x):
        return nnx.scan(lambda x, layer: layer(2 * jnp.sin(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, stack)

    recalibrate_nnx(stack, UNEVEN, call, layer_by_layer=True)
    h = X.astype(np.float64)
    for i in range(3):
        h, mean, var, _ = training(2 * np.sin(h))
        np.testing.assert_allclose(stack.mean[...][i], mean, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(stack.var[...][i], var, rtol=2e-5)


@pytest.mark.parametrize("norm", [nn.remat(jaxbn.linen.BatchNorm), partial(nn.BatchNorm, axis=(0, 2))])
def test_transformed_layers_and_several_axes(norm):
    model, x = norm(use_running_average=True), X.reshape(2, 12, 3)
    new = recalibrate_linen(partial(model.apply, mutable=["batch_stats"]), model.init(jax.random.key(0), x), [x])
    kept = (0, 1) if model.axis == -1 else 1
    np.testing.assert_allclose(new["batch_stats"]["var"], x.astype(np.float64).var(kept), rtol=1e-6)


def test_dropout_advances_and_the_model_keeps_its_keys():
    model = nnx.Sequential(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), jaxbn.nnx.BatchNorm(FEATURES, rngs=nnx.Rngs(0)))
    recalibrate_nnx(model, [X, X])
    twice = model.layers[1].mean[...]
    assert int(model.layers[0].rngs.count[...]) == 0
    recalibrate_nnx(model, [X])
    assert np.max(np.abs(twice - model.layers[1].mean[...])) > 0.01  # the second batch was dropped otherwise
    model.eval()
    recalibrate_nnx(model, [X])
    np.testing.assert_allclose(model.layers[1].mean[...], X.mean(0), rtol=1e-5, atol=1e-6)


class Center(nn.Module):
    """A module of the user's own that keeps a mean and a variance for purposes of its own."""

    @nn.compact
    def __call__(self, x):
        mean, var = (self.variable("batch_stats", name, jnp.ones, FEATURES) for name in ("mean", "var"))
        return (x - mean.value[None]) * var.value[None]


def test_statistics_of_other_modules_are_left_alone():
    model = nn.Sequential([Center(), jaxbn.linen.BatchNorm(use_running_average=True)])
    variables = model.init(jax.random.key(0), X)
    stats = recalibrate_linen(partial(model.apply, mutable=["batch_stats"]), variables, [X])["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, stats["layers_0"], variables["batch_stats"]["layers_0"])
    np.testing.assert_allclose(stats["layers_1"]["mean"], (X - 1).mean(0), rtol=1e-5)
