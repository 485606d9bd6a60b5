"""Whole networks in Flax, with the norm as their parameter: fifty small layers, and ResNet-50 as it is trained."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxbn.linen

# `(x, residual, relu) -> y` in training; called inside a module, whose submodule the layer becomes.
Norm = Callable[[jax.Array, jax.Array | None, bool], jax.Array]


def ours(x: jax.Array, residual: jax.Array | None, relu: bool) -> jax.Array:
    """Return the epilogue inside the layer."""
    layer = jaxbn.linen.BatchNorm(use_running_average=False, dtype=x.dtype, activation=nn.relu if relu else None)
    return layer(x, residual=residual)


def theirs(x: jax.Array, residual: jax.Array | None, relu: bool) -> jax.Array:
    """Return the epilogue after the layer."""
    y = nn.BatchNorm(use_running_average=False, dtype=x.dtype)(x)
    y = y if residual is None else y + residual
    return nn.relu(y) if relu else y


NORMS: dict[str, Norm] = {"jaxbn": ours, "flax": theirs}


class Deep(nn.Module):
    """`layers` times Dense, norm and ReLU; small, since what is timed is the compiler."""

    norm: Norm
    layers: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, 16]` to the same."""
        for _ in range(self.layers):
            x = self.norm(nn.Dense(16)(x), None, True)
        return x


class Block(nn.Module):
    """A bottleneck of three convolutions beside a skip connection."""

    norm: Norm
    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, height, width, channels]` to `[batch, height / stride, width / stride, 4 features]`."""
        y = self.norm(_conv(x, self.features, 1, 1), None, True)
        y = self.norm(_conv(y, self.features, 3, self.stride), None, True)
        y = _conv(y, 4 * self.features, 1, 1)
        if x.shape != y.shape:
            x = self.norm(_conv(x, 4 * self.features, 1, self.stride), None, False)
        return self.norm(y, x, True)


class ResNet(nn.Module):
    """ResNet-50 if `stages` is `(3, 4, 6, 3)`."""

    norm: Norm
    stages: Sequence[int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, height, width, 3]` to `[batch, 1000]`, float32."""
        x = nn.max_pool(self.norm(_conv(x, 64, 7, 2), None, True), (3, 3), (2, 2), "SAME")
        for i, blocks in enumerate(self.stages):
            for j in range(blocks):
                x = Block(self.norm, 64 * 2**i, 2 if i and not j else 1)(x)
        return nn.Dense(1000)(jnp.mean(x, (1, 2)).astype(jnp.float32))


def _conv(x: jax.Array, features: int, size: int, stride: int) -> jax.Array:
    return nn.Conv(features, (size, size), stride, use_bias=False, dtype=x.dtype)(x)
