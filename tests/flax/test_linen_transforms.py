"""Compare the linen module with flax's under transformations, and over several calls."""

from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beside_flax import KEY, STATS, TWO, X, close
from flax.errors import ModifyScopeVariableError

import jaxbn
import jaxbn.linen

BatchNorm: Any = jaxbn.linen.BatchNorm
BOTH = pytest.mark.parametrize("norm", [nn.BatchNorm, BatchNorm], ids=["flax", "ours"])
pytestmark = pytest.mark.usefixtures("ordinary_promotion")


@pytest.mark.parametrize("flag", ["attribute", "call"])
def test_a_traced_flag_compiles_once(flag):
    """Both modes are in one program, also where the flag is an attribute."""
    variables, traced = BatchNorm(use_running_average=True).init(KEY, X), []

    def f(evaluate):
        traced.append(flag)
        where = [{"use_running_average": evaluate}, {}]
        init, call = where if flag == "attribute" else where[::-1]
        return BatchNorm(**init, momentum=0.5).apply(variables, X, **call, mutable=STATS)

    both = jax.jit(f)
    for evaluate in (True, False):
        wanted = BatchNorm(momentum=0.5).apply(variables, X, use_running_average=evaluate, mutable=STATS)
        close(both(jnp.array(evaluate)), wanted)
    assert len(traced) == 1


class Twice(nn.Module):
    """One layer in two places."""

    norm: type

    @nn.compact
    def __call__(self, x):
        """Normalize twice."""
        layer = self.norm(use_running_average=False, name="bn", momentum=0.5)
        return layer(3 * layer(x))


def test_a_layer_called_twice_updates_twice():
    variables = Twice(nn.BatchNorm).init(KEY, X)
    close(
        Twice(BatchNorm).apply(variables, X, mutable=STATS),
        Twice(nn.BatchNorm).apply(variables, X, mutable=STATS),
    )


def ensemble(norm):
    """Independent members."""
    axes: Any = {"params": 0, "batch_stats": 0}
    return nn.vmap(norm, variable_axes=axes, split_rngs={"params": True})(use_running_average=False), (TWO,)


def per_example(norm):
    """Examples one by one, with statistics over them (google/flax#1247)."""
    axes: Any = {"params": None, "batch_stats": None}
    lifted = nn.vmap(norm, variable_axes=axes, split_rngs={"params": False}, axis_name="batch")
    return lifted(use_running_average=False, axis_name="batch"), (X,)


def nested(norm):
    """Two named axes (google/flax#3319)."""
    axes: Any = {"params": None, "batch_stats": None}
    for name in ("inner", "outer"):
        norm = nn.vmap(norm, variable_axes=axes, split_rngs={"params": False}, axis_name=name)
    return norm(use_running_average=False, axis_name=("inner", "outer")), (TWO,)


def rematerialized(norm):
    """Pass the train flag as a static argument (google/flax#3946)."""
    return nn.remat(norm, static_argnums=(2,))(momentum=0.5), (X, False)


class Step(nn.Module):
    """A body for `nn.scan` that normalizes the slices."""

    norm: type
    evaluate: bool = False

    @nn.compact
    def __call__(self, carry, x):
        """Pass the carry through."""
        return carry, self.norm(use_running_average=self.evaluate, momentum=0.5, name="bn")(x)


def layers(norm):
    """Scan over layers, each with its own statistics."""
    lifted = nn.scan(Step, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})
    return lifted(norm), (0.0, TWO)


@pytest.mark.parametrize("case", [ensemble, per_example, nested, rematerialized, layers], ids=lambda f: f.__name__)
def test_transformed_by_flax(case):
    theirs, args = case(nn.BatchNorm)
    ours, _ = case(BatchNorm)
    variables = jax.jit(lambda key: theirs.init(key, *args))(KEY)

    def step(layer, variables):
        def loss(variables):
            y, update = layer.apply(variables, *args, mutable=STATS)
            return sum(jnp.sum(jnp.sin(v)) for v in jax.tree.leaves(y)), (y, update)

        return jax.grad(loss, has_aux=True)(variables)

    # Our state has no gradient and our wrapper's name differs; everything else is flax's.
    (grads, aux), (grads0, aux0) = jax.jit(lambda variables: [step(v, variables) for v in (ours, theirs)])(variables)
    close((grads["params"], aux), (grads0["params"], aux0), 1e-5)
    assert jax.tree.structure(jax.eval_shape(lambda: ours.init(KEY, *args))) == jax.tree.structure(variables)


