"""Nobody's layer: the fewest passes over memory that XLA can be asked for, whatever the numbers come to.

It takes `E[x^2] - E[x]^2` for the variance and `E[g x] - E[g] E[x]` for the covariance in float32, as they are: two
sums and one pass forward, two sums and one pass backward. Each sum widens its arrays for itself, and the gradient
behind a ReLU is written in the dtype of x, so that no pass reads or writes more bytes than it must. What an exact layer
takes more is the price of being exact; what this takes more than another library is the price of XLA's passes, whatever
the layer.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

EPSILON, KEPT = 1e-5, 0.99
Tree = Any


def start(mean: jax.Array, var: jax.Array) -> Tree:
    """Return the state."""
    return {"mean": mean, "var": var}


def apply(params: Tree, state: Tree, x: jax.Array, residual: jax.Array | None, train: bool, relu: bool) -> Any:
    """`(y, new state)`; see `layers.Layer`."""
    if train:
        return _training(relu, params, state, x, residual)
    return followed(relu, normalized(params, state["mean"], state["var"], x), residual).astype(x.dtype), state


def normalized(params: Tree, mean: jax.Array, var: jax.Array, x: jax.Array) -> jax.Array:
    """Scaled and shifted in one product and one sum, float32."""
    gain = params["scale"] * jax.lax.rsqrt(var + EPSILON)
    return x.astype(jnp.float32) * gain + (params["bias"] - mean * gain)


def followed(relu: bool, y: jax.Array, residual: jax.Array | None) -> jax.Array:
    """Return the epilogue that follows the layer."""
    y = y if residual is None else y + residual
    return jnp.maximum(y, 0) if relu else y


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _training(relu, params, state, x, residual):
    return _forward(relu, params, state, x, residual)[0]


def wide(v: jax.Array, apart: int) -> jax.Array:
    """In float32; on a CPU not the array that others get, which would be written to memory for all of them."""
    if jax.default_backend() == "cpu":
        for _ in range(apart):
            v = jax.lax.optimization_barrier(v)
    return v.astype(jnp.float32)


def _forward(relu, params, state, x, residual):
    axes = tuple(range(x.ndim - 1))
    mean = jnp.mean(wide(x, 1), axes)
    var = jnp.mean(jnp.square(wide(x, 2)), axes) - mean * mean
    y = followed(relu, normalized(params, mean, var, x), residual).astype(x.dtype)
    new = {k: KEPT * state[k] + (1 - KEPT) * v for k, v in (("mean", mean), ("var", var))}
    return (y, new), (params, x, residual, mean, var)


def _backward(relu, kept, cotangents):
    params, x, residual, mean, var = kept
    g, axes = cotangents[0], tuple(range(x.ndim - 1))
    if relu:
        g = jnp.where(followed(False, normalized(params, mean, var, x), residual) > 0, g, 0)
    inverse = jax.lax.rsqrt(var + EPSILON)
    d_bias = jnp.sum(wide(g, 1), axes)
    d_scale = (jnp.sum(wide(g, 2) * wide(x, 3), axes) - mean * d_bias) * inverse
    gain, n = params["scale"] * inverse, x.size / x.shape[-1]
    slope = gain * inverse * d_scale / n
    dx = g.astype(jnp.float32) * gain - x.astype(jnp.float32) * slope + (mean * slope - gain * d_bias / n)
    d_residual = None if residual is None else g.astype(residual.dtype)
    return {"scale": d_scale, "bias": d_bias}, None, dx.astype(x.dtype), d_residual


_training.defvjp(_forward, _backward)
