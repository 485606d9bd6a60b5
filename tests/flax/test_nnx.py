"""Compare the nnx module with flax's: fields, variables and life cycle."""

import inspect
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beside_flax import TWO, X, close, make, stats
from flax import nnx
from params import named, pairs

import jaxbn
import jaxbn.nnx

BatchNorm: Any = jaxbn.nnx.BatchNorm
BOTH = pytest.mark.parametrize("norm", [nnx.BatchNorm, BatchNorm], ids=["flax", "ours"])
pytestmark = pytest.mark.usefixtures("ordinary_promotion")


def pair(**kwargs):
    return make(nnx.BatchNorm, **kwargs), make(BatchNorm, **kwargs)


def test_arguments_are_flax_s_and_then_ours():
    def arguments(f):
        return [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]

    theirs, ours = arguments(nnx.BatchNorm.__init__), arguments(BatchNorm.__init__)
    # A fresh `zeros_init()` equals nothing; that both start alike is in the tests below.
    inits = ("bias_init", "scale_init")
    assert [a[:2] for a in ours[: len(theirs)]] == [a[:2] for a in theirs]
    assert [a for a in ours[: len(theirs)] if a[0] not in inits] == [a for a in theirs if a[0] not in inits]
    new = ["unbiased_running_var", "activation", "frozen", "mean_init", "var_init", "mean_metadata", "var_metadata"]
    new += ["ghost_batches", "renorm", "num_domains", "example_weight"]
    assert [a[0] for a in ours[len(theirs) :]] == new
    call = arguments(nnx.BatchNorm.__call__)
    assert arguments(BatchNorm.__call__)[: len(call)] == call
    assert arguments(BatchNorm.set_view) == arguments(nnx.BatchNorm.set_view)


NORMAL = nnx.initializers.normal()
SETTINGS = {
    "defaults": {},
    "numbers": {"momentum": 0.5, "epsilon": 0.1, "use_fast_variance": False},
    "no bias": {"use_bias": False, "scale_init": NORMAL},
    "no affine": {"use_scale": False, "use_bias": False},
    "random": {"bias_init": NORMAL, "scale_init": NORMAL},
    "channels first": {"axis": 0, "num_features": 8},
    "bfloat16": {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_variables_output_and_update_are_flax_s(name):
    """The same seed gives the same variables, flax's state loads, ours loads in flax's, and training agrees."""
    theirs, ours = pair(**SETTINGS[name])
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(ours)), nnx.to_pure_dict(nnx.state(theirs)))
    for attribute in inspect.signature(nnx.BatchNorm.__init__).parameters:
        if attribute not in ("self", "rngs", "bias_init", "scale_init", "bias_metadata", "scale_metadata"):
            assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    tolerance = 2e-2 if name == "bfloat16" else 3e-6
    for module in (theirs, ours):
        module.mean[...] = module.mean[...] + 0.5
    close(ours(X), theirs(X), tolerance)
    # flax rounds x to `dtype` before it takes the statistics; here they are those of x.
    close(stats(ours), stats(theirs), 1e-4 if name == "bfloat16" else 3e-6)
    nnx.update(theirs, nnx.state(ours))
    close(ours(X, use_running_average=True), theirs(X, use_running_average=True), tolerance)


@pairs(
    "x_dtype, param_dtype, dtype",
    named(jnp.bfloat16, jnp.float32, jnp.int32),
    named(jnp.bfloat16, jnp.float32),
    named(None, jnp.bfloat16),
)
def test_dtypes_are_flax_s(x_dtype, param_dtype, dtype):
    x = (4 * X).astype(x_dtype)
    theirs, ours = pair(dtype=dtype, param_dtype=param_dtype)
    for evaluate in (False, True):
        assert ours(x, evaluate).dtype == theirs(x, evaluate).dtype
        assert {str(v.dtype) for v in jax.tree.leaves(stats(ours))} == {"float32"}


