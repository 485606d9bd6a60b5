"""LSTMs that read an image piece by piece: without norm, or with batch norm where Cooijmans et al. 2017 put it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

import jaxbn
from experiments.training.layers import Pass
from experiments.training.models import CLASSES, Model, model
from experiments.training.shapes import Images, Logits, Tree

SCALE = 0.1  # where the scales start, by Cooijmans et al.


class Recurrence(NamedTuple):
    """The normalization of an LSTM.

    Attributes:
        norm: `batch`, with statistics for each step or shared by all; or `none`.
        shared: whether all steps of `batch` share one record of running statistics.
        noise: standard deviation of what `batch` starts from in training, instead of zeros.
        momentum: of the running statistics.
    """

    norm: str = "none"
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
        params, state = jaxbn.lstm.lstm_init(own, pixels // steps, hidden, rows, scale=SCALE)
        # The forget gate starts open, as LSTMs are made.
        bias = jnp.asarray(params.recurrent_norm.bias).at[hidden : 2 * hidden].set(1.0)
        params = params._replace(recurrent_norm=params.recurrent_norm._replace(bias=bias))
        weights = {"cell": params, "head": head(last, (hidden, outputs)), "last": jnp.zeros(outputs)}
        return weights, state if how.norm == "batch" else ()

    def forward(params: Tree, state: Tree, x: Images, run: Pass) -> tuple[Logits, Tree]:
        cell, xs, lengths = params["cell"], pieces(x, steps, order), None
        if ragged or run.mask is not None:
            there = ~jnp.isnan(xs[..., 0]) if run.mask is None else ~jnp.isnan(xs[..., 0]) & run.mask[None]
            lengths, xs = jnp.sum(there, 0, dtype=jnp.int32), jnp.where(there[..., None], xs, 0)
        carry = jaxbn.lstm.lstm_carry(cell, x.shape[0], lengths)
        if how.norm == "batch":
            if run.train and how.noise and run.key is not None:
                carry = carry._replace(h=how.noise * jax.random.normal(run.key, carry.h.shape))
            options = {"momentum": how.momentum, "axis_name": run.axis_name}
            carry, _, state = jaxbn.lstm.lstm_apply(cell, state, carry, xs, run.train, **options)
            h = carry.h
        else:
            hs = _recur(cell, carry, xs @ cell.input_kernel)
            # The output of each sequence at its own last step.
            h = hs[-1] if lengths is None else jnp.take_along_axis(hs, jnp.maximum(lengths - 1, 0)[None, :, None], 0)[0]
        return h @ params["head"] + params["last"][None], state

    return model(init, forward)


def pieces(x: Images, steps: int, order: Any = None) -> Array:
    """Return images as sequences `[steps, batch, pixels / steps]`, their pixels in `order`."""
    x = jnp.asarray(x) if order is None else jnp.asarray(x)[:, order]
    return jnp.swapaxes(jnp.reshape(x, (x.shape[0], steps, -1)), 0, 1)


def _recur(cell: Any, carry: Any, inputs: Array) -> Array:
    """Return the outputs of all steps of an LSTM without norms, whose biases are where these would have them."""
    of_gates, of_cell = (jnp.asarray(own.bias) for own in (cell.recurrent_norm, cell.cell_norm))

    def step(before: Any, x: Array) -> Any:
        c, h = before
        i, f, g, o = jnp.split(x + (h @ cell.recurrent_kernel + of_gates[None]), 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c + of_cell[None])
        return (c, h), h

    # As many zeros as x has devices: a loop must start on the devices of its later steps.
    start = jax.tree.map(lambda v: v + 0 * jnp.sum(inputs[0], -1, keepdims=True), (carry.c, carry.h))
    return jax.lax.scan(step, start, inputs)[1]
