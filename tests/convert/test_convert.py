"""Checkpoints of single layers against the packages themselves: one contract, a table of layers that must fulfil it."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn import BatchNormParams, BatchNormState, convert

CHANNELS = 3
KEEP = 0.9
RNG = np.random.default_rng(0)
SCALE = RNG.normal(size=CHANNELS).astype(np.float32)
BIAS = RNG.normal(size=CHANNELS).astype(np.float32)
# Batches that drift, of another mean and spread in each channel; [batch, length, channels].
BATCHES = (RNG.normal(size=(25, 8, 4, CHANNELS)) * [0.5, 1, 3] + [-1, 0, 5]).astype(np.float32)
BATCHES += np.linspace(0, 2, 25, dtype=np.float32)[:, None, None, None]


@contextmanager
def lenient():
    """Where other packages compute: they do not hold to our strictness about dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def flat(tree) -> dict[str, np.ndarray]:
    """Return the leaves of a tree by their paths."""
    return {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


class Torch:
    """PyTorch's. Like every class here: train a layer, evaluate it, convert it, load into it, look at its arrays."""

    axis = 1

    def __init__(self, momentum: float | None = 1 - KEEP, affine=True, bias=True):
        self.torch = pytest.importorskip("torch")
        self.layer = self.torch.nn.BatchNorm1d(CHANNELS, momentum=momentum, affine=affine, bias=bias)
        for name, value in {"weight": SCALE, "bias": BIAS}.items():
            if getattr(self.layer, name) is not None:
                getattr(self.layer, name).data = self.torch.from_numpy(value.copy())

    def train(self, x):
        self.layer.train()(self.torch.from_numpy(x))

    def evaluate(self, x):
        return self.layer.eval()(self.torch.from_numpy(x)).detach().numpy()

    def converted(self):
        return convert.from_torch(self.layer.state_dict())

    def load(self, params, state):
        arrays = convert.to_torch(params, state)
        self.layer.load_state_dict({name: self.torch.from_numpy(value) for name, value in arrays.items()})

    def arrays(self):
        return {name: value.numpy().copy() for name, value in self.layer.state_dict().items()}


class Keras:
    """Keras's, evaluated on JAX."""

    axis = -1

    def __init__(self, **settings):
        os.environ.setdefault("KERAS_BACKEND", "jax")
        keras = pytest.importorskip("keras")
        self.layer = keras.layers.BatchNormalization(momentum=KEEP, **settings)
        self.layer.build((None, None, CHANNELS))
        for variable in self.layer.trainable_variables:
            variable.assign({"gamma": SCALE, "beta": BIAS}[variable.name])

    def train(self, x):
        with lenient():
            self.layer(x, training=True)

    def evaluate(self, x):
        with lenient():
            return self.layer(x, training=False)

    def converted(self):
        return convert.from_keras(self.layer)

    def load(self, params, state):
        values = convert.to_keras(params, state)
        for variable in self.layer.variables:
            variable.assign(values.pop(variable.name))
        assert not values

    def arrays(self):
        return {variable.name: np.asarray(variable).copy() for variable in self.layer.variables}


class Haiku:
    """Haiku's; with `derived`, parts of the names of what is not copied but computed."""

    axis = -1
    derived = ("hidden",)

    def __init__(self, scale=True, offset=True):
        hk = pytest.importorskip("haiku")
        init = {"scale_init": lambda *_: jnp.array(SCALE)[None, None]} if scale else {}
        init |= {"offset_init": lambda *_: jnp.array(BIAS)[None, None]} if offset else {}
        run = hk.transform_with_state(lambda x, train: hk.BatchNorm(scale, offset, KEEP, name="bn", **init)(x, train))
        self.apply = jax.jit(run.apply, static_argnums=4)
        with lenient():
            self.params, self.state = run.init(None, jnp.array(BATCHES[0]), True)

    def train(self, x):
        with lenient():
            self.state = self.apply(self.params, self.state, None, x, True)[1]

    def evaluate(self, x):
        with lenient():
            return self.apply(self.params, self.state, None, x, False)[0]

    def converted(self):
        return convert.from_haiku(self.params, self.state, "bn")

    def load(self, params, state):
        self.params, self.state = convert.to_haiku(params, state, "bn", ndim=3, decay_rate=KEEP)

    def arrays(self):
        return flat((self.params, self.state))


class Equinox:
    """Equinox's; without a mode the legacy one."""

    axis = 1

    def __init__(self, mode=None, affine=True):
        eqx = pytest.importorskip("equinox")
        # The hidden averages; and what they give, within one rounding each way.
        self.derived = ("flat index 1", ".mean", ".var") if mode == "batch" else ()
        settings: dict[str, Any] = {"axis_name": "batch", "momentum": KEEP, "channelwise_affine": affine}
        if mode is None:
            with pytest.warns(UserWarning, match="defaults to 'ema'"):
                self.layer, self.state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(CHANNELS, **settings)
        else:
            self.layer, self.state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(CHANNELS, mode=mode, **settings)
        if affine:
            values = jnp.array(SCALE), jnp.array(BIAS)
            self.layer = eqx.tree_at(lambda layer: (layer.weight, layer.bias), self.layer, values)

        def run(layer, state, x, inference):
            call = jax.vmap(lambda x, state: layer(x, state, inference=inference), (0, None), (0, None), "batch")
            return call(x, state)

        self.run = eqx.filter_jit(run)

    def train(self, x):
        with lenient():
            _, self.state = self.run(self.layer, self.state, x, False)

    def evaluate(self, x):
        with lenient():
            return self.run(self.layer, self.state, x, True)[0]

    def converted(self):
        return convert.from_equinox(self.layer, self.state)

    def load(self, params, state):
        self.layer, self.state = convert.to_equinox(self.layer, self.state, params, state)

    def arrays(self):
        return flat((self.layer.weight, self.layer.bias, self.state))


class Linen:
    """Flax linen's, or ours of the same name."""

    axis = -1

    def __init__(self, package: Any = flax.linen, momentum: Any = KEEP, **settings):
        init = {"scale_init": lambda *_: jnp.array(SCALE), "bias_init": lambda *_: jnp.array(BIAS)}
        self.counts = callable(momentum)
        self.layer = package.BatchNorm(momentum=momentum, **init, **settings)
        self.variables = self.layer.init(jax.random.key(0), BATCHES[0], use_running_average=True)

    def train(self, x):
        update = self.layer.apply(self.variables, x, use_running_average=False, mutable=["batch_stats"])[1]
        self.variables = self.variables | update

    def evaluate(self, x):
        return self.layer.apply(self.variables, x, use_running_average=True)

    def converted(self):
        return convert.from_linen(self.variables)

    def load(self, params, state):
        self.variables = convert.to_linen(params, state, count=self.counts)

    def arrays(self):
        return flat(self.variables)


class Nnx:
    """Flax nnx's, or ours of the same name."""

    axis = -1

    def __init__(self, package: Any = nnx, momentum: Any = KEEP, **settings):
        init = {"scale_init": lambda *_: jnp.array(SCALE), "bias_init": lambda *_: jnp.array(BIAS)}
        self.layer = package.BatchNorm(CHANNELS, momentum=momentum, rngs=nnx.Rngs(0), **init, **settings)

    def train(self, x):
        self.layer(jnp.asarray(x), use_running_average=False)

    def evaluate(self, x):
        return self.layer(jnp.asarray(x), use_running_average=True)

    def converted(self):
        return convert.from_nnx(self.layer)

    def load(self, params, state):
        convert.to_nnx(self.layer, params, state)

    def arrays(self):
        return flat(nnx.state(self.layer))


class Case(NamedTuple):
    """A layer, and the arguments with which the running state of `bn_apply` goes on as its would."""

    make: Callable[[], Any]
    settings: Mapping[str, Any]
    epsilon: float = 1e-5


TORCH = {"momentum": KEEP, "unbiased_running_var": True}
PLAIN = {"momentum": KEEP}
DEBIASED: dict[str, Any] = {"momentum": jaxbn.zero_debiased(KEEP)}
SCHEDULE = DEBIASED["momentum"]
CASES = {
    "torch": Case(Torch, TORCH),
    "torch-cumulative-no-affine": Case(
        lambda: Torch(momentum=None, affine=False), TORCH | {"momentum": jaxbn.cumulative_average}
    ),
    "torch-no-bias": Case(lambda: Torch(bias=False), TORCH),
    "keras": Case(Keras, PLAIN, 1e-3),
    "keras-no-scale": Case(lambda: Keras(scale=False, epsilon=1e-5), PLAIN),
    "keras-no-affine": Case(lambda: Keras(scale=False, center=False), PLAIN, 1e-3),
    "haiku": Case(Haiku, DEBIASED),
    "haiku-no-affine": Case(lambda: Haiku(False, False), DEBIASED),
    "haiku-no-offset": Case(lambda: Haiku(offset=False), DEBIASED),
    "equinox-batch": Case(lambda: Equinox("batch"), DEBIASED),
    "equinox-batch-no-affine": Case(lambda: Equinox("batch", affine=False), DEBIASED),
    "equinox-ema": Case(lambda: Equinox("ema"), PLAIN),
    "equinox-legacy": Case(Equinox, PLAIN),
    "linen": Case(Linen, PLAIN),
    "linen-no-scale": Case(lambda: Linen(use_scale=False), PLAIN),
    "our-linen-schedule": Case(lambda: Linen(jaxbn.linen, SCHEDULE), DEBIASED),
    "nnx": Case(Nnx, PLAIN),
    "nnx-no-bias": Case(lambda: Nnx(use_bias=False), PLAIN),
    "our-nnx-schedule": Case(lambda: Nnx(jaxbn.nnx, SCHEDULE), DEBIASED),
}


class Trained(NamedTuple):
    """A layer after 20 steps there, and what it was then: later tests may train it on."""

    case: Case
    layer: Any
    arrays: dict[str, np.ndarray]
    converted: tuple[BatchNormParams, BatchNormState]
    x: np.ndarray
    y: np.ndarray


@pytest.fixture(scope="module", params=list(CASES))
def trained(request):
    """Every case, trained."""
    case = CASES[request.param]
    layer = case.make()
    for x in BATCHES[:20]:
        layer.train(moved(layer, x))
    x = moved(layer, BATCHES[24])
    return Trained(case, layer, layer.arrays(), layer.converted(), x, np.array(layer.evaluate(x)))


def moved(layer, x):
    """Return a batch as the layer wants it."""
    return np.ascontiguousarray(np.moveaxis(x, -1, layer.axis))


def assert_same(found: Mapping[str, Any], wanted: Mapping[str, Any], derived=()):
    """Equal bit by bit, shapes and dtypes too; the derived ones within a few roundings."""
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype, name
        assert found[name].shape == wanted[name].shape, name
        if any(part in name for part in derived):
            np.testing.assert_allclose(found[name], wanted[name], rtol=5e-7, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


def test_evaluates_as_there_after_20_steps_there(trained):
    case, layer, _, (params, state), x, there = trained
    y, _ = jaxbn.bn_apply(params, state, x, False, axis=layer.axis, epsilon=case.epsilon)
    assert np.std(there) > 0.1
    np.testing.assert_allclose(y, there, rtol=0, atol=1e-5)


def test_evaluates_as_there_before_any_step(trained):
    layer, epsilon = trained.case.make(), trained.case.epsilon
    params, state = layer.converted()
    y, _ = jaxbn.bn_apply(params, state, trained.x, False, axis=layer.axis, epsilon=epsilon)
    # Haiku's and Equinox's first averages are 0: a variance of epsilon, and outputs in the thousands.
    np.testing.assert_allclose(y, np.asarray(layer.evaluate(trained.x)), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_goes_on_here_for_5_steps_as_there(trained):
    case, layer, _, (params, before), _, _ = trained
    state = before
    for x in BATCHES[20:]:
        layer.train(moved(layer, x))
        _, state = jaxbn.bn_apply(params, state, moved(layer, x), True, axis=layer.axis, **case.settings)
    _, there = layer.converted()
    # Haiku's variance E[x^2] - E[x]^2 has lost digits where the mean is large.
    np.testing.assert_allclose(state.mean, there.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.var, there.var, rtol=1e-5)
    assert not np.allclose(there.mean, before.mean, rtol=1e-2)
    assert state.count == before.count + 5


def test_there_and_back_is_exact(trained):
    derived = getattr(trained.layer, "derived", ())
    fresh = trained.case.make()
    fresh.load(*trained.converted)
    assert_same(fresh.arrays(), trained.arrays, derived)
    assert_same(flat(fresh.converted()), flat(trained.converted), derived)
    np.testing.assert_allclose(fresh.evaluate(trained.x), trained.y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("torch", 1),
        ("keras", 0),
        ("haiku", 1),
        ("equinox-batch", 1),
        ("equinox-ema", 1),
        ("linen", 0),
        ("our-linen-schedule", 1),
        ("nnx", 0),
        ("our-nnx-schedule", 1),
    ],
)
def test_count_is_theirs_or_0(name, count):
    layer = CASES[name].make()
    assert layer.converted()[1].count == 0
    layer.train(moved(layer, BATCHES[0]))
    assert layer.converted()[1].count == count


def test_equinox_bias_of_the_first_variance_is_kept():
    layer = Equinox("batch")
    layer.train(moved(layer, BATCHES[0]))
    true = BATCHES[0].var((0, 1))
    np.testing.assert_allclose(layer.converted()[1].var, true + KEEP / (1 - KEEP), rtol=1e-4)


TORCH_ENTRIES = {
    "weight": np.ones(3, np.float32),
    "bias": np.ones(3, np.float32),
    "running_mean": np.zeros(3, np.float32),
    "running_var": np.ones(3, np.float32),
    "num_batches_tracked": np.int64(5),
}
EMA = {"hidden": np.zeros((1, 3)), "average": np.zeros((1, 3)), "counter": np.int32(1)}


class Broken(NamedTuple):
    """A conversion that must fail, and all that its message must say."""

    run: Callable[[], Any]
    says: tuple[str, ...]


def torch_with(*without, **changes):
    """`TORCH_ENTRIES` without some and with others."""
    return {name: value for name, value in TORCH_ENTRIES.items() if name not in without} | changes


def functional(features=3, **changes):
    """Params and state that do not fit each other if anything is changed."""
    params, state = jaxbn.bn_init(features)
    return BatchNormParams(**params._asdict() | changes), state


BROKEN = {
    "torch": Broken(
        lambda: convert.from_torch(torch_with("running_var", "num_batches_tracked", bias=np.ones(4), conv=0, fc=0)),
        ("missing: running_var, num_batches_tracked", "unexpected: conv, fc", "bias (4,), where running_mean has (3,)"),
    ),
    "torch-types": Broken(
        lambda: convert.from_torch(torch_with(weight=np.ones(3, int), num_batches_tracked=np.float32(1))),
        ("weight int64, which is not real floating point", "num_batches_tracked float32, which is not an integer"),
    ),
    "torch-counts": Broken(
        lambda: convert.from_torch(torch_with(num_batches_tracked=np.int64(2**31))), ("2147483648", "int32")
    ),
    "torch-count-shape": Broken(
        lambda: convert.from_torch(torch_with(num_batches_tracked=np.ones(3, int))), ("(3,), where a scalar",)
    ),
    "torch-matrix": Broken(
        lambda: convert.from_torch({n: v if v.shape == () else v[None] for n, v in TORCH_ENTRIES.items()}),
        tuple(f"{name} (1, 3), where one number a channel" for name in TORCH_ENTRIES if "num" not in name),
    ),
    "torch-prefix": Broken(
        lambda: convert.from_torch({f"bn1.{name}": value for name, value in TORCH_ENTRIES.items()}, prefix="bn"),
        ("missing: bn.running_mean, bn.running_var, bn.num_batches_tracked",),
    ),
    "to-torch-bias-alone": Broken(lambda: convert.to_torch(*functional(scale=None)), ("scale of ones",)),
    "to-torch": Broken(
        lambda: convert.to_torch(*functional(scale=np.ones(4), bias=np.ones((1, 3)))),
        ("scale (4,), where mean has (3,)", "bias (1, 3), where mean has (3,)"),
    ),
    "to-torch-complex": Broken(
        lambda: convert.to_torch(*jaxbn.bn_init(3, dtype=jnp.complex64)),
        ("scale complex64, which is not real", "mean complex64, which is not real"),
    ),
    "keras": Broken(
        lambda: convert.from_keras({"gamma": np.ones(2), "moving_mean": np.ones(3), "moving_stddev": np.ones(3)}),
        ("missing: moving_variance", "unexpected: moving_stddev", "gamma (2,), where moving_mean has (3,)"),
    ),
    "haiku": Broken(
        lambda: convert.from_haiku(
            {"bn": {"scale": np.ones((1, 4)), "w": np.ones((1, 3))}}, {"bn/~/mean_ema": EMA, "bn/~/var_ema": {}}, "bn"
        ),
        (
            "missing: bn/~/var_ema/average, bn/~/var_ema/hidden, bn/~/var_ema/counter",
            "unexpected: bn/w",
            "bn/scale (4,), where bn/~/mean_ema/average has (3,)",
        ),
    ),
    "haiku-axis": Broken(
        lambda: convert.from_haiku({}, {"bn/~/mean_ema": EMA, "bn/~/var_ema": EMA}, "bn", axis=0),
        ("along axis 0", "all of them, (1, 3)"),
    ),
    "to-haiku-axis": Broken(
        lambda: convert.to_haiku(*functional(), "bn", ndim=4, decay_rate=0.9, axis=(1, 2)), ("(3,) among 4", "(1, 2)")
    ),
    "to-haiku-decay": Broken(lambda: convert.to_haiku(*functional(), "bn", ndim=4, decay_rate=1.0), ("[0, 1)", "1.0")),
    "linen": Broken(
        lambda: convert.from_linen({"params": {"kernel": np.ones(3)}, "batch_stats": {"mean": np.zeros(3)}}),
        ("missing: batch_stats/var", "unexpected: params/kernel"),
    ),
    "nnx": Broken(
        lambda: convert.from_nnx(nnx.LayerNorm(3, rngs=nnx.Rngs(0))), ("LayerNorm is not", "missing: mean, var")
    ),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=list(BROKEN))
def test_message_names_all_that_is_wrong(broken):
    with pytest.raises(ValueError, match=re.escape(broken.says[0])) as error:
        broken.run()
    for part in broken.says[1:]:
        assert part in str(error.value), str(error.value)


@pytest.mark.parametrize("package", [nnx, jaxbn.nnx], ids=["flax", "ours"])
def test_nnx_module_is_unchanged_by_what_it_cannot_hold(package):
    module = package.BatchNorm(3, use_bias=False, rngs=nnx.Rngs(0))
    before = flat(nnx.state(module))
    with pytest.raises(ValueError, match="nothing was changed") as error:
        convert.to_nnx(module, *jaxbn.bn_init(4, scale=None, mean=1.0))
    for part in ("they lack: scale", "it lacks, and they have: bias", "mean (4,), where", "var (4,), where", "(3,)"):
        assert part in str(error.value)
    assert_same(flat(nnx.state(module)), before)


def test_equinox_is_unchanged_by_what_it_cannot_hold_and_by_what_it_can():
    layer = Equinox("batch")
    before = layer.arrays()
    with pytest.raises(ValueError, match="nothing was changed") as error:
        convert.to_equinox(layer.layer, layer.state, *jaxbn.bn_init(4, bias=None))
    for part in ("they lack: bias", "mean (4,), where", "scale (4,), where", "(3,)"):
        assert part in str(error.value)
    convert.to_equinox(layer.layer, layer.state, *jaxbn.bn_init(3, mean=1.0))
    assert_same(layer.arrays(), before)  # reading a state that `set` has used up raises
    with pytest.raises(ValueError, match="must hold the statistics of `layer`"):
        convert.from_equinox(layer.layer, layer.state.substate(()))


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


def test_import_needs_none_of_the_packages():
    program = "import sys, jaxbn.convert; print({'torch', 'keras', 'haiku', 'equinox', 'flax'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
