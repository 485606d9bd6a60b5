"""Make small flax modules of ours, and the inputs of their tests."""

from typing import Any

import jax
import numpy as np
from flax import nnx

import jaxbn.nnx

KEY = jax.random.key(0)
X = np.asarray(np.random.default_rng(0).normal(2, 3, size=(8, 3)), np.float32)
SEQUENCES = np.asarray(np.random.default_rng(1).normal(size=(8, 4, 3)), np.float32)
STATS = ["batch_stats"]


def rngs():
    return nnx.Rngs(0)


def norm(**options) -> Any:
    return jaxbn.nnx.BatchNorm(3, **options, rngs=rngs())


def run_nnx(x, **options):
    """Run an LSTM cell over sequences by flax's `RNN`; return the carry, the outputs and the new statistics."""
    cell = jaxbn.nnx.BatchNormLSTMCell(3, 5, max_steps=4, rngs=rngs())
    rnn = nnx.RNN(cell, return_carry=True, state_axes=nnx.StateAxes({nnx.BatchStat: nnx.Carry, ...: None}))
    carry, y = rnn(x, **options)
    return carry, y, nnx.to_pure_dict(nnx.state(cell, nnx.BatchStat))
