"""Refuse what is no layer, no plain number, or no usable statistic."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.convert
import jaxbn.linen

X = np.asarray(np.random.default_rng(0).normal(2, 3, size=(8, 3)), np.float32)
pytestmark = pytest.mark.usefixtures("ordinary_promotion")


def rngs():
    return nnx.Rngs(0)


PAIRS = {"Dense_0": "BatchNorm_0"}
NOT_A_LAYER = {
    "from_torch": lambda v: jaxbn.convert.from_torch(v),
    "to_torch": lambda v: jaxbn.convert.to_torch(v, v),
    "from_keras": lambda v: jaxbn.convert.from_keras(v),
    "to_keras": lambda v: jaxbn.convert.to_keras(v, v),
    "from_linen": lambda v: jaxbn.convert.from_linen(v),
    "to_linen": lambda v: jaxbn.convert.to_linen(v, v),
    "from_nnx": lambda v: jaxbn.convert.from_nnx(v),
    "to_nnx": lambda v: jaxbn.convert.to_nnx(nnx.BatchNorm(3, rngs=rngs()), v, v),
    "from_haiku": lambda v: jaxbn.convert.from_haiku(v, v, "bn"),
    "to_haiku": lambda v: jaxbn.convert.to_haiku(v, v, "bn", ndim=2, decay_rate=0.9),
    "from_equinox": lambda v: jaxbn.convert.from_equinox(v, v),
    "to_equinox": lambda v: jaxbn.convert.to_equinox(v, v, *jaxbn.bn_init(3)),
    "from_torch_network": lambda v: jaxbn.convert.from_torch_network({}, v, {}),
    "from_keras_network": lambda v: jaxbn.convert.from_keras_network({}, v, {}),
    "names": lambda v: jaxbn.convert.from_torch_network({}, {}, v),
    "linen.recalibrate": lambda v: jaxbn.linen.recalibrate(lambda v, x: None, v, [X]),
    "linen.health": lambda v: jaxbn.linen.health(v),
    "linen.fold": lambda v: jaxbn.linen.fold(lambda v, x: x, v, X, pairs=PAIRS),
    "linen.convert": lambda v: jaxbn.linen.convert(v),
    "linen.affine_mask": lambda v: jaxbn.linen.affine_mask(v),
}


@pytest.mark.parametrize("value", [None, 3, np.ones(3), {1: np.ones(3)}, {"a": None}], ids=str)
@pytest.mark.parametrize("name", NOT_A_LAYER)
def test_values_that_are_no_layers_are_refused(name, value):
    if name == "names" and isinstance(value, dict) and "a" in value:
        return  # a layer that is to stay as it is
    with pytest.raises((TypeError, ValueError), match=r"must|not|lacks|Take|does not") as error:
        NOT_A_LAYER[name](value)
    assert error.value.__traceback__ is not None
    frame = error.traceback[-1]
    assert "jaxbn" in str(frame.path), error.value


class Tensor:
    """A tensor that answers as PyTorch's do on the meta device, sparse or quantized."""

    dtype, shape = "torch.float32", (3,)

    def __init__(self, says):
        self.says = says

    def detach(self):
        """Return itself, as PyTorch does."""
        return self

    def cpu(self):
        """Return itself, or refuse, as PyTorch does."""
        if isinstance(self.says, NotImplementedError):
            raise self.says
        return self

    def __array__(self, *_, **__):
        raise self.says


TENSORS = {
    "meta": NotImplementedError("Cannot copy out of meta tensor; no data!"),
    "sparse": TypeError("can't convert Sparse layout tensor to numpy."),
    "quantized": TypeError("Got unsupported ScalarType QInt8"),
}
SAVED = {"running_mean": np.zeros(3, np.float32), "running_var": np.ones(3, np.float32), "num_batches_tracked": 1}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_without_plain_numbers(kind):
    saved: Any = {**SAVED, "running_mean": Tensor(TENSORS[kind])}
    target = {"batch_stats": {"bn": {"mean": np.zeros(3, np.float32), "var": np.zeros(3, np.float32)}}}
    for call in (
        lambda: jaxbn.convert.from_torch(saved),
        lambda: jaxbn.convert.from_torch_network(target, {f"bn.{k}": v for k, v in saved.items()}, {"bn": "bn"}),
    ):
        with pytest.raises(TypeError, match=r"running_mean.*dense"):
            call()


NAN = np.array([1.0, np.nan, 1.0], np.float32)
NEGATIVE = np.array([1.0, -1.0, 1.0], np.float32)


def as_linen(name, value):
    stats = {"mean": np.zeros(3, np.float32), "var": np.ones(3, np.float32), name: value}
    return jaxbn.convert.from_linen({"batch_stats": stats})


def as_torch(name, value):
    return jaxbn.convert.from_torch({**SAVED, f"running_{name}": value})


def as_network(name, value):
    target = {"batch_stats": {"mean": np.zeros(3, np.float32), "var": np.zeros(3, np.float32)}}
    return jaxbn.convert.from_torch_network(target, {**SAVED, f"running_{name}": value}, {"": ""})


def to_torch(name, value):
    params, state = jaxbn.bn_init(3)
    return jaxbn.convert.to_torch(params, state._replace(**{name: jnp.asarray(value)}))


@pytest.mark.parametrize("call", [as_linen, as_torch, as_network, to_torch])
@pytest.mark.parametrize(("name", "value"), [("var", NAN), ("var", NEGATIVE), ("mean", NAN)])
def test_statistics_that_evaluation_cannot_use(call, name, value):
    with pytest.raises(ValueError, match=r"NaN|negative"):
        call(name, value)


EMA = {"hidden": np.full((1, 3), 0.1), "average": np.ones((1, 3)), "counter": np.int32(1)}


def as_haiku(axis=-1, name="bn"):
    return jaxbn.convert.from_haiku({}, {"bn/~/mean_ema": EMA, "bn/~/var_ema": EMA}, name, axis=axis)


def to_haiku(name):
    return jaxbn.convert.to_haiku(*jaxbn.bn_init(3), name, ndim=2, decay_rate=0.9)


def abstract():
    return nnx.eval_shape(lambda: nnx.BatchNorm(3, rngs=rngs()))


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: as_haiku("x"), TypeError, "`axis` must be an int .*; got 'x'"),
        (lambda: as_haiku(None), TypeError, "`axis` must be an int .*; got None"),
        (lambda: as_haiku(1.5), TypeError, "`axis` must be an int .*; got 1.5"),
        (lambda: as_haiku((1, -1)), ValueError, r"`axis` must not name an axis twice; got \(1, -1\)"),
        (lambda: as_haiku(5), ValueError, r"`axis` must lie in \[-2, 2\).*; got 5"),
        (lambda: as_haiku(name=["bn"]), TypeError, r"`name` must be a string.*; got \['bn'\]"),
        (lambda: to_haiku(None), TypeError, "`name` must be a string.*; got None"),
        (lambda: jaxbn.convert.from_nnx(abstract()), TypeError, "'scale' must hold numbers.*shape and a dtype alone"),
        (lambda: jax.jit(jaxbn.convert.to_torch)(*jaxbn.bn_init(3)), TypeError, "must hold numbers.*outside `jax.jit`"),
        (lambda: jax.jit(jaxbn.convert.to_keras)(*jaxbn.bn_init(3)), TypeError, "must hold numbers.*outside `jax.jit`"),
    ],
)
def test_arguments_and_traced_arrays_are_refused(call, kind, words):
    with pytest.raises(kind, match=words) as error:
        call()
    assert type(error.value) is kind
