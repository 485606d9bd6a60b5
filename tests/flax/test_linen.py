"""The linen module: flax's fields, variables and life cycle around `bn_apply`, flax's own layer beside ours."""

import dataclasses
import inspect
from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from flax.errors import ModifyScopeVariableError

import jaxbn
import jaxbn.linen

# Whatever `mutable` makes them return.
BatchNorm: Any = jaxbn.linen.BatchNorm
KEY: Any = jax.random.key(0)
X = np.asarray(np.random.default_rng(0).normal(size=(8, 3)), np.float32)
TWO = np.stack([X, 2 * X + 1])
STATS = ["batch_stats"]
BOTH = pytest.mark.parametrize("norm", [nn.BatchNorm, BatchNorm], ids=["flax", "ours"])

# flax's layer needs JAX's usual promotion; ours must not (`test_strict_promotion_is_enough`).
pytestmark = pytest.mark.usefixtures("ordinary_promotion")


def close(got, wanted, tolerance=3e-6):
    chex.assert_trees_all_equal_shapes_and_dtypes(got, wanted)
    chex.assert_trees_all_close(got, wanted, rtol=tolerance, atol=tolerance)


def test_fields_are_flax_s_and_then_ours():
    def fields(norm):
        return {f.name: f.default for f in dataclasses.fields(norm) if f.name not in ("parent", "name")}

    theirs, ours = fields(nn.BatchNorm), fields(BatchNorm)
    assert list(ours)[: len(theirs)] == list(theirs)
    assert {name: ours[name] for name in theirs} == theirs
    variants = {"ghost_batches", "renorm", "num_domains", "example_weight"}
    rest = {"unbiased_running_var", "activation", "frozen", "mean_init", "var_init"}
    assert set(ours) - set(theirs) == rest | variants
    call = list(inspect.signature(nn.BatchNorm.__call__).parameters.values())
    mine = list(inspect.signature(BatchNorm.__call__).parameters.values())
    assert [(p.name, p.kind, p.default) for p in mine[: len(call)]] == [(p.name, p.kind, p.default) for p in call]


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({}, (8, 3)),
        ({"momentum": 0.5, "epsilon": 0.1, "use_fast_variance": False}, (8, 3)),
        ({"use_bias": False, "scale_init": nn.initializers.normal()}, (8, 3)),
        ({"use_scale": False, "use_bias": False, "dtype": jnp.bfloat16}, (8, 3)),
        ({"axis": (1, -1), "bias_init": nn.initializers.normal(), "scale_init": nn.initializers.normal()}, (4, 2, 3)),
        ({"axis": 1}, (2, 3, 4)),
        ({"axis": (2, 0)}, (2, 4, 3)),  # flax orders features as x does, not as `axis`
    ],
    ids=["defaults", "numbers", "no bias", "no affine, bfloat16", "two axes", "channels first", "unsorted axes"],
)
def test_variables_output_and_update_are_flax_s(fields, shape):
    """The same key gives the same variables, flax's checkpoint loads, and a step of training agrees."""
    x = np.asarray(np.random.default_rng(1).normal(1, 2, size=shape), np.float32)
    theirs, ours = nn.BatchNorm(**fields), BatchNorm(**fields)
    saved = theirs.init(KEY, x, use_running_average=False)
    chex.assert_trees_all_equal(ours.init(KEY, x, use_running_average=False), saved)
    saved["batch_stats"] = jax.tree.map(lambda v: v + 0.5, saved["batch_stats"])
    for evaluate in (False, True):
        kwargs = {"use_running_average": evaluate, "mutable": STATS}
        tolerance = 1e-2 if fields.get("dtype") == jnp.bfloat16 else 3e-6
        close(ours.apply(saved, x, **kwargs), theirs.apply(saved, x, **kwargs), tolerance)


@BOTH
def test_checkpoints_load_both_ways(norm):
    """By name, through flax's own bytes."""
    other = {nn.BatchNorm: BatchNorm, BatchNorm: nn.BatchNorm}[norm]
    layer = norm(use_running_average=False)
    variables = layer.init(KEY, X)
    variables = {**variables, **layer.apply(variables, X, mutable=STATS)[1]}
    blank = other(use_running_average=False).init(KEY, X)
    loaded = serialization.from_bytes(blank, serialization.to_bytes(variables))
    close(other(use_running_average=True).apply(loaded, X), norm(use_running_average=True).apply(variables, X))


