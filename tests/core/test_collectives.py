"""Count the collectives of a layer in the optimized program, beside flax's layer."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from params import param
from ways import AXIS, NAMED, SHARDED, Way

import jaxbn
from experiments.benchmark import collectives
from experiments.compiled.counting import count_collectives

pytestmark = pytest.mark.compiler

# `vmap(axis_name=)` has members but no devices, and so nothing to count.
SEVERAL = [way for way in NAMED if way.name != "vmap"]
each_named_way = pytest.mark.parametrize("way", SEVERAL, ids=lambda way: way.name)
each_way = pytest.mark.parametrize("way", SEVERAL + SHARDED, ids=lambda way: way.name)
masked = pytest.mark.parametrize(
    "masked", [param(False, quick=False, id="plain"), param(True, quick=True, id="masked")]
)


def ours(params, state, x, train, mask, way: Way, **options):
    """One layer with its activation."""
    return jaxbn.bn_apply(
        params, state, x, train, mask=mask, axis_name=way.axis_name, activation=jax.nn.relu, **options
    )


def flax_layer(params, state, x, train, mask, way: Way, use_fast_variance=True):
    """Apply `flax.linen.BatchNorm` in the same way."""
    layer = nn.BatchNorm(not train, axis_name=way.axis_name, use_fast_variance=use_fast_variance)
    variables = {"params": params._asdict(), "batch_stats": {"mean": state.mean, "var": state.var}}
    y, new = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
    return nn.relu(y), new["batch_stats"]


def forward(layer, way: Way, train: bool):
    """Return a member function: output and new state."""

    def member(whole, parts):
        return layer(whole["params"], whole["state"], parts["x"], train, parts.get("mask"), way)

    return member


def training_step(layer, way: Way, first: bool = False):
    """Return a member function: value, state and gradients, also of a network's first layer, whose x needs none."""

    def member(whole, parts):
        def loss(params, x):
            y, new = layer(params, whole["state"], x, True, parts.get("mask"), way)
            return jnp.sum(y * y), (y, new)

        gradient = jax.grad(loss, argnums=(0,) if first else (0, 1), has_aux=True)
        (d_params, *d_x), (y, new) = gradient(whole["params"], parts["x"])
        return [y, *d_x], (new, way.total(d_params))

    return member


def count(way: Way, member, masked: bool = False) -> int:
    """Return the collectives of `member` in every step, which are all sums; one more may be in the rare pass."""
    params, state = jaxbn.bn_init(4)
    x = np.random.default_rng(0).standard_normal((32, 4)).astype(np.float32)
    parts = {"x": x} | ({"mask": x[:, :1] > 0} if masked else {})
    text = way.compiled_text(member, {"params": params, "state": state}, parts)
    always, every = collectives.count(text), count_collectives(text)
    assert set(every) <= {"all-reduce"}, every
    assert sum(sent.number for sent in every.values()) <= always + 1
    return always


def of_running_mean(way: Way) -> int:
    """One more, of the running means: where types do not say that all devices hold the same, it is made so."""
    return int(way.name in ("shard_map-unchecked", "pmap"))


@pytest.mark.parametrize(("first", "masked"), [(False, True), (True, False)], ids=["inner-masked", "first-plain"])
@each_way
def test_training_step_takes_two(way, first, masked):
    """One forward, one backward: the latter also carries the gradients of the parameters to their sum."""
    assert count(way, training_step(ours, way, first), masked) == 2 + of_running_mean(way)


@each_named_way
def test_groups_take_two_forward_and_one_backward(way):
    """The mean comes first: groups can't share a loop. The parameters' gradients are a sum of their own."""
    layer = partial(ours, axis_index_groups=[[0, 1, 2], [3, 4, 5, 6, 7]])
    whole_step = training_step(layer, way)

    def member(whole, parts):
        own, (new, d_params) = whole_step(whole, parts)
        return [*own, jax.tree.map(lambda v: v[None], new)], d_params

    assert count(way, member) <= 4
    assert count(way, lambda whole, parts: (member(whole, parts)[0], ())) == 3


@masked
@each_way
def test_forward_takes_one(way, masked):
    """Counts, means and variances travel together."""
    assert count(way, forward(ours, way, train=True), masked) == 1 + of_running_mean(way)


@each_way
def test_evaluation_takes_none(way):
    """The statistics are at hand on every device."""
    assert count(way, forward(ours, way, train=False)) == 0


@each_named_way
def test_instrument(way):
    """Flax's layer through the same instrument: its fast variance takes two in all, its stable one more than ours."""
    assert count(way, forward(flax_layer, way, train=True)) == 1
    assert count(way, forward(partial(flax_layer, use_fast_variance=False), way, train=True)) == 2
    assert count(way, training_step(flax_layer, way)) >= 2
    assert count(way, training_step(partial(flax_layer, use_fast_variance=False), way)) > 2


@each_named_way
def test_instrument_sees_every_operation(way):
    """A program with one of each kind."""

    def member(whole, parts):
        x = parts["x"]
        ring = [(i, (i + 1) % 8) for i in range(8)]
        gathered = lax.all_gather(x, AXIS)
        moved = lax.ppermute(x, AXIS, ring)
        exchanged = lax.all_to_all(jnp.sin(gathered), AXIS, 0, 0)
        scattered = lax.psum_scatter(jnp.cos(gathered), AXIS)
        return [moved, exchanged, scattered], lax.psum(x, AXIS)

    text = way.compiled_text(member, {"none": np.zeros(1)}, {"x": np.ones((8, 4), np.float32)})
    operations = ("all-reduce", "all-gather", "collective-permute", "all-to-all", "reduce-scatter")
    assert {kind: sent.number for kind, sent in count_collectives(text).items()} == dict.fromkeys(operations, 1)
    assert collectives.count(text) == len(operations)
