"""Less than any layer: one sum in place of two, forward and backward, whatever the numbers come to.

No entry of y is known before all of x is read, and none of dx before all of x and of the gradient of y; so a training
step goes at least four times over memory: a sum over x, a pass that reads x and writes y, a sum over both, and a pass
that reads both and writes dx. This is those four, each the fastest that XLA has for it, and behind a ReLU a fifth,
which writes the gradient that XLA does not fuse into sums. Real layers need two sums each way: mean and variance, and
the gradients of bias and scale. So this computes no normalization; it bounds what any layer takes that XLA compiles.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmark.fewest import KEPT, Tree, followed, wide
from experiments.benchmark.fewest import apply as evaluated


def apply(params: Tree, state: Tree, x: jax.Array, residual: jax.Array | None, train: bool, relu: bool) -> Any:
    """`(y, new state)`; see `layers.Layer`. Evaluation needs no sums, and is that of `fewest`."""
    if train:
        return _training(relu, params, state, x, residual)
    return evaluated(params, state, x, residual, train, relu)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _training(relu, params, state, x, residual):
    return _forward(relu, params, state, x, residual)[0]


def _scaled(params, mean, x):
    return x.astype(jnp.float32) * params["scale"] + (params["bias"] - mean * params["scale"])


def _forward(relu, params, state, x, residual):
    mean = jnp.mean(wide(x, 1), tuple(range(x.ndim - 1)))
    y = followed(relu, _scaled(params, mean, x), residual).astype(x.dtype)
    new = state | {"mean": KEPT * state["mean"] + (1 - KEPT) * mean}
    return (y, new), (params, x, residual, mean)


def _backward(relu, kept, cotangents):
    params, x, residual, mean = kept
    g = cotangents[0]
    if relu:
        g = jnp.where(followed(False, _scaled(params, mean, x), residual) > 0, g, 0)
    both = jnp.sum(wide(g, 1) * wide(x, 2), tuple(range(x.ndim - 1)))
    slope = both / (x.size / x.shape[-1])
    dx = g.astype(jnp.float32) * params["scale"] - x.astype(jnp.float32) * slope
    d_residual = None if residual is None else g.astype(residual.dtype)
    return {"scale": both, "bias": slope}, None, dx.astype(x.dtype), d_residual


_training.defvjp(_forward, _backward)
