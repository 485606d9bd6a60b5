"""The two networks, each with and without batch norm, as pairs of pure functions.

Both arms of a pair get the same weights from the same key; a bias that batch norm would take out is left away.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

import jaxbn
from experiments.config import Settings
from experiments.shapes import Images, Logits, Tree
from jaxbn.linen import BatchNorm

CLASSES = 10
ACTIVATIONS = {"sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh, "relu": jax.nn.relu}


class Model(NamedTuple):
    """A network: `init(key) -> (params, state)` and `apply(params, state, x, train, axis_name) -> (logits, state)`.

    `x` is `[batch, 64]`. `state` holds the running statistics; it is an empty tree where there are none.
    """

    init: Callable[[jax.Array], tuple[Any, Any]]
    apply: Callable[[Any, Any, jax.Array, bool, str | None], tuple[jax.Array, Any]]


def build(settings: Settings, arm: str) -> Model:
    """The network of `settings` with the norm `arm`."""
    return {"mlp": mlp, "cnn": cnn}[settings.model](settings, arm == "batch")


def weights(settings: Settings) -> Callable[..., Array]:
    """An initializer of kernels `[..., inputs, outputs]`, where all axes but the last count as fan-in."""

    def init(key, shape, dtype=jnp.float32):
        he = math.sqrt(2 / math.prod(shape[:-1])) if settings.init == "he" else 1.0
        return jnp.asarray(settings.init_scale * he, dtype) * jax.random.normal(key, shape, dtype)

    return init


def mlp(settings: Settings, norm: bool) -> Model:
    """Fully connected layers; batch norm, if any, before the activation, through the functional core."""
    activation, kernel = ACTIVATIONS[settings.activation], weights(settings)
    sizes = (64, *settings.widths)

    def init(key: Array) -> tuple[Tree, Tree]:
        keys = jax.random.split(key, len(sizes))
        kernels = [
            kernel(k, shape) for k, shape in zip(keys, zip(sizes, (*sizes[1:], CLASSES), strict=True), strict=True)
        ]
        norms = [jaxbn.bn_init(n) if norm else (jnp.zeros(n), None) for n in sizes[1:]]
        params = {"kernels": kernels, "shifts": [p for p, _ in norms], "last": jnp.zeros(CLASSES)}
        return params, [s for _, s in norms]

    def apply(params: Tree, state: Tree, x: Images, train: bool, axis_name: str | None) -> tuple[Logits, Tree]:
        new_state = []
        for w, shift, running in zip(params["kernels"], params["shifts"], state, strict=False):
            x = x @ w
            if norm:
                # The activation inside the layer: no memory for what lies between the two.
                x, running = jaxbn.bn_apply(
                    shift, running, x, train, momentum=settings.bn_momentum, axis_name=axis_name, activation=activation
                )
            else:
                x = activation(x + shift[None])
            new_state.append(running)
        return x @ params["kernels"][-1] + params["last"][None], new_state

    return Model(init, apply)


class ConvNet(nn.Module):
    """3x3 convolutions, each with an optional norm, the activation and 2x2 pooling; then one dense layer."""

    settings: Settings
    norm: bool

    @nn.compact
    def __call__(self, images: Images, train: bool, axis_name: str | None = None) -> Logits:
        """Class scores."""
        activation, kernel = ACTIVATIONS[self.settings.activation], weights(self.settings)
        x = jnp.reshape(images, (-1, 8, 8, 1))
        for channels in self.settings.widths:
            x = nn.Conv(channels, (3, 3), use_bias=not self.norm, kernel_init=kernel)(x)
            if self.norm:
                x = BatchNorm(
                    use_running_average=not train,
                    momentum=self.settings.bn_momentum,
                    axis_name=axis_name,
                    activation=activation,
                )(x)
            else:
                x = activation(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(CLASSES, kernel_init=kernel)(x.reshape(x.shape[0], -1))


def cnn(settings: Settings, norm: bool) -> Model:
    """A small convolutional network in Flax, with `jaxbn.linen.BatchNorm`."""
    net = ConvNet(settings, norm)

    def init(key: Array) -> tuple[Tree, Tree]:
        variables = net.init(key, jnp.zeros((1, 64)), train=False)
        return variables["params"], variables.get("batch_stats", {})

    def apply(params: Tree, state: Tree, x: Images, train: bool, axis_name: str | None) -> tuple[Logits, Tree]:
        variables = {"params": params, "batch_stats": state}
        logits, new = net.apply(variables, x, train, axis_name, mutable=["batch_stats"] if train else [])
        return logits, new["batch_stats"] if train and state else state

    return Model(init, apply)
