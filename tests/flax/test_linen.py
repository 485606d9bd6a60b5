"""Compare the linen module with flax's: fields, variables and life cycle."""

import dataclasses
import inspect
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beside_flax import KEY, STATS, TWO, X, close
from flax import serialization
from flax.errors import ModifyScopeVariableError, ScopeParamShapeError
from params import named, pairs

import jaxbn
import jaxbn.linen

BatchNorm: Any = jaxbn.linen.BatchNorm
BOTH = pytest.mark.parametrize("norm", [nn.BatchNorm, BatchNorm], ids=["flax", "ours"])
pytestmark = pytest.mark.usefixtures("ordinary_promotion")


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
    """Leaves are found by name, through flax's own bytes."""
    other = {nn.BatchNorm: BatchNorm, BatchNorm: nn.BatchNorm}[norm]
    layer = norm(use_running_average=False)
    variables = layer.init(KEY, X)
    variables = {**variables, **layer.apply(variables, X, mutable=STATS)[1]}
    blank = other(use_running_average=False).init(KEY, X)
    loaded = serialization.from_bytes(blank, serialization.to_bytes(variables))
    close(other(use_running_average=True).apply(loaded, X), norm(use_running_average=True).apply(variables, X))


FIELDS = {"wide": {}, "narrow": {"param_dtype": jnp.bfloat16, "force_float32_reductions": False}}


@pairs("x_dtype, dtype, fields", named(jnp.bfloat16, jnp.float32, jnp.int32), named(None, jnp.bfloat16), FIELDS)
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
    """It is refused as in flax, unless the call asks for no update (tensorflow/tensorflow#29480)."""
    layer = BatchNorm(use_running_average=False)
    variables = layer.init(KEY, X)
    close(layer.apply(variables, X, update=False), layer.apply(variables, X, mutable=STATS)[0], 0)
    for refusing in (layer, nn.BatchNorm(use_running_average=False)):
        with pytest.raises(ModifyScopeVariableError):
            refusing.apply(variables, X)


@pytest.mark.parametrize("name", ["BatchNorm", "IterNorm"])
def test_a_wrong_width_is_flax_s_error(name):
    """It comes before ours, which a layer without scale and bias raises (`test_module_errors.py`)."""
    layer = getattr(jaxbn.linen, name)(use_running_average=True)
    with pytest.raises(ScopeParamShapeError, match=r"\(4,\)"):
        layer.apply(layer.init(KEY, X), np.ones((8, 4), np.float32))


def test_count_is_there_for_schedules_only():
    layer = BatchNorm(use_running_average=False, momentum=jaxbn.cumulative_average)
    variables = layer.init(KEY, X)
    assert set(variables["batch_stats"]) == {"mean", "var", "count"}
    stats = variables["batch_stats"]
    for x in TWO:
        stats = layer.apply({**variables, "batch_stats": stats}, x, mutable=STATS)[1]["batch_stats"]
    np.testing.assert_allclose(stats["mean"], TWO.mean((0, 1)), atol=1e-6)
    assert stats["count"] == 2


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


def test_dtypes_of_eager_and_abstract_initialization_agree():
    layer = BatchNorm(use_running_average=False, momentum=jaxbn.zero_debiased(0.9), axis_name="data")
    shapes = jax.eval_shape(layer.init, KEY, X)
    chex.assert_trees_all_equal_shapes_and_dtypes(layer.init(KEY, X), shapes)