@pytest.mark.parametrize("x_dtype", [jnp.bfloat16, jnp.float32, jnp.int32])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize(
    "fields", [{}, {"param_dtype": jnp.bfloat16, "force_float32_reductions": False}], ids=["wide", "narrow"]
)
def test_dtypes_are_flax_s(x_dtype, dtype, fields):
    x = (4 * X).astype(x_dtype)
    kwargs: dict[str, Any] = {"use_running_average": False, "dtype": dtype, **fields}
    theirs, ours = nn.BatchNorm(**kwargs), BatchNorm(**kwargs)
    variables = theirs.init(KEY, x)
    chex.assert_trees_all_equal_shapes_and_dtypes(ours.init(KEY, x), variables)
    wanted, _ = theirs.apply(variables, x, mutable=STATS)
    y, update = ours.apply(variables, x, mutable=STATS)
    assert y.dtype == wanted.dtype
    np.testing.assert_allclose(np.float32(y), np.float32(wanted), atol=4e-2)
    # Ours stay what they were at init; flax's narrow statistics may change their dtype with the first update.
    chex.assert_trees_all_equal_dtypes(update["batch_stats"], variables["batch_stats"])


def test_strict_promotion_is_enough():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        layer = BatchNorm(use_running_average=False, param_dtype=jnp.bfloat16, momentum=jaxbn.cumulative_average)
        y, variables = layer.init_with_output(KEY, X)
        assert y.dtype == jnp.float32
        assert layer.apply(variables, X, mutable=STATS)[1]["batch_stats"]["count"] == 1


@BOTH
def test_the_flag_is_needed_once(norm):
    for layer, kwargs in [(norm(), {}), (norm(use_running_average=True), {"use_running_average": True})]:
        with pytest.raises(ValueError, match="use_running_average"):
            layer.init(KEY, X, **kwargs)


@BOTH
def test_initialization_neither_updates_nor_needs_axis_names(norm):
    """google/flax#2606: the name is bound only where the model is trained."""
    variables = norm(use_running_average=False, axis_name="data").init(KEY, X + 5)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], np.zeros(3))
    np.testing.assert_array_equal(variables["batch_stats"]["var"], np.ones(3))
    assert jax.tree.map(jnp.shape, variables) == {c: {k: (3,) for k in variables[c]} for c in variables}


def test_groups_need_no_axis_name_at_init_or_in_evaluation():
    layer = BatchNorm(axis_name="data", axis_index_groups=[[0], [1]])
    variables = layer.init(KEY, X, use_running_average=False)
    assert layer.apply(variables, X, use_running_average=True).shape == X.shape


def test_training_without_mutable_statistics():
    """As flax's; by the batch's statistics without an update (tensorflow/tensorflow#29480) only if the call says so."""
    layer = BatchNorm(use_running_average=False)
    variables = layer.init(KEY, X)
    close(layer.apply(variables, X, update=False), layer.apply(variables, X, mutable=STATS)[0], 0)
    for refusing in (layer, nn.BatchNorm(use_running_average=False)):
        with pytest.raises(ModifyScopeVariableError):
            refusing.apply(variables, X)


def test_count_is_there_for_schedules_only():
    layer = BatchNorm(use_running_average=False, momentum=jaxbn.cumulative_average)
    variables = layer.init(KEY, X)
    assert set(variables["batch_stats"]) == {"mean", "var", "count"}
    stats = variables["batch_stats"]
    for x in TWO:
        stats = layer.apply({**variables, "batch_stats": stats}, x, mutable=STATS)[1]["batch_stats"]
    np.testing.assert_allclose(stats["mean"], TWO.mean((0, 1)), atol=1e-6)
    assert stats["count"] == 2


@pytest.mark.parametrize("flag", ["attribute", "call"])
def test_a_traced_flag_compiles_once(flag):
    """Also where it is an attribute: both modes in one program."""
    variables = BatchNorm(use_running_average=True).init(KEY, X)

    def f(evaluate):
        where = [{"use_running_average": evaluate}, {}]
        init, call = where if flag == "attribute" else where[::-1]
        return BatchNorm(**init, momentum=0.5).apply(variables, X, **call, mutable=STATS)

    both: Any = jax.jit(f)
    for evaluate in (True, False):
        wanted = BatchNorm(momentum=0.5).apply(variables, X, use_running_average=evaluate, mutable=STATS)
        close(both(jnp.array(evaluate)), wanted)
    assert both._cache_size() == 1


def test_frozen_wins_over_training():
    layer = BatchNorm(use_running_average=False, frozen=True, momentum=jaxbn.cumulative_average, axis_name="data")
    variables = layer.init(KEY, X)
    y, update = layer.apply(variables, X, mutable=STATS)
    chex.assert_trees_all_equal(update["batch_stats"], variables["batch_stats"])
    close(y, BatchNorm(use_running_average=True, momentum=jaxbn.cumulative_average).apply(variables, X))