def test_promote_dtype_is_asked():
    """The output has the dtype to which x, scale and bias promote if the function promotes nothing."""
    calls = []

    def promote(arrays, dtype=None):
        calls.append([None if a is None else a.dtype for a in arrays])
        return arrays

    theirs, ours = pair(promote_dtype=promote, use_bias=False, param_dtype=jnp.bfloat16)
    assert ours(X.astype(jnp.bfloat16)).dtype == theirs(X.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert calls[0] == calls[1] == ["bfloat16", "float32", "float32", "bfloat16", None]


def test_statistics_stay_float32_in_half_precision_evaluation():
    """A running variance beyond float16: flax's layer casts it, divides by infinity and returns zeros."""
    x = (np.array([[-300.0, 300.0, 0.0]]) + 0.0).astype(np.float16)
    outputs = []
    for layer in pair(dtype=jnp.float16, use_running_average=True):
        layer.var[...] = jnp.full(3, 1e5)
        outputs.append(np.float32(layer(x)))
    np.testing.assert_array_equal(outputs[0], np.zeros((1, 3)))
    np.testing.assert_allclose(outputs[1], x / np.sqrt(np.float32(1e5)), rtol=1e-3)


def test_strict_promotion_is_enough():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        layer = make(param_dtype=jnp.bfloat16, momentum=jaxbn.cumulative_average)
        assert layer(X).dtype == jnp.float32
        assert layer.count[...] == 1


@BOTH
def test_the_flag(norm):
    """The call's wins; one of them must be given; `train`, `eval` and `view` set it."""
    layer = make(norm, use_running_average=None)
    with pytest.raises(ValueError, match="use_running_average"):
        layer(X)
    model = nnx.List([layer])
    before = stats(model)
    model.eval()
    close(layer(X), X, 2e-5)
    model.train()
    np.testing.assert_allclose(layer(X, use_running_average=True), X, atol=2e-5)
    chex.assert_trees_all_equal(stats(model), before)
    view = nnx.view(model, use_running_average=True)
    np.testing.assert_allclose(view[0](X), X, atol=2e-5)
    assert view[0].mean is layer.mean
    assert layer.use_running_average is False
    layer(X)
    np.testing.assert_allclose(view[0].mean[...], 0.01 * X.mean(0), atol=1e-7)


def test_frozen_survives_train():
    """pytorch/pytorch#66073: the flag of the model does not move a frozen layer, nor does the call's."""
    layer = make(frozen=True, momentum=jaxbn.cumulative_average, axis_name="data")
    before = stats(layer)
    layer.train()
    np.testing.assert_allclose(layer(X), X, atol=2e-5)
    np.testing.assert_allclose(layer(X, use_running_average=False), X, atol=2e-5)
    chex.assert_trees_all_equal(stats(layer), before)


def test_count_is_there_for_schedules_only():
    assert make().count is None
    layer = make(momentum=jaxbn.cumulative_average)
    for x in TWO:
        layer(x)
    np.testing.assert_allclose(layer.mean[...], TWO.mean((0, 1)), atol=1e-6)
    assert layer.count[...] == 2


def test_arguments_reach_the_function():
    mask = np.arange(8)[:, None] < 5
    kwargs: dict[str, Any] = {"unbiased_running_var": True, "activation": jax.nn.relu, "momentum": 0.3, "epsilon": 0.01}
    layer = make(**kwargs)
    y = layer(X, mask=mask, residual=X[::-1])
    wanted, state = jaxbn.bn_apply(*jaxbn.bn_init(3), X, True, mask=mask, residual=X[::-1], **kwargs)
    close((y, stats(layer)), (wanted, {"mean": state.mean, "var": state.var}), 0)


@pytest.mark.parametrize("axis", [(1, 2), [2, 1]])
def test_several_feature_axes(axis):
    """Flax's layer has none: its buffers are vectors. `num_features` is in the order of `axis`."""
    x = np.asarray(np.random.default_rng(2).normal(size=(4, 2, 3)), np.float32)
    sizes = tuple(x.shape[a] for a in axis)
    layer = make(num_features=sizes, axis=axis, momentum=0.0)
    y = layer(x)
    assert layer.scale.shape == sizes
    np.testing.assert_allclose(y.mean(0), np.zeros((2, 3)), atol=1e-6)
    np.testing.assert_allclose(layer.mean[...], x.mean(0) if axis == (1, 2) else x.mean(0).T, atol=1e-6)


def test_initializers_and_metadata():
    """matthias-wright/flaxmodels#15; the statistics can say how they are sharded, as scale and bias can."""
    names = ("bias", "scale", "mean", "var")
    kwargs: dict[str, Any] = {f"{name}_metadata": {"note": name} for name in names}
    layer = make(**kwargs, mean_init=nnx.initializers.constant(2.0), var_init=nnx.initializers.constant(4.0))
    assert [getattr(layer, name).note for name in names] == list(names)
    np.testing.assert_allclose(layer(X, True), (X - 2) / np.sqrt(4 + 1e-5), atol=1e-6)
    layer(X)
    assert [getattr(layer, name).note for name in names] == list(names)


def test_statistics_of_sharded_layers_are_sharded():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    sharded: dict[str, Any] = {f"{name}_metadata": {"out_sharding": ("model",)} for name in ("scale", "mean", "var")}
    with jax.set_mesh(mesh):
        layer = nnx.jit(lambda: make(num_features=4, **sharded))()
        nnx.jit(lambda layer, x: layer(x))(layer, np.concatenate([X, X[:, :1]], 1))
        specs = [getattr(layer, name).get_value().sharding.spec for name in ("mean", "var", "bias")]
    assert specs == [jax.P("model"), jax.P("model"), jax.P()]


def test_flags_and_sizes_from_numpy():
    """A NumPy integer is a size (flax takes it) and a NumPy bool a flag: evaluation needs no axis name."""
    layer = make(num_features=np.int64(3), axis_name="data")
    assert layer.mean.shape == (3,)
    assert layer(X, np.True_).shape == X.shape
