"""Layers and networks that only claims need: noise, other norms, deep stacks."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.training.layers import Layer, Pass
from experiments.training.models import CLASSES, Model, model, sides
from experiments.training.shapes import Images, Logits, Tree

Activation = Callable[[Array], Array]
MOST = 7  # rows of what the blocks of a residual CNN see


def noisy(layer: Layer, activation: Activation) -> Layer:
    """`layer`, then the noise of Santurkar et al. 2018, section 2.1, then the activation; in evaluation no noise.

    Mean and deviation of the noise are drawn again for each unit in each step, so that its distribution never settles.
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


def stack(layer: Layer, depth: int, width: int, kernel: Callable[..., Array], inputs: int = 64) -> Model:
    """Return an MLP of `depth` equal hidden layers under `lax.scan`: as quick to compile at depth 100 as at 2."""

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

    def forward(params: Tree, state: Tree, x: Images, run: Pass) -> tuple[Logits, Tree]:
        def part(tree: Tree, at: Any) -> Tree:
            return jax.tree.map(lambda v: v[at], tree)

        def step(x: Array, given: Any) -> tuple[Array, Tree]:
            kernel, shift, running = given
            return layer.apply(shift, running, x @ kernel, run)

        x, first = layer.apply(part(params["shifts"], 0), part(state, 0), x @ params["first"], run)
        rest = (params["kernels"], part(params["shifts"], slice(1, None)), part(state, slice(1, None)))
        x, others = jax.lax.scan(step, x, rest)
        state = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, others)
        return x @ params["head"] + params["last"][None], state

    return model(init, forward)


def residual_cnn(
    layer: Layer, blocks: int, channels: int, kernel: Callable[..., Array], pixels: int = 64, *, skip: bool = False
) -> Model:
    """Return a residual CNN of `2 blocks + 2` layers: `x + conv(layer(conv(layer(x))))` in each block (He et al. 2016).

    Images are averaged over squares after the first convolution until 7x7 positions or fewer are left, where all blocks
    are. With `skip` the branch of each block is multiplied by a scalar that is learned, from 0 on: SkipInit (De and
    Smith 2020).
    """
    height, width, colours = sides(pixels)

    def init(key: Array) -> tuple[Tree, Tree]:
        first, inner, last = jax.random.split(key, 3)
        params, state = layer.init(channels)
        shifts, running = jax.tree.map(lambda v: jnp.broadcast_to(v, (blocks, 2, *v.shape)), (params, state))
        kernels = jax.vmap(jax.vmap(lambda k: kernel(k, (9 * channels, channels))))(
            jax.random.split(inner, (blocks, 2))
        )
        return {
            "first": kernel(first, (9 * colours, channels)),
            "kernels": kernels,
            "shifts": shifts,
            "end": params,
            "head": kernel(last, (channels, CLASSES)),
            "last": jnp.zeros(CLASSES),
        } | ({"branches": jnp.zeros(blocks)} if skip else {}), {"blocks": running, "end": state}

    def forward(params: Tree, state: Tree, x: Images, run: Pass) -> tuple[Logits, Tree]:
        def block(x: Array, given: Any) -> tuple[Array, Tree]:
            kernels, shifts, running, branch = given
            y, kept = x, []
            for at in range(2):
                shift, own = jax.tree.map(lambda v, at=at: v[at], (shifts, running))
                y, own = layer.apply(shift, own, y, run)
                y = _convolve(y, kernels[at])
                kept.append(own)
            return x + branch * y, jax.tree.map(lambda *v: jnp.stack(v), *kept)

        x = _convolve(jnp.reshape(x, (-1, height, width, colours)), params["first"])
        while x.shape[1] > MOST:
            x = jnp.mean(_squares(x), (2, 4))
        branches = params["branches"] if skip else jnp.ones(blocks)
        x, running = jax.lax.scan(block, x, (params["kernels"], params["shifts"], state["blocks"], branches))
        x, end = layer.apply(params["end"], state["end"], x, run)
        return jnp.mean(x, (1, 2)) @ params["head"] + params["last"][None], {"blocks": running, "end": end}

    return model(init, forward)


def pooled_cnn(layer: Layer, depth: int, channels: int, kernel: Callable[..., Array], pixels: int = 64) -> Model:
    """Return a CNN of `depth` 3x3 convolutions, each with its layer, then averaged over squares of 2x2.

    From 8x8 pixels on, the fourth convolution has one position, so that a batch statistic there has a value an image.
    """
    height, width, colours = sides(pixels)

    def init(key: Array) -> tuple[Tree, Tree]:
        keys = jax.random.split(key, depth + 1)
        sizes = [9 * colours] + [9 * channels] * (depth - 1)
        started = [layer.init(channels) for _ in range(depth)]
        return {
            "kernels": [kernel(k, (n, channels)) for k, n in zip(keys, sizes, strict=False)],
            "shifts": [params for params, _ in started],
            "head": kernel(keys[-1], (channels, CLASSES)),
            "last": jnp.zeros(CLASSES),
        }, [state for _, state in started]

    def forward(params: Tree, state: Tree, x: Images, run: Pass) -> tuple[Logits, Tree]:
        x, kept = jnp.reshape(x, (-1, height, width, colours)), []
        for weight, shift, running in zip(params["kernels"], params["shifts"], state, strict=True):
            x, running = layer.apply(shift, running, _convolve(x, weight), run)
            kept.append(running)
            if min(x.shape[1:3]) > 1:
                x = jnp.mean(_squares(x), (2, 4))
        return jnp.mean(x, (1, 2)) @ params["head"] + params["last"][None], kept

    return model(init, forward)


def _convolve(images: Array, weight: Array) -> Array:
    """Return the 3x3 convolution of `images [n, rows, columns, a]` and `weight [9 a, b]`.

    As the product with a matrix of all positions by all positions: at these sizes that is far quicker on a CPU than to
    copy each neighbourhood.
    """
    n, rows, columns, a = images.shape
    matrix = jnp.einsum("kst,kab->satb", _neighbours(rows, columns), weight.reshape(9, a, -1))
    return jnp.tensordot(images.reshape(n, -1, a), matrix, 2).reshape(n, rows, columns, -1)


@functools.cache
def _neighbours(rows: int, columns: int) -> np.ndarray:
    """Return for each of nine offsets which position `s` is the neighbour of which `t`, `[9, s, t]` of 0 and 1."""
    at = np.indices((rows, columns)).reshape(2, -1)
    offsets = np.array(list(np.ndindex(3, 3))) - 1
    return np.all(at[:, :, None] == at[:, None] + offsets[..., None, None], axis=1).astype(np.float32)


def _squares(images: Array) -> Array:
    """Cut images into squares `[n, rows / 2, 2, columns / 2, 2, channels]`; an odd row or column is left out."""
    n, rows, columns, channels = images.shape
    return images[:, : rows // 2 * 2, : columns // 2 * 2].reshape(n, rows // 2, 2, columns // 2, 2, channels)
