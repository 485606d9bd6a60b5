"""Mistakes in recurrent batch normalization are refused with a message that says which."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from lstm_oracle import BATCH, HIDDEN, INPUTS, LENGTHS, ROWS, XS, model

import jaxbn
from jaxbn.linen import BatchNormLSTMCell as LinenCell
from jaxbn.lstm import lstm_apply, lstm_carry, lstm_init, lstm_step
from jaxbn.nnx import BatchNormLSTMCell as NnxCell

PARAMS, STATE = lstm_init(jax.random.key(0), INPUTS, HIDDEN, ROWS)
CARRY = lstm_carry(PARAMS, BATCH)
LAYER = jaxbn.bn_init(3)
MISTAKES = {
    "one step for many": (lambda: lstm_apply(PARAMS, STATE, CARRY, XS[0, 0], True), ValueError, "lstm_step"),
    "many steps for one": (lambda: lstm_step(PARAMS, STATE, CARRY, XS, True), ValueError, r"carry\.c"),
    "inputs": (lambda: lstm_apply(PARAMS, STATE, CARRY, XS[..., :1], True), ValueError, "input_kernel"),
    "batch": (lambda: lstm_apply(PARAMS, STATE, CARRY, XS[:, :2], True), ValueError, r"carry\.c"),
    "integers": (lambda: lstm_apply(PARAMS, STATE, CARRY, XS.astype(int), True), TypeError, "floating"),
    "train": (lambda: lstm_apply(PARAMS, STATE, CARRY, XS, 1), TypeError, "train"),
    "params": (lambda: lstm_apply(LAYER[0], STATE, CARRY, XS, True), TypeError, "lstm_init"),
    "state": (lambda: lstm_apply(PARAMS, LAYER[1], CARRY, XS, True), TypeError, "lstm_init"),
    "a tuple": (lambda: lstm_apply(PARAMS, STATE, (CARRY.c, CARRY.h), XS, True), TypeError, "lstm_carry"),
    "another model": (lambda: lstm_apply(PARAMS, model(hidden=4)[1], CARRY, XS, True), ValueError, "state.input_norm"),
    "no rows": (
        lambda: lstm_apply(PARAMS, jax.tree.map(lambda v: v[0], STATE), CARRY, XS, True),
        ValueError,
        "max_steps",
    ),
    "mask": (lambda: lstm_apply(PARAMS, STATE, CARRY, XS, True, mask=XS > 0), TypeError, "mask"),
    "axis name": (lambda: lstm_apply(PARAMS, STATE, CARRY, XS, True, axis_name="data"), ValueError, "axis_name"),
    "momentum": (lambda: lstm_apply(PARAMS, STATE, CARRY, XS, True, momentum=2.0), ValueError, "momentum"),
    "lengths, shape": (lambda: lstm_carry(PARAMS, BATCH, LENGTHS[:2]), ValueError, "lengths"),
    "lengths, negative": (lambda: lstm_carry(PARAMS, BATCH, -LENGTHS), ValueError, "lengths"),
    "lengths, floats": (lambda: lstm_carry(PARAMS, BATCH, LENGTHS * 0.5), TypeError, "lengths"),
    "lengths, a mask": (lambda: lstm_carry(PARAMS, BATCH, LENGTHS > 2), TypeError, "lengths"),
    "lengths, of others": (
        lambda: lstm_apply(PARAMS, STATE, CARRY._replace(lengths=LENGTHS[:2]), XS, True),
        ValueError,
        "lengths",
    ),
    "carry": (lambda: lstm_carry(STATE, BATCH), TypeError, "lstm_init"),
    "batch, a float": (lambda: lstm_carry(PARAMS, 2.0), TypeError, "int"),
    "max_steps": (lambda: lstm_init(jax.random.key(0), 2, 3, 0), ValueError, "max_steps"),
    "num_hidden": (lambda: lstm_init(jax.random.key(0), 2, 3.0, 4), TypeError, "num_hidden"),
    "complex": (lambda: lstm_init(jax.random.key(0), 2, 3, 4, dtype=jnp.complex64), TypeError, "real"),
    "linen": (lambda: LinenCell(3, 0, True).init(jax.random.key(0), CARRY, XS[0]), ValueError, "max_steps"),
    "nnx": (lambda: NnxCell(2, 3, 0, rngs=nnx.Rngs(0)), ValueError, "max_steps"),
    "nnx carry": (
        lambda: NnxCell(2, 3, 4, rngs=nnx.Rngs(0)).initialize_carry((2, 2), carry_init=nnx.initializers.normal()),
        ValueError,
        "rngs",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_refused(name):
    call, kind, words = MISTAKES[name]
    with pytest.raises(kind, match=words):
        call()
