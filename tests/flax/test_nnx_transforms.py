"""Compare the nnx module with flax's under transformations, and over several calls."""

from functools import partial
from typing import Any

import chex
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beside_flax import TWO, X, close, make, stats
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx

BatchNorm: Any = jaxbn.nnx.BatchNorm
pytestmark = pytest.mark.usefixtures("ordinary_promotion")


NORMAL = nnx.initializers.normal()


@pytest.mark.parametrize("where", ["attribute", "call"])
def test_a_traced_flag_compiles_once(where):
    traces = []

    @nnx.jit
    def f(layer, flag):
        traces.append(1)
        if where == "attribute":
            return nnx.view(layer, use_running_average=flag)(X)
        return layer(X, flag)

    ours = make(momentum=0.5)
    for flag in (True, False):
        plain = make(momentum=0.5)
        close((f(ours, jnp.array(flag)), stats(ours)), (plain(X, flag), stats(plain)))
    assert len(traces) == 1


def test_one_compilation_for_many_steps():
    """The graph is the same after a step: nothing is traced again."""
    step: Any = nnx.jit(chex.assert_max_traces(lambda layer, x: layer(x), n=1))
    layer = make(momentum=jaxbn.zero_debiased(0.9), activation=jax.nn.relu)
    for x in TWO:
        step(layer, x)
    assert layer.count[...] == 2


def jitted(make):
    """Twice, so that the second call uses the update of the first (google/flax#4760)."""
    layer, step = make(), nnx.jit(lambda layer, x: layer(x))
    return layer, [step(layer, x) for x in TWO]


def per_example(make):
    """Examples one by one, statistics over the named axis; called twice (google/flax#4760)."""
    layer = make(axis_name="batch")
    step = nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 0), axis_name="batch")
    return layer, [step(layer, x) for x in TWO]


def ensemble(make):
    """Independent members, made and applied under `nnx.vmap`, twice."""
    members = nnx.vmap(lambda key: make(rngs=nnx.Rngs(key), scale_init=NORMAL))(jax.random.split(jax.random.key(0), 2))
    step = nnx.jit(nnx.vmap(lambda layer, x: layer(x)))
    return members, [step(members, TWO), step(members, TWO + 1)]


def layers(make):
    """Scan over layers with their own statistics."""
    stack = nnx.vmap(lambda key: make(rngs=nnx.Rngs(key)))(jax.random.split(jax.random.key(0), 2))
    return stack, nnx.scan(lambda x, layer: layer(x + 1), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(X, stack)


def carried(make):
    """Scan over time with one layer in the carry (google/flax#2052)."""
    layer = make()

    def body(layer, x):
        return layer, layer(x)

    carry = nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    return carry(layer, TWO)


def rematerialized(make):
    """Take the gradient of a rematerialized layer: one update."""
    layer = make(scale_init=NORMAL)
    loss = nnx.remat(lambda layer, x: jnp.sum(jnp.sin(layer(x))))
    return layer, nnx.to_pure_dict(nnx.grad(loss)(layer, X))


def functional(make):
    """Cross the bridge to pure functions: split outside, merge inside."""
    layer = make()
    graph, params, state = nnx.split(layer, nnx.Param, nnx.BatchStat)

    @jax.jit
    def step(params, state, x):
        layer = nnx.merge(graph, params, state)
        y = layer(x)
        return y, nnx.state(layer, nnx.BatchStat)

    y, state = step(params, state, X)
    nnx.update(layer, state)
    return layer, y


def cloned(make):
    """Train a copy by itself."""
    layer = make()
    copy = nnx.clone(layer)
    return copy, [copy(X), layer(X, True)]


CASES = [jitted, per_example, ensemble, layers, carried, rematerialized, functional, cloned]


@pytest.mark.parametrize("case", CASES, ids=lambda f: f.__name__)
def test_transformed_by_nnx(case):
    (theirs, y0), (ours, y) = (case(partial(make, norm)) for norm in (nnx.BatchNorm, BatchNorm))
    assert np.abs(stats(ours)["mean"]).min() > 0
    close((y, stats(ours)), (y0, stats(theirs)), 1e-5)


def test_eval_shape():
    """google/flax#4734: abstract modules, their abstract training, and the restoring of a checkpoint into one."""

    def create():
        return nnx.List([make(momentum=jaxbn.cumulative_average)])

    abstract: Any = nnx.eval_shape(create)
    assert abstract[0].mean.get_value() == jax.ShapeDtypeStruct((3,), jnp.float32)
    assert nnx.eval_shape(lambda model, x: model[0](x), abstract, X).shape == X.shape
    trained: Any = create()
    trained[0](X)
    restored: Any = nnx.merge(nnx.graphdef(abstract), nnx.state(trained))
    close(restored[0](X, True), trained[0](X, True), 0)


def test_bridges_to_linen():
    """The nnx layer as a linen module and the linen one as an nnx module have flax's names."""
    as_linen = nnx.bridge.ToLinen(BatchNorm, args=(3,))
    variables = as_linen.init(jax.random.key(0), X)
    wanted = {"params": {"scale": (3,), "bias": (3,)}, "batch_stats": {"mean": (3,), "var": (3,)}}
    assert jax.tree.map(jnp.shape, flax.linen.unbox({c: variables[c] for c in wanted})) == wanted
    as_nnx: Any = nnx.bridge.ToNNX(jaxbn.linen.BatchNorm(use_running_average=False, momentum=0.0), rngs=nnx.Rngs(0))
    as_nnx.lazy_init(X)
    as_nnx(X, mutable=["batch_stats"])
    np.testing.assert_allclose(as_nnx.mean[...], X.mean(0), atol=1e-6)


def test_gradients_reach_parameters_only():
    """The statistics are no `nnx.Param`: there is no gradient of them, nor of an integer count."""
    layer = make(momentum=jaxbn.zero_debiased(0.9))
    grads = nnx.grad(lambda layer: jnp.sum(layer(X) ** 3))(layer)
    assert set(grads) == {"scale", "bias"}
    assert layer.count[...] == 1


def test_a_layer_in_two_places_updates_twice():
    layer = make(momentum=jaxbn.cumulative_average)
    model = nnx.Sequential(layer, lambda x: 3 * x, layer)
    nnx.jit(lambda model, x: model(x))(model, X)
    assert layer.count[...] == 2


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows):
    """One value a feature gives the bias (pytorch/pytorch#4534), none leaves the statistics alone."""
    layer = make(bias_init=nnx.initializers.ones)
    np.testing.assert_array_equal(layer(X[:rows]), np.ones((rows, 3)))
    np.testing.assert_allclose(layer.mean[...], 0.01 * X[:1].sum(0) * rows, atol=1e-7)


def test_slow_averages_move_in_bfloat16():
    """google-deepmind/dm-haiku#396: 0.999 is 1 in bfloat16, but the average is float32."""
    layer = make(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, momentum=0.999)
    layer((X + 4).astype(jnp.bfloat16))
    np.testing.assert_allclose(layer.mean[...], 0.001 * (X + 4).mean(0), rtol=1e-2)


def test_batches_that_are_not_finite_stay_out():
    """pytorch/pytorch#90342: one overflow in mixed precision poisons a running average for good."""
    layer = make()
    x = X.copy()
    x[0] = [np.inf, np.nan, 1.0]
    layer(x)
    mean = 0.01 * x[:, 2].mean()
    np.testing.assert_allclose(layer.mean[...], [0, 0, mean], atol=1e-7)
