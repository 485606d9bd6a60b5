"""Layers and networks that only claims need: noise, other norms, deep stacks."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import jaxbn
from experiments.training.layers import Layer, Pass
from experiments.training.models import CLASSES, Model, sides
from experiments.training.shapes import Images, Logits, Tree

Activation = Callable[[Array], Array]


def noisy(layer: Layer, activation: Activation) -> Layer:
    """`layer`, then the noise of Santurkar et al. 2018, section 2.1, then the activation; in evaluation no noise.

    Mean and deviation of the noise are drawn anew for each unit in each step, so that its distribution never settles.
    """

    def apply(params: Tree, state: Tree, x: Array, run: Pass) -> tuple[Array, Tree]:
        y, state = layer.apply(params, state, x, run)
        if run.train and run.key is not None:
            keys = jax.random.split(run.key, 4)
            mean = jax.random.uniform(keys[0], (1, *y.shape[1:]), minval=-0.5, maxval=0.5)
            deviation = jax.random.uniform(keys[1], (1, *y.shape[1:]), minval=1.0, maxval=1.25)
            shift = mean + jax.random.uniform(keys[2], y.shape, minval=-0.1, maxval=0.1)
            y = (deviation + 0.1 * jax.random.normal(keys[3], y.shape)) * y + shift
        return activation(y), state

    return Layer(layer.init, apply)


def group_norm(groups: int, activation: Activation, epsilon: float = 1e-5) -> Layer:
    """Group norm (Wu and He 2018): over all of an example within a group of channels; with one group layer norm."""

    def apply(params: Tree, state: None, x: Array, run: Pass) -> tuple[Array, None]:
        parts = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
        mean, var = jnp.mean(parts, (1, 3), keepdims=True), jnp.var(parts, (1, 3), keepdims=True)
        normal = ((parts - mean) * jax.lax.rsqrt(var + epsilon)).reshape(x.shape)
        ones = (1,) * (x.ndim - 1)
        return activation(normal * params.scale.reshape(*ones, -1) + params.bias.reshape(*ones, -1)), state

    return Layer(lambda features: (jaxbn.bn_init(features)[0], None), apply)


def stack(
    layer: Layer, depth: int, width: int, kernel: Callable[..., Array], inputs: int = 64, *, residual: bool = False
) -> Model:
    """Return an MLP of `depth` equal hidden layers under `lax.scan`: as quick to compile at depth 100 as at 2.

    With `residual` each layer but the first adds what it got: `x + layer(x W)`.
    """

    def init(key: Array) -> tuple[Tree, Tree]:
        keys = jax.random.split(key, depth + 1)
        params, state = jax.tree.map(lambda v: jnp.broadcast_to(v, (depth, *v.shape)), layer.init(width))
        return {
            "first": kernel(keys[0], (inputs, width)),
            "kernels": jax.vmap(lambda k: kernel(k, (width, width)))(keys[1:-1]),
            "shifts": params,
            "head": kernel(keys[-1], (width, CLASSES)),
            "last": jnp.zeros(CLASSES),
        }, state

    def apply(
        params: Tree, state: Tree, x: Images, train: bool, axis_name: str | None, key: Array | None = None
    ) -> tuple[Logits, Tree]:
        run = Pass(train, axis_name, key)

        def part(tree: Tree, at: Any) -> Tree:
            return jax.tree.map(lambda v: v[at], tree)

        def step(x: Array, given: Any) -> tuple[Array, Tree]:
            kernel, shift, running = given
            y, running = layer.apply(shift, running, x @ kernel, run)
            return (x + y if residual else y), running

        x, first = layer.apply(part(params["shifts"], 0), part(state, 0), x @ params["first"], run)
        rest = (params["kernels"], part(params["shifts"], slice(1, None)), part(state, slice(1, None)))
        x, others = jax.lax.scan(step, x, rest)
        state = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, others)
        return x @ params["head"] + params["last"][None], state

    return Model(init, apply)


def conv(layers: Sequence[Layer], channels: Sequence[int], kernel: Callable[..., Array], pixels: int = 64) -> Model:
    """3x3 convolutions, each with its layer and 2x2 max pooling, then a dense layer.

    The convolution is a product with the nine shifted images: under `vmap` over seeds that is far quicker on a CPU than
    a convolution with kernels of its own for each.
    """
    height, width, colours = sides(pixels)
    sizes = (colours, *channels)
    left = (height >> len(channels)) * (width >> len(channels)) * channels[-1]

    def init(key: Array) -> tuple[Tree, Tree]:
        keys = jax.random.split(key, len(sizes))
        kernels = [kernel(k, (9 * a, b)) for k, a, b in zip(keys, sizes, channels, strict=False)]
        started = [layer.init(n) for layer, n in zip(layers, channels, strict=True)]
        params = {"kernels": kernels, "shifts": [p for p, _ in started], "head": kernel(keys[-1], (left, CLASSES))}
        return params | {"last": jnp.zeros(CLASSES)}, [s for _, s in started]

    def apply(
        params: Tree, state: Tree, x: Images, train: bool, axis_name: str | None, key: Array | None = None
    ) -> tuple[Logits, Tree]:
        images, new_state = jnp.reshape(x, (-1, height, width, colours)), []
        for layer, weight, shift, running in zip(layers, params["kernels"], params["shifts"], state, strict=True):
            rows, columns = images.shape[1:3]
            wide = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
            near = [wide[:, i : i + rows, j : j + columns] for i, j in np.ndindex(3, 3)]
            y, running = layer.apply(shift, running, jnp.concatenate(near, -1) @ weight, Pass(train, axis_name, key))
            y = y[:, : rows // 2 * 2, : columns // 2 * 2]
            images = jnp.max(y.reshape(y.shape[0], rows // 2, 2, columns // 2, 2, -1), (2, 4))
            new_state.append(running)
        return images.reshape(images.shape[0], -1) @ params["head"] + params["last"][None], new_state

    return Model(init, apply)
