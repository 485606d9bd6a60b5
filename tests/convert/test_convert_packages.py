"""Particulars of single packages: layers inside models, prefixes, dtypes, feature axes, boxes."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from neighbours import BATCHES, BIAS, CHANNELS, SCALE, Torch, assert_same, flat, moved

import jaxbn
from jaxbn import convert

RNG = np.random.default_rng(1)


def test_equinox_layer_inside_a_model():
    eqx = pytest.importorskip("equinox")

    class Model(eqx.Module):
        norms: list

        def __init__(self):
            self.norms = [eqx.nn.BatchNorm(c, axis_name="batch", mode="ema") for c in (2, 3)]

    model, state = eqx.nn.make_with_state(Model)()
    params, bn_state = jaxbn.bn_init(3, scale=SCALE, bias=BIAS, mean=BIAS)
    norm, state = convert.to_equinox(model.norms[1], state, params, bn_state)
    model = eqx.tree_at(lambda model: model.norms[1], model, norm)
    assert_same(flat(convert.from_equinox(model.norms[1], state)), flat((params, bn_state)))
    assert convert.from_equinox(model.norms[0], state)[1].mean.shape == (2,)


def test_torch_tensors_are_copied():
    layer = Torch()
    params, state = layer.converted()
    before = flat((params, state))
    layer.train(moved(layer, BATCHES[0]))
    layer.layer.weight.data.fill_(7)
    assert_same(flat((params, state)), before)
    arrays = convert.to_torch(params, state)
    for value in arrays.values():
        value[...] = 7
    assert_same(flat((params, state)), before)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_torch_half_precision_is_exact(dtype):
    layer = Torch()
    layer.layer.to(getattr(layer.torch, dtype))
    params, state = layer.converted()
    assert params.scale is not None
    assert params.scale.dtype == dtype
    assert state.mean.dtype == state.var.dtype == np.float32
    arrays = convert.to_torch(params, state)
    assert arrays["weight"].dtype == dtype
    assert_same(flat(convert.from_torch(arrays)), flat((params, state)))
    before = {name: value.clone() for name, value in layer.layer.state_dict().items()}
    wide = {n: v.astype(np.float32) if v.dtype == jnp.bfloat16 else v for n, v in arrays.items()}
    layer.layer.load_state_dict({name: layer.torch.from_numpy(value) for name, value in wide.items()})
    after = layer.layer.state_dict()
    assert all(layer.torch.equal(after[name], before[name]) for name in before)


def test_torch_double_precision_is_exact_in_64_bit_mode():
    layer = Torch()
    layer.layer.double()
    with jax.enable_x64(True):
        params, state = layer.converted()
        assert params.scale is not None
        assert params.scale.dtype == state.var.dtype == np.float64
        assert_same(convert.to_torch(params, state), layer.arrays())


@pytest.mark.parametrize("prefix", ["1.norm", "1.norm."])
def test_torch_layer_inside_a_model(prefix):
    torch = pytest.importorskip("torch")
    inner = torch.nn.ModuleDict({"norm": torch.nn.BatchNorm2d(2), "norm2": torch.nn.BatchNorm2d(3)})
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), inner)
    params, state = convert.from_torch(model.state_dict(), prefix)
    assert state.mean.shape == (2,)
    arrays = convert.to_torch(params, state, prefix)
    assert set(arrays) == {name for name in model.state_dict() if name.startswith("1.norm.")}


def test_keras_prefix():
    params, state = jaxbn.bn_init(3, scale=SCALE, bias=BIAS, mean=BIAS)
    arrays = convert.to_keras(params, state, "net/bn")
    assert all(name.startswith("net/bn/") for name in arrays)
    assert_same(flat(convert.from_keras(arrays | {"net/conv/kernel": BIAS}, "net/bn")), flat((params, state)))


@pytest.mark.parametrize("axis", [1, (2, 1)], ids=str)
def test_haiku_features_elsewhere(axis):
    features = (3,) if axis == 1 else (4, 3)
    params, state = jaxbn.bn_init(features, scale=RNG.normal(size=features), mean=RNG.normal(size=features))
    theirs = convert.to_haiku(params, state, "bn", ndim=4, decay_rate=0.9, axis=axis)
    assert theirs[0]["bn"]["scale"].shape == ((1, 3, 1, 1) if axis == 1 else (1, 3, 4, 1))
    assert_same(flat(convert.from_haiku(*theirs, "bn", axis=axis)), flat((params, state)))


def test_linen_boxes_of_sharded_initializers_are_opened():
    init = flax.linen.with_partitioning(flax.linen.initializers.ones, (None,))
    variables = flax.linen.BatchNorm(scale_init=init).init(jax.random.key(0), BATCHES[0], use_running_average=True)
    assert isinstance(variables["params"]["scale"], flax.linen.Partitioned)
    params, _ = convert.from_linen(variables)
    np.testing.assert_array_equal(params.scale, np.ones(CHANNELS))
