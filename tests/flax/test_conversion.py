"""Convert the batch normalizations of a model."""

from functools import partial
from typing import Any

import chex
import flax.core
import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx
from small_models import KEY, STATS, Deep, Net, X

import jaxbn
import jaxbn.linen
import jaxbn.nnx

pytestmark = pytest.mark.usefixtures("ordinary_promotion")


def norms(model) -> list[Any]:
    """Its batch normalizations, each once."""
    kinds = (jaxbn.nnx.BatchNorm, nnx.BatchNorm)
    return [module for _, module in nnx.iter_modules(model) if isinstance(module, kinds)]


def test_conversion_keeps_weights_statistics_and_sharing():
    model = Deep()
    model(X)
    before = nnx.to_pure_dict(nnx.state(model))
    ours = jaxbn.nnx.convert(model)
    assert {type(m) for m in norms(ours)} == {jaxbn.nnx.BatchNorm}
    assert {type(m) for m in norms(model)} == {nnx.BatchNorm}
    assert ours.alpha is ours.zeta["inner"][1]
    assert ours.tied.scale is ours.alpha.scale is model.alpha.scale
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(ours)), before)
    back = jaxbn.nnx.convert(ours, to=nnx.BatchNorm)
    assert {type(m) for m in norms(back)} == {nnx.BatchNorm}
    assert nnx.graphdef(back) == nnx.graphdef(model)
    # Copies, because the three models hold the same variables.
    y = nnx.clone(model)(X)
    np.testing.assert_allclose(nnx.clone(ours)(X), y, atol=1e-5)
    np.testing.assert_array_equal(nnx.clone(back)(X), y)


def test_conversion_sets_attributes():
    """Axis name, momentum, freezing and unfreezing in one call each."""
    model = jaxbn.nnx.convert(Deep(), axis_name="data", momentum=jaxbn.cumulative_average, frozen=True, epsilon=1e-3)
    for norm in norms(model):
        assert (norm.axis_name, norm.momentum, norm.epsilon) == ("data", jaxbn.cumulative_average, 1e-3)
    model.train()
    frozen = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    model(X)
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)), frozen)
    thawed = jaxbn.nnx.convert(model, frozen=False, axis_name=None)
    thawed(X)
    assert [int(norm.count[...]) for norm in (thawed.alpha, thawed.tied)] == [2, 1]
    assert [norm.count for norm in norms(jaxbn.nnx.convert(thawed, momentum=0.9))] == [None] * 3


@pytest.mark.parametrize("options", [{}, {"num_domains": 2}])
def test_a_stack_of_layers_that_gets_a_schedule_counts_each(options):
    stack = nnx.vmap(lambda rngs: jaxbn.nnx.BatchNorm(3, **options, rngs=rngs))(nnx.Rngs(0).split(2))
    counting = jaxbn.nnx.convert(stack, momentum=jaxbn.cumulative_average)
    call = {"domain": 1} if options else {}
    nnx.vmap(lambda layer, x: layer(x, **call), in_axes=(0, None))(counting, np.ones((4, 3), np.float32))
    np.testing.assert_array_equal(counting.count[...], [[0, 1], [0, 1]] if options else [1, 1])


def test_conversion_of_containers_and_of_a_layer():
    def layer():
        return nnx.BatchNorm(2, rngs=nnx.Rngs(0))

    assert type(jaxbn.nnx.convert(layer())) is jaxbn.nnx.BatchNorm
    listed: list[Any] = [layer(), {"deep": [layer()]}]
    converted = jaxbn.nnx.convert(listed)
    assert type(converted[0]) is type(converted[1]["deep"][0]) is jaxbn.nnx.BatchNorm
    assert type(listed[0]) is type(listed[1]["deep"][0]) is nnx.BatchNorm
    with pytest.warns(UserWarning, match="`model` has none"):
        assert jaxbn.nnx.convert([nnx.Linear(2, 3, rngs=nnx.Rngs(0))])[0].kernel.shape == (2, 3)


def test_conversion_names_the_subclasses_that_it_leaves():
    class Scaled(nnx.BatchNorm):
        """A layer that may compute something else."""

    layers = nnx.List([Scaled(3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0))])
    with pytest.warns(UserWarning, match="`model` has subclasses too, which stay: Scaled"):
        assert [type(layer) for layer in jaxbn.nnx.convert(layers)] == [Scaled, jaxbn.nnx.BatchNorm]


@pytest.mark.parametrize("base", [nnx.BatchNorm, jaxbn.nnx.BatchNorm])
def test_conversion_to_a_subclass_is_refused(base):
    """It would lose an activation silently, and make a layer that may want other arguments."""
    own = type("Own", (base,), {})
    layer = jaxbn.nnx.BatchNorm(3, activation=jax.nn.relu, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"`to` must be .*; got .*Own"):
        jaxbn.nnx.convert([layer], to=own)


