"""Name the layer at fault in a model, and leave the model as it is."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn.diagnostics import health

linen_health, nnx_health = jaxbn.linen.health, jaxbn.nnx.health
X = np.asarray(np.random.default_rng(0).normal(size=(256, 4)) * [1, 4, 0.2, 2] + [2, -3, 0, 5], np.float32)
KEY = jax.random.key(0)
BOTH = pytest.mark.parametrize("norm", [nn.BatchNorm, jaxbn.linen.BatchNorm], ids=["flax", "ours"])
NNX = pytest.mark.parametrize("norm", [nnx.BatchNorm, jaxbn.nnx.BatchNorm], ids=["flax", "ours"])


@pytest.fixture
def flax_s_promotion(ordinary_promotion):
    """Promote as flax's layers need it."""


class Net(nn.Module):
    """Three normalizations, of which the second is used twice."""

    norm: Any

    @nn.compact
    def __call__(self, x, train=False):
        """Return some numbers."""
        norm = partial(self.norm, use_running_average=not train, epsilon=1e-3, momentum=0.0)
        x = norm(name="first")(x)
        twice = norm(name="twice")
        x = twice(twice(nn.Dense(4, name="dense")(x)))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return norm(name="last")(x) + 1


def trained(model, *parts):
    """Variables of which only the statistics of `parts` were kept from a pass over X."""
    variables = model.init(KEY, X)
    _, new = model.apply(variables, X, train=True, mutable=["batch_stats"], rngs={"dropout": KEY})
    kept = {name: (new if name in parts else variables)["batch_stats"][name] for name in new["batch_stats"]}
    return {**variables, "batch_stats": kept}


@BOTH
@pytest.mark.usefixtures("flax_s_promotion")
def test_linen_names_the_layer_at_fault(norm):
    """Those after it are not blamed: their inputs are those of training."""
    model = Net(norm)
    healthy = trained(model, "first", "twice", "last")
    for wrong in ["first", "twice", "last"]:
        variables = trained(model, *({"first", "twice", "last"} - {wrong}))
        before = jax.tree.map(np.asarray, variables)
        for apply in (model.apply, partial(model.apply, train=True, rngs={"dropout": KEY})):
            found = linen_health(variables, apply, X)
            assert {layer.path for layer in found} == {"first", "last", "twice"}
            assert {layer.path for layer in found if layer.untouched} == {wrong}
            assert all(layer.batch is not None and layer.batch.examples == 256 for layer in found)
        jax.tree.map(np.testing.assert_array_equal, variables, before)
        blamed = {layer.path for layer in linen_health(variables, model.apply, X) if layer.problems}
        # The dropout of training doubles a variance; a layer used twice has the statistics of its second use.
        assert blamed - {"last"} <= {wrong, "twice"}
        assert wrong in blamed
        assert {layer.path for layer in linen_health(variables) if layer.untouched} == {wrong}
    assert not next(layer for layer in linen_health(healthy, model.apply, X) if layer.path == "first").problems
    # An epsilon of 1e-3 is known only where the model is seen.
    small = jax.tree.map(lambda v: v * 0 + 5e-4, healthy["batch_stats"])
    assert [layer.flat for layer in linen_health({"batch_stats": small})] == [0, 0, 0]
    assert [layer.flat for layer in linen_health({"batch_stats": small}, epsilon=1e-3)] == [4, 4, 4]
    assert [layer.flat for layer in linen_health({**healthy, "batch_stats": small}, model.apply, X)] == [4, 4, 4]


