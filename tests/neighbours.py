"""Train, evaluate, convert and load the layers of each package that `jaxbn.convert` knows, by the same calls."""

import os
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxbn import convert

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
    """Promote dtypes and ranks by JAX's own rules, for other packages."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def flat(tree) -> dict[str, np.ndarray]:
    """Return the leaves of a tree by their paths."""
    return {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


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
