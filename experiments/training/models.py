"""A network is a pair of pure functions; the MLP of any layers.

All arms get the same weights from the same key; a bias that batch norm would take out is left away.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from experiments.training.layers import Layer, Pass
from experiments.training.shapes import Images, Logits, Tree

CLASSES = 10


class Model(NamedTuple):
    """A network of pure functions.

    Attributes:
        init: `key -> (params, state)`; `state` holds the running statistics, an empty tree where there are none.
        apply: `(params, state, x, train, axis_name, key=None) -> (outputs, state)`, where x is `[batch, pixels]` and
            `key` is for what is random in training. The networks of `networks` take a `mask=None` of examples too.
        hidden: `(params, state, x, run) -> [(entering, leaving), ...]`, what each hidden layer gets and gives.
    """

    init: Callable[[jax.Array], tuple[Any, Any]]
    apply: Callable[..., tuple[jax.Array, Any]]
    hidden: Callable[..., list[tuple[jax.Array, jax.Array]]] | None = None


def model(init: Callable[[jax.Array], tuple[Any, Any]], forward: Callable[..., tuple[Any, Any]]) -> Model:
    """Make a network of `forward(params, state, x, run)`, where `run` is a `Pass`."""

    def apply(params: Tree, state: Tree, x: Images, *run: Any, **more: Any) -> tuple[Logits, Tree]:
        return forward(params, state, x, Pass(*run, **more))

    return Model(init, apply)


def gaussian(scale: float, *, he: bool) -> Callable[..., Array]:
    """Make an initializer with standard deviation `scale`, times that of He et al. 2015 if `he`."""

    def init(key, shape, dtype=jnp.float32):
        factor = math.sqrt(2 / math.prod(shape[:-1])) if he else 1.0
        return jnp.asarray(scale * factor, dtype) * jax.random.normal(key, shape, dtype)

    return init


def sides(pixels: int) -> tuple[int, int, int]:
    """Return height, width and channels of an image of so many values."""
    channels = 1 if math.isqrt(pixels) ** 2 == pixels else 3
    side = math.isqrt(pixels // channels)
    return side, side, channels


def mlp(
    between: Sequence[Layer],
    widths: Sequence[int],
    kernel: Callable[..., Array],
    inputs: int = 64,
    outputs: int = CLASSES,
) -> Model:
    """Make fully connected layers of `widths` units, after each its layer of `between`."""
    shapes = list(pairwise((inputs, *widths, outputs)))

    def init(key: Array) -> tuple[Tree, Tree]:
        keys = jax.random.split(key, len(shapes))
        kernels = [kernel(k, shape) for k, shape in zip(keys, shapes, strict=True)]
        started = [layer.init(n) for layer, n in zip(between, widths, strict=True)]
        params = {"kernels": kernels, "shifts": [p for p, _ in started], "last": jnp.zeros(outputs)}
        return params, [s for _, s in started]

    def hidden(params: Tree, state: Tree, x: Images, run: Pass) -> tuple[list[tuple[Array, Array]], Tree]:
        seen, new_state = [(jnp.asarray(x), jnp.asarray(x))], []
        for at, layer in enumerate(between):
            # Of its own for each layer: equal noise everywhere would be another experiment.
            own = run if run.key is None else run._replace(key=jax.random.fold_in(run.key, at))
            entering = seen[-1][1] @ params["kernels"][at]
            leaving, running = layer.apply(params["shifts"][at], state[at], entering, own)
            seen.append((entering, leaving))
            new_state.append(running)
        return seen[1:], new_state

    def forward(params: Tree, state: Tree, x: Images, run: Pass) -> tuple[Logits, Tree]:
        seen, new_state = hidden(params, state, x, run)
        return seen[-1][1] @ params["kernels"][-1] + params["last"][None], new_state

    return model(init, forward)._replace(hidden=lambda *given: hidden(*given)[0])


def inverted(model: Model) -> Model:
    """Make the same network, that sees every other image of a batch as a negative."""

    def apply(params: Tree, state: Tree, x: Images, *run: Any, **key: Any) -> tuple[Logits, Tree]:
        x = jnp.where(jnp.arange(x.shape[0])[:, None] % 2 == 0, x, 1 - x)
        return model.apply(params, state, x, *run, **key)

    return Model(model.init, apply)