@BOTH
@pytest.mark.usefixtures("flax_s_promotion")
def test_linen_stacks_and_single_layers(norm):
    """Layers of a scan are looked at without the batch; a layer by itself has no path."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return norm(use_running_average=True)(nn.Dense(4)(x)), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"params": 0, "batch_stats": 0}
            x = norm(use_running_average=True, name="before")(x)
            return nn.scan(Layer, axes, split_rngs={"params": True}, length=3)(name="stack")(x, None)[0]

    model = Stack()
    before, stacked = linen_health(variables := model.init(KEY, X), model.apply, X)
    assert (before.path, before.channels, stacked.path, stacked.channels) == ("before", 4, "stack/BatchNorm_0", 12)
    assert before.batch is not None
    assert stacked.batch is None
    assert stacked.untouched
    assert len(linen_health(variables)) == 2
    alone = norm(use_running_average=True)
    (found,) = linen_health(alone.init(KEY, X), alone.apply, X)
    assert (found.path, found.untouched) == ("the layer", True)
    wanted = health(*jaxbn.bn_init(4), X)[0].batch
    assert found.batch is not None
    assert wanted is not None
    np.testing.assert_allclose(found.batch[:4], wanted[:4], rtol=1e-6)


class Model(nnx.Module):
    """`Net` in nnx, and a stack."""

    def __init__(self, norm):
        rngs, new = nnx.Rngs(0), partial(norm, epsilon=1e-3, momentum=0.0)
        self.norms = nnx.List([new(4, rngs=rngs), new(4, rngs=rngs)])
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.stack = nnx.vmap(lambda rngs: norm(4, rngs=rngs))(nnx.Rngs(0).split(3))

    def __call__(self, x):
        """Return some numbers."""
        x = self.norms[1](self.drop(self.dense(self.norms[0](x))))
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.stack)


@NNX
@pytest.mark.usefixtures("flax_s_promotion")
def test_nnx_names_the_layer_at_fault(norm):
    model = Model(norm)
    model(X)
    model.stack.mean.set_value(model.stack.mean[...] + 1)
    for wrong in (None, 0, 1):
        kept = nnx.clone(model)
        if wrong is not None:
            kept.norms[wrong].mean.set_value(jnp.zeros(4))
            kept.norms[wrong].var.set_value(jnp.ones(4))
        before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(kept, (nnx.Param, nnx.BatchStat))))
        for found in (
            nnx_health(kept),
            nnx_health(kept, X),
            nnx_health(kept, {"x": X}, lambda model, b: model(b["x"])),
        ):
            assert [layer.path for layer in found] == ["norms/0", "norms/1", "stack"]
            assert [layer.untouched for layer in found] == [wrong == 0, wrong == 1, False]
            assert found[2].channels == 12
            assert found[2].batch is None
        found = nnx_health(kept, X)
        assert found[0].batch is not None
        assert bool(found[0].problems) == (wrong == 0)
        # The model is as it was, and in training.
        after = nnx.to_pure_dict(nnx.state(kept, (nnx.Param, nnx.BatchStat)))
        jax.tree.map(np.testing.assert_array_equal, after, before)
        assert type(kept.norms[0]) is norm
        assert not kept.norms[0].use_running_average


def test_options_of_our_layers():
    """A residual and an activation stay inside; a count is read; a frozen layer is not compared."""
    rngs = nnx.Rngs(0)
    norm = jaxbn.nnx.BatchNorm(4, activation=jax.nn.relu, momentum=jaxbn.cumulative_average, rngs=rngs)
    norm(X)
    (found,) = nnx_health(norm, X, lambda model, x: model(x, residual=100 * x, mask=x[:, :1] > 0))
    assert found.batch is not None
    assert found.updates == 1
    assert found.batch.examples == np.sum(X[:, 0] > 0)
    (plain,) = nnx_health(norm, X)
    assert plain.batch is not None
    assert plain.batch.output < 1e-5
    norm.frozen = True
    assert nnx_health(norm, X)[0].batch is None
    layer = jaxbn.linen.BatchNorm(use_running_average=True, activation=jnp.tanh, frozen=True)
    assert linen_health(layer.init(KEY, X), layer.apply, X)[0].batch is None


def test_layers_come_in_the_order_of_the_calls():
    """Linen sorts variables by name, nnx modules by attribute; a layer that is not called comes last."""

    class Named(nn.Module):
        @nn.compact
        def __call__(self, x):
            for name in ("zeta", "alpha", "mid"):
                layer = jaxbn.linen.BatchNorm(use_running_average=True, name=name)
                x = x if name == "mid" and not self.is_initializing() else layer(x)
            return x

    variables = Named().init(KEY, X)
    assert [layer.path for layer in linen_health(variables, Named().apply, X)] == ["zeta", "alpha", "mid"]
    norms = nnx.Dict({name: jaxbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0)) for name in ("alpha", "mid", "zeta")})
    found = nnx_health(norms, X, lambda norms, x: norms["alpha"](norms["zeta"](x)))
    assert [layer.path for layer in found] == ["zeta", "alpha", "mid"]
