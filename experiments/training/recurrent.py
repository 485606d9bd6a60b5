"""LSTMs that read an image piece by piece: without norm, or with norms where the literature has put them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

import jaxbn
from experiments.training.layers import Pass
from experiments.training.models import CLASSES, Model, model
from experiments.training.shapes import Images, Logits, Tree


class Recurrence(NamedTuple):
    """The normalization of an LSTM.

    Attributes:
        norm: `batch`, with statistics for each step or shared by all; `input`, batch norm of the inputs' share of the
            gates alone, over all steps at once (Laurent et al. 2016); `layer` (Ba et al. 2016); or `none`.
        scale: where the scales start; 0.1 for `batch` by Cooijmans et al., 1 for others.
        shared: whether all steps of `batch` share one record of running statistics.
        noise: standard deviation of what `batch` starts from in training, instead of zeros.
        momentum: of the running statistics.
    """

    norm: str = "none"
    scale: float = 0.1
    shared: bool = False
    noise: float = 0.0
    momentum: float = 0.9


def lstm(
    how: Recurrence,
    hidden: int,
    steps: int,
    head: Callable[..., Array],
    pixels: int = 64,
    order: Any = None,
    outputs: int = CLASSES,
    ragged: bool = False,
) -> Model:
    """Make an LSTM over `steps` pieces of an image, its pixels in `order`, and a dense layer on its last output.

    All ways to normalize it get the same kernels from the same key. With `ragged` examples are sequences that are NaN
    after their end: the last output is that of the last step before it, and later steps enter no statistic.
    """

    def init(key: Array) -> tuple[Tree, Tree]:
        own, last = jax.random.split(key)
        rows = 1 if how.shared else steps
        params, state = jaxbn.lstm.lstm_init(own, pixels // steps, hidden, rows, scale=how.scale)
        # The forget gate starts open, as LSTMs are made.
        bias = jnp.asarray(params.recurrent_norm.bias).at[hidden : 2 * hidden].set(1.0)
        params = params._replace(recurrent_norm=params.recurrent_norm._replace(bias=bias))
        if how.norm == "input":
            state = jaxbn.bn_init(4 * hidden)[1]
        elif how.norm != "batch":
            state = ()
        return {"cell": params, "head": head(last, (hidden, outputs)), "last": jnp.zeros(outputs)}, state

    def forward(params: Tree, state: Tree, x: Images, run: Pass) -> tuple[Logits, Tree]:
        cell, xs, lengths = params["cell"], pieces(x, steps, order), None
        if ragged or run.mask is not None:
            there = ~jnp.isnan(xs[..., 0]) if run.mask is None else ~jnp.isnan(xs[..., 0]) & run.mask[None]
            lengths, xs = jnp.sum(there, 0, dtype=jnp.int32), jnp.where(there[..., None], xs, 0)
        carry = jaxbn.lstm.lstm_carry(cell, x.shape[0], lengths)
        options = {"momentum": how.momentum, "axis_name": run.axis_name}
        if how.norm == "batch":
            if run.train and how.noise and run.key is not None:
                carry = carry._replace(h=how.noise * jax.random.normal(run.key, carry.h.shape))
            carry, _, state = jaxbn.lstm.lstm_apply(cell, state, carry, xs, run.train, **options)
            h = carry.h
        else:
            inputs = xs @ cell.input_kernel
            if how.norm == "input":
                inputs, state = jaxbn.bn_apply(cell.input_norm, state, inputs, run.train, **options)
            hs = _recur(how, cell, carry, inputs)
            # The output of each sequence at its own last step.
            h = hs[-1] if lengths is None else jnp.take_along_axis(hs, jnp.maximum(lengths - 1, 0)[None, :, None], 0)[0]
        return h @ params["head"] + params["last"][None], state

    return model(init, forward)


def pieces(x: Images, steps: int, order: Any = None) -> Array:
    """Return images as sequences `[steps, batch, pixels / steps]`, their pixels in `order`."""
    x = jnp.asarray(x) if order is None else jnp.asarray(x)[:, order]
    return jnp.swapaxes(jnp.reshape(x, (x.shape[0], steps, -1)), 0, 1)


def _recur(how: Recurrence, cell: Any, carry: Any, inputs: Array) -> Array:
    """Return the outputs of all steps of an LSTM without norms across examples."""

    def norm(params: Any, v: Array) -> Array:
        if how.norm == "layer":
            mean, var = jnp.mean(v, -1, keepdims=True), jnp.var(v, -1, keepdims=True)
            v = params.scale[None] * (v - mean) * jax.lax.rsqrt(var + 1e-5)
        return v if params.bias is None else v + jnp.asarray(params.bias)[None]

    def step(before: Any, x: Array) -> Any:
        c, h = before
        gates = norm(cell.input_norm, x) + norm(cell.recurrent_norm, h @ cell.recurrent_kernel)
        i, f, g, o = jnp.split(gates, 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(norm(cell.cell_norm, c))
        return (c, h), h

    # As many zeros as x has devices: a loop must start on the devices of its later steps.
    start = jax.tree.map(lambda v: v + 0 * jnp.sum(inputs[0], -1, keepdims=True), (carry.c, carry.h))
    return jax.lax.scan(step, start, inputs)[1]