def test_code_that_asks_for_the_class_of_flax_goes_on():
    """Such code passes the mode to batch normalizations alone."""
    layers = nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0))])

    def evaluate(layers, x):
        for layer in layers:
            x = layer(x, use_running_average=True) if isinstance(layer, nnx.BatchNorm) else layer(x)
        return x

    np.testing.assert_allclose(evaluate(jaxbn.nnx.convert(layers), X), evaluate(layers, X), atol=1e-5)
    assert isinstance(jaxbn.linen.BatchNorm(), nn.BatchNorm)


def test_conversion_names_unknown_attributes():
    for to, unknown in [(jaxbn.nnx.BatchNorm, "momentums"), (nnx.BatchNorm, "frozen")]:
        with pytest.raises(TypeError, match=unknown):
            jaxbn.nnx.convert(Deep(), to=to, **{unknown: True})


@pytest.mark.parametrize(
    "options",
    [
        {"unbiased_running_var": True},
        {"activation": jax.nn.relu},
        {"frozen": True},
        {"momentum": jaxbn.cumulative_average},
        {"num_features": (2, 3), "axis": (1, 2)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_going_back_loses_nothing_silently(options):
    layer = jaxbn.nnx.BatchNorm(**{"num_features": 2, "rngs": nnx.Rngs(0), **options})
    with pytest.raises(ValueError, match=next(iter(options))):
        jaxbn.nnx.convert([layer], to=nnx.BatchNorm)


def test_a_numpy_false_is_nothing_to_lose():
    layer = jaxbn.nnx.BatchNorm(2, frozen=np.False_, unbiased_running_var=np.False_, rngs=nnx.Rngs(0))  # type: ignore[arg-type]
    assert type(jaxbn.nnx.convert(layer, to=nnx.BatchNorm)) is nnx.BatchNorm


def test_conversion_refuses_changes_without_effect():
    """Initializers and metadata are not attributes of a layer that is there already."""
    with pytest.raises(TypeError, match="mean_init"):
        jaxbn.nnx.convert(Deep(), mean_init=nnx.initializers.ones)


def test_linen_conversion():
    """The class is the factory's; the variables are the same, but for the number of updates."""
    old = Net(norm=nn.BatchNorm)
    variables = old.init(KEY, X)
    same = jaxbn.linen.convert(variables)
    chex.assert_trees_all_equal(same, variables)
    assert same["params"]["bn"]["scale"] is variables["params"]["bn"]["scale"]
    evaluated: list[Any] = [Net().apply(same, X, train=False), old.apply(variables, X, train=False)]
    np.testing.assert_allclose(*evaluated, atol=1e-6)
    counting = Net(norm=partial(jaxbn.linen.BatchNorm, momentum=jaxbn.cumulative_average))
    counted = jaxbn.linen.convert(flax.core.freeze(variables), count=3)
    assert jax.tree.structure(counted) == jax.tree.structure(flax.core.freeze(counting.init(KEY, X)))
    assert counting.apply(counted, X, mutable=STATS)[1]["batch_stats"]["bn"]["count"] == 4
    chex.assert_trees_all_equal(jaxbn.linen.convert(counted), flax.core.freeze(variables))
    with pytest.raises(ValueError, match="batch_stats"):
        jaxbn.linen.convert({"params": variables["params"]})


def test_linen_conversion_of_stacked_layers_beside_others():
    """A number of updates for each layer, by its path."""

    class Block(nn.Module):
        norm: Any

        @nn.compact
        def __call__(self, x, _):
            return self.norm(use_running_average=False, name="bn")(x), None

    class Stacked(nn.Module):
        norm: Any

        @nn.compact
        def __call__(self, x):
            axes = {"params": 0, "batch_stats": 0}
            x, _ = nn.scan(Block, axes, split_rngs={"params": True}, length=2)(self.norm, name="blocks")(x, None)
            return self.norm(use_running_average=False, name="last")(x)

    ours = Stacked(partial(jaxbn.linen.BatchNorm, momentum=jaxbn.cumulative_average))
    counts = {"blocks/bn": [3, 5], "last": 4}
    counted = jaxbn.linen.convert(Stacked(nn.BatchNorm).init(KEY, X), count=counts.get)
    new = ours.apply(counted, X, mutable=STATS)[1]["batch_stats"]
    np.testing.assert_array_equal(new["blocks"]["bn"]["count"], [4, 6])
    assert new["last"]["count"] == 5


def test_a_layer_without_its_count_says_which_to_give():
    """`[domains]`, with which it goes on."""
    layers = [jaxbn.linen.BatchNorm(num_domains=2, momentum=m) for m in (0.9, jaxbn.cumulative_average)]
    call: dict[str, Any] = {"use_running_average": False, "domain": 1}
    variables = layers[0].init(KEY, X, **call)
    with pytest.raises(ValueError, match=r"convert\(variables, count=...\)`: an int, .* `\[domains\]` with"):
        layers[1].apply(variables, X, mutable=STATS, **call)
    counted = jaxbn.linen.convert(variables, count=[3, 4])
    new: Any = layers[1].apply(counted, X, mutable=STATS, **call)[1]
    np.testing.assert_array_equal(new["batch_stats"]["count"], [3, 5])
