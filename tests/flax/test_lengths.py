"""Keep padding out of the statistics of an LSTM cell by the lengths that flax's `RNN` is given."""

from functools import cache, partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_layers import KEY, SEQUENCES, STATS, rngs, run_nnx
from params import named, pairs

import jaxbn
import jaxbn.linen
import jaxbn.nnx

LENGTHS = np.array([4, 4, 3, 3, 2, 2, 1, 1])
pytestmark = pytest.mark.usefixtures("ordinary_promotion")


def linen_rnn(train):
    how: Any = {"variable_carry": "batch_stats"} if train else {"variable_broadcast": ("params", "batch_stats")}
    return nn.RNN(jaxbn.linen.BatchNormLSTMCell(5, 4, use_running_average=not train), return_carry=True, **how)


@cache
def linen_variables():
    return jax.jit(linen_rnn(False).init)(KEY, SEQUENCES)


def run_linen(x, **options):
    variables = linen_variables()
    (carry, y), update = linen_rnn(True).apply(variables, x, **options, mutable=STATS)
    return carry, y, update["batch_stats"]


def begun(run, lengths):
    if run is run_linen:
        return jaxbn.linen.BatchNormLSTMCell(5, 4, False).initialize_carry(KEY, (8, 3), lengths=lengths)
    return jaxbn.nnx.BatchNormLSTMCell(3, 5, 4, rngs=rngs()).initialize_carry((8, 3), lengths=lengths)


@pairs("how, run", named("plain", "compiled", "reversed"), named(run_linen, run_nnx))
def test_flax_s_lengths_keep_padding_out(run, how):
    """They do what lengths in the carry do; NaN in the padding is nowhere."""
    real = (np.arange(4) < LENGTHS[:, None])[..., None]
    options: dict[str, Any] = {"reverse": True, "keep_order": True} if how == "reversed" else {}
    f = partial(run, **options)
    wanted = f(np.where(real, SEQUENCES, 0), initial_carry=begun(run, LENGTHS), seq_lengths=LENGTHS)
    f = jax.jit(f) if how == "compiled" else f
    got = f(jnp.where(real, SEQUENCES, jnp.nan), seq_lengths=LENGTHS)
    chex.assert_tree_all_finite(got)
    chex.assert_trees_all_close(got, wanted, atol=1e-6)


@pytest.mark.parametrize("run", [run_linen, run_nnx])
def test_a_carry_without_the_lengths_is_refused(run):
    with pytest.raises(ValueError, match="initial_carry"):
        run(SEQUENCES, initial_carry=begun(run, None), seq_lengths=LENGTHS)


def test_a_cell_without_its_statistics_says_how():
    for train in (True, False):
        rnn = nn.RNN(jaxbn.linen.BatchNormLSTMCell(5, 4, use_running_average=not train))
        with pytest.raises(ValueError, match="variable_carry"):
            rnn.init(KEY, SEQUENCES)
