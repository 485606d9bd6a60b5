"""Find layers in any container, and keep the type of trees."""

from typing import Any

import chex
import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze
from flax_layers import KEY, STATS, X, rngs
from params import named, pairs

import jaxbn
import jaxbn.linen
import jaxbn.nnx

pytestmark = pytest.mark.usefixtures("ordinary_promotion")


class Held(nnx.Module):
    """Layers in a tuple."""

    def __init__(self):
        self.blocks = nnx.data((nnx.Linear(3, 3, rngs=rngs()), nnx.BatchNorm(3, rngs=rngs())))

    def __call__(self, x):
        """Apply one after the other."""
        return self.blocks[1](self.blocks[0](x))


class InDict(nnx.Module):
    """Layers in a tuple in a dict."""

    def __init__(self):
        self.blocks = nnx.data({"all": (nnx.Linear(3, 3, rngs=rngs()), nnx.BatchNorm(3, rngs=rngs()))})

    def __call__(self, x):
        """Apply one after the other."""
        return self.blocks["all"][1](self.blocks["all"][0](x))


class NoTree(nnx.Module, pytree=False):
    """A module that is no pytree, with layers in a tuple."""

    def __init__(self):
        self.blocks = (nnx.Linear(3, 3, rngs=rngs()), nnx.BatchNorm(3, rngs=rngs()))

    def __call__(self, x):
        """Apply one after the other."""
        return self.blocks[1](self.blocks[0](x))


class Inside(nnx.Module):
    """One inside another."""

    def __init__(self):
        self.held, self.blocks = Held(), ()

    def __call__(self, x):
        """Apply the inner one."""
        return self.held(x)


CONTAINERS = {"tuple": Held, "dict": InDict, "no pytree": NoTree, "inside": Inside}
PREFIX = {"tuple": "blocks", "dict": "blocks/all", "no pytree": "blocks", "inside": "held/blocks"}


@pytest.mark.parametrize("name", CONTAINERS)
def test_whatever_holds_the_layers(name):
    """`convert`, `fold` and `health` find and replace them, and leave the model as it is."""
    model: Any = CONTAINERS[name]()
    model(X)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    converted = jaxbn.nnx.convert(model, momentum=0.5)
    norms = [m for _, m in nnx.iter_modules(converted) if isinstance(m, jaxbn.nnx.BatchNorm)]
    assert [m.momentum for m in norms] == [0.5]
    assert norms[0].mean is next(m for _, m in nnx.iter_modules(model) if isinstance(m, nnx.BatchNorm)).mean
    pairs = {f"{PREFIX[name]}/0": f"{PREFIX[name]}/1"}
    model.eval()
    wanted = model(X)
    for start in (model, converted):
        new = jaxbn.nnx.fold(start, X, pairs=pairs)
        assert not [m for _, m in nnx.iter_modules(new) if isinstance(m, (jaxbn.nnx.BatchNorm, nnx.BatchNorm))]
        np.testing.assert_allclose(new(X), wanted, atol=1e-5)
        assert jaxbn.nnx.health(start, X)[0].batch is not None
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model)), before)


@pytest.mark.parametrize("hold", [tuple, list, lambda layers: dict(enumerate(layers)), lambda layers: [tuple(layers)]])
def test_containers_without_a_module_around(hold):
    layers = [nnx.Linear(3, 3, rngs=rngs()), nnx.BatchNorm(3, rngs=rngs())]
    model = hold(layers)
    new = jaxbn.nnx.convert(model)
    assert type(new) is type(model)
    assert [type(m) for _, m in nnx.iter_modules(new)] == [nnx.Linear, jaxbn.nnx.BatchNorm]

    def call(model, x):
        for _, layer in list(nnx.iter_modules(model)):
            x = layer(x)
        return x

    found = jaxbn.nnx.health(model, X, call)
    assert found[0].batch is not None
    np.testing.assert_array_equal(layers[1].mean[...], np.zeros(3))


class Net(nn.Module):
    """A layer and a normalization."""

    @nn.compact
    def __call__(self, x, train=False):
        """Apply one after the other."""
        return jaxbn.linen.BatchNorm(use_running_average=not train)(nn.Dense(3)(x))


PAIRS = {"Dense_0": "BatchNorm_0"}
THROUGH = {
    "affine_mask": lambda v: {"params": jaxbn.linen.affine_mask(v), "batch_stats": v["batch_stats"]},
    "convert": jaxbn.linen.convert,
    "fold": lambda v: jaxbn.linen.fold(Net().apply, v, X, pairs=PAIRS),
    "recalibrate": lambda v: jaxbn.linen.recalibrate(lambda v, x: Net().apply(v, x, mutable=STATS), v, [X]),
}


@pairs("name, frozen", named(*THROUGH), named("all", "params", "none"))
def test_trees_keep_their_type(name, frozen):
    variables: Any = Net().init(KEY, X)
    if frozen != "none":
        variables = {**variables, "params": freeze(variables["params"])}
    if frozen == "all":
        variables = freeze(variables)
    new = THROUGH[name](variables)
    assert isinstance(new["params"], FrozenDict) == (frozen != "none")
    assert jax.tree.structure(new["params"]) == jax.tree.structure(variables["params"])
    if name != "affine_mask":
        assert jax.tree.structure(new) == jax.tree.structure(variables)
    else:
        optimizer = optax.masked(optax.set_to_zero(), new["params"])
        optimizer.update(variables["params"], optimizer.init(variables["params"]))


def test_the_mask_of_boxed_parameters_is_of_bools():
    layer = jaxbn.linen.BatchNorm(True, scale_init=nn.with_partitioning(nn.initializers.ones, ("model",)))
    assert jaxbn.linen.affine_mask(layer.init(KEY, X)) == {"scale": True, "bias": True}
