"""The networks that a config can name: an MLP, a small CNN in Flax, an LSTM."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from experiments.training import layers
from experiments.training.config import Settings
from experiments.training.layers import ACTIVATIONS
from experiments.training.models import CLASSES, Model, gaussian, inverted, mlp, sides
from experiments.training.recurrent import Recurrence, lstm
from experiments.training.shapes import Images, Logits, Tree
from jaxbn.linen import BatchNorm


def build(settings: Settings, arm: str, pixels: int = 64) -> Model:
    """The network of `settings` with the norm `arm`, for images of so many values."""
    if settings.model == "cnn":
        return cnn(settings, arm, pixels)
    if settings.model == "lstm":
        how = Recurrence(arm, momentum=settings.bn_momentum)
        return lstm(how, settings.widths[0], sides(pixels)[0], weights(settings), pixels)
    made = mlp([layers.of(settings, arm)] * len(settings.widths), settings.widths, weights(settings), pixels)
    return inverted(made) if settings.domains == "inverted" else made


def weights(settings: Settings) -> Callable[..., Array]:
    """An initializer of kernels `[..., inputs, outputs]`, where all axes but the last count as fan-in."""
    return gaussian(settings.init_scale, he=settings.init == "he")


class ConvNet(nn.Module):
    """3x3 convolutions, each with an optional norm, the activation and 2x2 pooling; then one dense layer."""

    settings: Settings
    arm: str
    pixels: int

    @nn.compact
    def __call__(self, images: Images, train: bool, axis_name: str | None = None) -> Logits:
        """Class scores."""
        activation, kernel = ACTIVATIONS[self.settings.activation], weights(self.settings)
        x = jnp.reshape(images, (-1, *sides(self.pixels)))
        for channels in self.settings.widths:
            x = nn.Conv(channels, (3, 3), use_bias=self.arm == "none", kernel_init=kernel)(x)
            if self.arm == "none":
                x = activation(x)
            else:
                x = BatchNorm(not train, axis_name=axis_name, **layers.options(self.settings, self.arm))(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(CLASSES, kernel_init=kernel)(x.reshape(x.shape[0], -1))


def cnn(settings: Settings, arm: str, pixels: int) -> Model:
    """A small convolutional network in Flax, with `jaxbn.linen.BatchNorm`."""
    net = ConvNet(settings, arm, pixels)

    def init(key: Array) -> tuple[Tree, Tree]:
        variables = net.init(key, jnp.zeros((1, pixels)), train=False)
        return variables["params"], variables.get("batch_stats", {})

    def apply(
        params: Tree, state: Tree, x: Images, train: bool, axis_name: str | None, key: Array | None = None
    ) -> tuple[Logits, Tree]:
        variables = {"params": params, "batch_stats": state}
        logits, new = net.apply(variables, x, train, axis_name, mutable=["batch_stats"] if train else [])
        return logits, new["batch_stats"] if train and state else state

    return Model(init, apply)
