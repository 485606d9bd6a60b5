"""The networks that a config can name: an MLP, a small CNN in Flax, an LSTM."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from experiments.training import layers
from experiments.training.config import Settings
from experiments.training.data import Data
from experiments.training.layers import ACTIVATIONS, Pass
from experiments.training.models import CLASSES, Model, gaussian, inverted, mlp, model, sides
from experiments.training.recurrent import Recurrence, lstm
from experiments.training.shapes import Images, Logits, Tree
from jaxbn.linen import BatchNorm


def build(settings: Settings, arm: str, data: Data | None = None) -> Model:
    """Build the network of `settings` with the norm `arm`, for examples like those of `data`, digits by default."""
    pixels, shape, classes = (64, (), CLASSES) if data is None else (data.pixels, data.shape, data.classes)
    if settings.model == "cnn":
        return cnn(settings, arm, shape or sides(pixels), classes)
    if settings.model == "lstm":
        how, steps = Recurrence(arm, momentum=settings.bn_momentum), (shape or sides(pixels))[0]
        ragged = len(shape) == 2
        return lstm(how, settings.widths[0], steps, weights(settings), pixels, outputs=classes, ragged=ragged)
    layer = layers.of(settings, arm)
    made = mlp([layer] * len(settings.widths), settings.widths, weights(settings), pixels, classes)
    return inverted(made) if settings.domains == "inverted" else made


def weights(settings: Settings) -> Callable[..., Array]:
    """Make an initializer of kernels `[..., inputs, outputs]`, where all axes but the last count as fan-in."""
    return gaussian(settings.init_scale, he=settings.init == "he")


class ConvNet(nn.Module):
    """3x3 convolutions, each with an optional norm, the activation and 2x2 pooling; then one dense layer."""

    settings: Settings
    arm: str
    shape: tuple[int, ...]
    classes: int

    @nn.compact
    def __call__(self, images: Images, train: bool, axis_name: Any = None, mask: Array | None = None) -> Logits:
        """Return the logits."""
        activation, kernel = ACTIVATIONS[self.settings.activation], weights(self.settings)
        x = jnp.reshape(images, (-1, *self.shape))
        mask = None if mask is None else jnp.reshape(mask, (-1, 1, 1, 1))
        for channels in self.settings.widths:
            x = nn.Conv(channels, (3, 3), use_bias=self.arm == "none", kernel_init=kernel)(x)
            if self.arm == "none":
                x = activation(x)
            elif self.arm == "group":
                x = activation(nn.GroupNorm(self.settings.norm_groups)(x))
            else:
                x = BatchNorm(not train, axis_name=axis_name, **layers.options(self.settings, self.arm))(x, mask=mask)
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(self.classes, kernel_init=kernel)(x.reshape(x.shape[0], -1))


def cnn(settings: Settings, arm: str, shape: tuple[int, ...], classes: int) -> Model:
    """Make a small convolutional network in Flax, with `jaxbn.linen.BatchNorm`."""
    net = ConvNet(settings, arm, shape, classes)

    def init(key: Array) -> tuple[Tree, Tree]:
        variables = net.init(key, jnp.zeros((1, math.prod(shape))), train=False)
        return variables["params"], variables.get("batch_stats", {})

    def forward(params: Tree, state: Tree, x: Images, run: Pass) -> tuple[Logits, Tree]:
        variables, changed = {"params": params, "batch_stats": state}, ["batch_stats"] if run.train else []
        logits, new = net.apply(variables, x, run.train, run.axis_name, run.mask, mutable=changed)
        return logits, new["batch_stats"] if run.train and state else state

    return model(init, forward)