def test_arguments_reach_the_function():
    """Mask, residual, activation and the unbiased variance: the module adds nothing of its own."""
    mask = np.arange(8)[:, None] < 5
    kwargs = {"unbiased_running_var": True, "activation": jax.nn.relu, "momentum": 0.3, "epsilon": 0.01}
    layer = BatchNorm(use_running_average=False, **kwargs)
    variables = layer.init(KEY, X)
    y, update = layer.apply(variables, X, mask=mask, residual=X[::-1], mutable=STATS)
    wanted, state = jaxbn.bn_apply(*jaxbn.bn_init(3), X, True, mask=mask, residual=X[::-1], **kwargs)
    close((y, update["batch_stats"]), (wanted, {"mean": state.mean, "var": state.var}), 0)


def test_initializers_of_the_statistics():
    """matthias-wright/flaxmodels#15 forked the layer for this; metadata of sharding comes along and stays."""
    boxed = nn.with_partitioning(nn.initializers.constant(2.0), ("model",))
    layer = BatchNorm(use_running_average=False, mean_init=boxed, var_init=nn.initializers.constant(4.0))
    variables = layer.init(KEY, X)
    _, update = layer.apply(variables, X, mutable=STATS)
    assert nn.get_partition_spec(update)["batch_stats"] == {"mean": jax.P("model"), "var": jax.P()}
    y = layer.apply(variables, X, mutable=STATS)[0]
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-6)
    y = layer.clone(use_running_average=True).apply(variables, X)
    np.testing.assert_allclose(y, (X - 2) / np.sqrt(4 + 1e-5), atol=1e-6)


def test_random_initializers_of_the_statistics():
    layer = BatchNorm(use_running_average=True, mean_init=nn.initializers.normal())
    stats = layer.init(KEY, X)["batch_stats"]
    assert len(set(np.asarray(stats["mean"]).tolist())) == 3


@BOTH
def test_bind_and_tabulate(norm):
    layer = norm(use_running_average=False)
    bound = layer.bind(layer.init(KEY, X), mutable=STATS)
    y = bound(X)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(bound.variables["batch_stats"]["mean"], 0.01 * X.mean(0), atol=1e-7)
    assert "batch_stats" in layer.tabulate(KEY, X)


class Twice(nn.Module):
    """One layer in two places."""

    norm: type

    @nn.compact
    def __call__(self, x):
        """It normalizes twice."""
        layer = self.norm(use_running_average=False, name="bn", momentum=0.5)
        return layer(3 * layer(x))


def test_a_layer_called_twice_updates_twice():
    variables = Twice(nn.BatchNorm).init(KEY, X)
    close(
        Twice(BatchNorm).apply(variables, X, mutable=STATS),
        Twice(nn.BatchNorm).apply(variables, X, mutable=STATS),
    )


def test_dtypes_of_eager_and_abstract_initialization_agree():
    layer = BatchNorm(use_running_average=False, momentum=jaxbn.zero_debiased(0.9), axis_name="data")
    shapes = jax.eval_shape(layer.init, KEY, X)
    chex.assert_trees_all_equal_shapes_and_dtypes(layer.init(KEY, X), shapes)


# Transformations: each is a function of the class, tried with flax's layer and with ours on the same variables.


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
    """The train flag as a static argument (google/flax#3946)."""
    return nn.remat(norm, static_argnums=(2,))(momentum=0.5), (X, False)


class Step(nn.Module):
    """A body for `nn.scan`: what it scans over is normalized."""

    norm: type
    evaluate: bool = False

    @nn.compact
    def __call__(self, carry, x):
        """The carry goes through."""
        return carry, self.norm(use_running_average=self.evaluate, momentum=0.5, name="bn")(x)


def layers(norm):
    """A scan over layers, each with its own statistics."""
    lifted = nn.scan(Step, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})
    return lifted(norm), (0.0, TWO)


@pytest.mark.parametrize("case", [ensemble, per_example, nested, rematerialized, layers], ids=lambda f: f.__name__)
def test_transformed_by_flax(case):
    theirs, args = case(nn.BatchNorm)
    ours, _ = case(BatchNorm)
    variables = theirs.init(KEY, *args)

    @partial(jax.jit, static_argnums=0)
    def step(layer, variables):
        def loss(variables):
            y, update = layer.apply(variables, *args, mutable=STATS)
            return sum(jnp.sum(jnp.sin(v)) for v in jax.tree.leaves(y)), (y, update)

        return jax.grad(loss, has_aux=True)(variables)

    # Our state has no gradient and our wrapper's name differs; everything else is flax's.
    (grads, aux), (grads0, aux0) = step(ours, variables), step(theirs, variables)
    close((grads["params"], aux), (grads0["params"], aux0), 1e-5)
    assert jax.tree.structure(ours.init(KEY, *args)) == jax.tree.structure(variables)


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
    """google/flax#3602: what a scan carries must be mutable, in evaluation too; it is left as it is then.

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
    """What comparisons of NumPy numbers give; in evaluation no axis name is needed."""
    layer = BatchNorm(axis_name="data")
    variables = layer.init(KEY, X, use_running_average=np.True_)
    assert layer.apply(variables, X, use_running_average=np.True_).shape == X.shape