CARRIED = {"variable_broadcast": "params", "variable_carry": "batch_stats", "split_rngs": {"params": False}}


@BOTH
def test_statistics_carried_by_a_scan(norm):
    """google/flax#2052: a recurrent cell's running statistics, updated once a step."""
    variables = Step(norm).init(KEY, 0.0, X)
    _, update = nn.scan(Step, **CARRIED)(norm).apply(variables, 0.0, TWO, mutable=STATS)
    one_by_one = variables
    for x in TWO:
        one_by_one = {**variables, **Step(norm).apply(one_by_one, 0.0, x, mutable=STATS)[1]}
    close(update["batch_stats"], one_by_one["batch_stats"])


def test_evaluation_inside_a_scan():
    """google/flax#3602: carried variables must be mutable, in evaluation too, which leaves them as they are.

    Broadcast statistics need not be mutable.
    """
    variables = Step(BatchNorm).init(KEY, 0.0, X)
    (_, y), update = nn.scan(Step, **CARRIED)(BatchNorm, evaluate=True).apply(variables, 0.0, TWO, mutable=STATS)
    chex.assert_trees_all_equal(update["batch_stats"], variables["batch_stats"])
    fixed = nn.scan(Step, variable_broadcast=["params", "batch_stats"], split_rngs={"params": False})
    close(fixed(BatchNorm, evaluate=True).apply(variables, 0.0, TWO)[1], y, 0)
    with pytest.raises(ModifyScopeVariableError):
        fixed(BatchNorm).apply(variables, 0.0, TWO)


def test_rematerialization_with_a_traced_flag():
    """google/flax#3946 without static arguments, and one update only."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.remat(BatchNorm)(momentum=jaxbn.cumulative_average, name="bn")(x, jnp.logical_not(train))

    model = Model()
    variables = model.init(KEY, X, True)

    @jax.jit
    def step(params, train):
        y, update = model.apply({**variables, "params": params}, X, train, mutable=STATS)
        return jnp.sum(y), update

    for train in (True, False):
        _, update = jax.grad(step, has_aux=True)(variables["params"], train)
        assert update["batch_stats"]["bn"]["count"] == int(train)


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows):
    """One value a feature gives the bias (pytorch/pytorch#4534), none leaves the statistics alone."""
    layer = BatchNorm(use_running_average=False, bias_init=nn.initializers.ones)
    variables = layer.init(KEY, X)
    y, update = layer.apply(variables, X[:rows], mutable=STATS)
    np.testing.assert_array_equal(y, np.ones((rows, 3)))
    np.testing.assert_allclose(update["batch_stats"]["mean"], 0.01 * X[:1].sum(0) * rows, atol=1e-7)


def test_masks_of_different_sizes_are_weighted():
    """google/flax#2417: flax averages the members' means, and a member without values makes all of them NaN."""
    mask = np.ones((2, 8, 1), bool)
    mask[1] = False
    mask[0, 5:] = False
    layer = BatchNorm(use_running_average=False, momentum=0.0, axis_name="data")
    variables = layer.init(KEY, X)

    def run(layer) -> Any:
        member = partial(layer.apply, variables, mutable=STATS)
        return jax.vmap(lambda x, mask: member(x, mask=mask), axis_name="data")(TWO, mask)[1]["batch_stats"]

    np.testing.assert_allclose(run(layer)["mean"], np.stack([X[:5].mean(0)] * 2), atol=1e-6)
    assert np.isnan(run(nn.BatchNorm(use_running_average=False, momentum=0.0, axis_name="data"))["mean"]).all()


def test_a_numpy_bool_is_a_bool():
    """Take the results of NumPy comparisons; in evaluation no axis name is needed."""
    layer = BatchNorm(axis_name="data")
    variables = layer.init(KEY, X, use_running_average=np.True_)
    assert layer.apply(variables, X, use_running_average=np.True_).shape == X.shape
