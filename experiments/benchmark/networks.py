"""Whole networks in Flax, with the norm as their parameter: many small layers, and residual networks."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxbn.linen

# `(x, residual, relu) -> y` in training; called inside a module, whose submodule the layer becomes.
Norm = Callable[[jax.Array, jax.Array | None, bool], jax.Array]


def ours(x: jax.Array, residual: jax.Array | None, relu: bool) -> jax.Array:
    """Apply our layer, with the epilogue inside."""
    layer = jaxbn.linen.BatchNorm(use_running_average=False, dtype=x.dtype, activation=nn.relu if relu else None)
    return layer(x, residual=residual)


def theirs(x: jax.Array, residual: jax.Array | None, relu: bool, **options: Any) -> jax.Array:
    """Apply flax's layer, and the epilogue after it."""
    return follow(nn.BatchNorm(use_running_average=False, dtype=x.dtype, **options)(x), residual, relu)


def follow(y: jax.Array, residual: jax.Array | None, relu: bool) -> jax.Array:
    """Apply the epilogue as users write it after a layer that has none."""
    y = y if residual is None else y + residual
    return nn.relu(y) if relu else y


NORMS: dict[str, Norm] = {"jaxbn": ours, "flax": theirs, "flax, stable": partial(theirs, use_fast_variance=False)}


class Deep(nn.Module):
    """`layers` times Dense, norm and ReLU; small, since what is timed is the compiler."""

    norm: Norm
    layers: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[batch, 16]` to the same."""
        for _ in range(self.layers):
            x = self.norm(nn.Dense(16)(x), None, True)
        return x


class Block(nn.Module):
    """Convolutions beside a skip connection: a bottleneck of three, or two of 3x3."""

    norm: Norm
    features: int
    stride: int
    bottleneck: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images `[batch, height, width, channels]` to `[..., height / stride, width / stride, features]`."""
        f, y = self.features, x
        inner = [(f, 1, 1), (f, 3, self.stride)] if self.bottleneck else [(f, 3, self.stride)]
        for features, size, stride in inner:
            y = self.norm(_conv(y, features, size, stride), None, True)
        y = _conv(y, 4 * f, 1, 1) if self.bottleneck else _conv(y, f, 3, 1)
        if x.shape != y.shape:
            x = self.norm(_conv(x, y.shape[-1], 1, self.stride), None, False)
        return self.norm(y, x, True)


class ResNet(nn.Module):
    """ResNet-50 if `stages` is `(3, 4, 6, 3)`.

    For `small` images (He et al. 2016, section 4.2) it begins with 3x3, has blocks of two convolutions and ten classes;
    with a width of 16 and `(3, 3, 3)` it is ResNet-20.
    """

    norm: Norm
    stages: Sequence[int]
    width: int = 64
    small: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[batch, height, width, 3]` to the logits `[batch, classes]`, float32."""
        x = self.norm(_conv(x, self.width, *((3, 1) if self.small else (7, 2))), None, True)
        x = x if self.small else nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for i, blocks in enumerate(self.stages):
            for j in range(blocks):
                x = Block(self.norm, self.width * 2**i, 2 if i and not j else 1, not self.small)(x)
        return nn.Dense(10 if self.small else 1000)(jnp.mean(x, (1, 2)).astype(jnp.float32))


def _conv(x: jax.Array, features: int, size: int, stride: int) -> jax.Array:
    return nn.Conv(features, (size, size), stride, use_bias=False, dtype=x.dtype)(x)
