"""Whole networks: every leaf comes from the entry that its name gives, or nothing is converted."""

import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
from jaxbn.convert import from_keras_network, from_torch_network

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(0.5, 2.0, size=(12, 8, 8, 3)).astype(np.float32)


def test_keras_network_gives_the_same_outputs():
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    norm = keras.layers.BatchNormalization(momentum=0.5, name="bn")
    layers = [keras.layers.Conv2D(4, 3, name="conv"), norm, keras.layers.Flatten(), keras.layers.Dense(2, name="out")]
    model = keras.Sequential([keras.layers.Input((4, 4, 3)), *layers], name="sequential")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for _ in range(3):
            model(IMAGES[:, :4, :4], training=True)
        outputs = model(IMAGES[:, :4, :4], training=False)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3), padding="VALID", name="conv")(x)
            x = jaxbn.linen.BatchNorm(use_running_average=True, epsilon=1e-3, name="bn")(x)
            return nn.Dense(2, name="head")(x.reshape(x.shape[0], -1))

    target = jax.eval_shape(Model().init, jax.random.key(0), IMAGES[:, :4, :4])
    source = {variable.path: variable for variable in model.weights}
    names = {"conv": "conv", "bn": "bn", "head": "out"}
    variables = from_keras_network(target, source, {layer: f"sequential/{name}" for layer, name in names.items()})
    here = np.asarray(Model().apply(variables, IMAGES[:, :4, :4]))
    np.testing.assert_allclose(here, outputs, rtol=0, atol=1e-5)
    assert np.abs(variables["batch_stats"]["bn"]["mean"]).max() > 0.1


def small():
    """Return a target and a source that fit, as NumPy arrays."""
    target = {
        "params": {
            "conv": {"kernel": np.zeros((1, 3, 2, 4), np.float32)},
            "bn": {"scale": np.zeros(4, np.float32), "bias": np.zeros(4, np.float32)},
            "head": {"kernel": np.zeros((4, 2), np.float32)},
        },
        "batch_stats": {"bn": {"mean": np.zeros(4, np.float32), "var": np.zeros(4, np.float32)}},
    }
    source = {
        "a.weight": RNG.normal(size=(4, 2, 1, 3)),
        "b.weight": np.full(4, 1.0),
        "b.bias": np.full(4, 2.0),
        "b.running_mean": np.full(4, 3.0),
        "b.running_var": np.full(4, 4.0),
        "b.num_batches_tracked": np.int64(7),
        "c.weight": RNG.normal(size=(2, 4)),
    }
    return target, source, {"conv": "a", "bn": "b", "head": "c"}


def test_every_leaf_comes_from_its_own_entry():
    target, source, names = small()
    found = from_torch_network(target, source, names)
    np.testing.assert_array_equal(
        found["params"]["conv"]["kernel"], source["a.weight"].astype(np.float32).transpose(2, 3, 1, 0)
    )
    np.testing.assert_array_equal(found["params"]["head"]["kernel"], source["c.weight"].astype(np.float32).T)
    bn = found["params"]["bn"] | found["batch_stats"]["bn"]
    assert {name: float(value[0]) for name, value in bn.items()} == {"scale": 1, "bias": 2, "mean": 3, "var": 4}
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(found))


def test_dtypes_are_those_of_the_target():
    target, source, names = small()
    target["params"] = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), target["params"])
    found = from_torch_network(target, source, names)
    assert {leaf.dtype for leaf in jax.tree.leaves(found["params"])} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(found["batch_stats"])} == {jnp.dtype(jnp.float32)}


def test_message_names_all_that_does_not_fit_and_nothing_changes():
    target, source, names = small()
    del names["head"], source["b.running_var"]
    names["neck"] = "d"
    target["params"]["bn"]["gain"] = np.zeros(4, np.float32)
    target["batch_stats"]["bn"]["count"] = np.float32(0)
    source |= {"a.weight": np.zeros((3, 2, 1, 3)), "b.weight": np.zeros(5), "e.weight": np.zeros(1)}
    before = jax.tree.map(np.copy, target)
    with pytest.raises(ValueError, match="nothing was converted") as error:
        from_torch_network(target, source, names)
    lines = str(error.value).splitlines()[1:]
    assert lines == [
        "  target leaves that no name matches: bn/gain (no rule for 'gain'), head/kernel",
        "  names of no target layer: neck",
        "  missing in the source: b.running_var (for bn/var)",
        "  of another shape: bn/scale (4,) from b.weight (5,),"
        " conv/kernel (1, 3, 2, 4) from a.weight (3, 2, 1, 3) as (1, 3, 2, 3)",
        "  of another type: bn/count float32 from b.num_batches_tracked int64",
        "  not used of the source: c.weight, e.weight",
    ]
    jax.tree.map(np.testing.assert_array_equal, target, before)


@pytest.mark.parametrize("as_function", [False, True], ids=["dict", "function"])
def test_layer_without_a_source_stays_as_it_is(as_function):
    target, source, names = small()
    del source["c.weight"]
    keep = names | {"head": None}
    found = from_torch_network(target, source, keep.get if as_function else keep)
    assert found["params"]["head"]["kernel"] is target["params"]["head"]["kernel"]
    assert found["batch_stats"]["bn"]["var"][0] == 4


def test_layer_at_the_root():
    target, source, _ = small()
    variables = {"params": target["params"]["bn"], "batch_stats": target["batch_stats"]["bn"]}
    entries = {name: value for name, value in source.items() if name.startswith("b.")}
    found = from_torch_network(variables, entries, {"": "b"})
    assert found["batch_stats"]["var"][0] == 4
    entries = {name.removeprefix("b."): value for name, value in entries.items()}
    assert from_torch_network(variables, entries, {"": ""})["params"]["scale"][0] == 1


def test_nnx_state_with_lists_and_without_random_state():
    _, source, _ = small()
    source = {name.replace("a.", "layers.0.").replace("b.", "layers.1."): value for name, value in source.items()}
    rngs = nnx.Rngs(0)
    conv, norm = nnx.Conv(2, 4, (1, 3), use_bias=False, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
    dense = nnx.Linear(4, 2, use_bias=False, rngs=rngs)
    model = nnx.Dict(layers=nnx.List([conv, norm]), drop=nnx.Dropout(0.5, rngs=rngs), c=dense)
    with pytest.raises(ValueError, match=r"drop/rngs/key \(no rule for 'key'\)"):
        from_torch_network(nnx.state(model), source, lambda layer: layer.replace("/", "."))
    state = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    nnx.update(model, from_torch_network(state, source, lambda layer: layer.replace("/", ".")))
    np.testing.assert_array_equal(conv.kernel[...], source["layers.0.weight"].astype(np.float32).transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(norm.var[...], np.full(4, 4.0))
    np.testing.assert_array_equal(dense.kernel[...], source["c.weight"].astype(np.float32).T)
