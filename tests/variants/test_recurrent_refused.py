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


def leak(v):
    """Return the tracer of `v` in a trace that has ended."""
    kept = []
    jax.make_jaxpr(kept.append)(v)
    return kept[0]


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
    "lengths, beyond int32": (lambda: lstm_carry(PARAMS, BATCH, [2**40] * BATCH), ValueError, "`lengths` .* int32"),
    "lengths, ragged": (lambda: lstm_carry(PARAMS, 2, [5, [3]]), TypeError, "`lengths` must be integers"),
    "lengths, a mask": (lambda: lstm_carry(PARAMS, BATCH, LENGTHS > 2), TypeError, "lengths"),
    "lengths, of others": (
        lambda: lstm_apply(PARAMS, STATE, CARRY._replace(lengths=LENGTHS[:2]), XS, True),
        ValueError,
        "lengths",
    ),
    "lengths, a list": (
        lambda: lstm_apply(PARAMS, STATE, CARRY._replace(lengths=LENGTHS.tolist()), XS, True),
        TypeError,
        r"`carry\.lengths` must be an array",
    ),
    "lengths, bools": (
        lambda: lstm_apply(PARAMS, STATE, CARRY._replace(lengths=LENGTHS > 2), XS, True),
        TypeError,
        r"`carry\.lengths` must be integers",
    ),
    "step": (
        lambda: lstm_apply(PARAMS, STATE, CARRY._replace(step=None), XS, True),
        TypeError,
        r"`carry\.step` must be integers",
    ),
    "h of integers": (
        lambda: lstm_apply(PARAMS, STATE, CARRY._replace(h=CARRY.h.astype(int)), XS, True),
        TypeError,
        r"`carry\.h` must be floating",
    ),
    "norms, a dict": (
        lambda: lstm_apply(PARAMS, STATE._replace(cell_norm=STATE.cell_norm._asdict()), CARRY, XS, True),
        TypeError,
        r"`state\.cell_norm` must be .*BatchNormState\(",
    ),
    "norms, None": (
        lambda: lstm_apply(PARAMS, STATE._replace(input_norm=None), CARRY, XS, True),
        TypeError,
        r"`state\.input_norm` must be",
    ),
    "norms of params, None": (
        lambda: lstm_apply(PARAMS._replace(input_norm=None), STATE, CARRY, XS, True),
        TypeError,
        r"`params\.input_norm` must be",
    ),
    "no kernel": (
        lambda: lstm_apply(PARAMS._replace(recurrent_kernel=None), STATE, CARRY, XS, True),
        TypeError,
        r"`params\.recurrent_kernel` must be",
    ),
    "no kernel of inputs": (
        lambda: lstm_apply(PARAMS._replace(input_kernel=None), STATE, CARRY, XS, True),
        TypeError,
        r"`params\.input_kernel` must be",
    ),
    "no kernel for a carry": (
        lambda: lstm_carry(PARAMS._replace(recurrent_kernel=None), BATCH),
        TypeError,
        r"`params\.recurrent_kernel` must be",
    ),
    "a kernel without axes": (
        lambda: lstm_carry(PARAMS._replace(recurrent_kernel=jnp.ones(())), BATCH),
        ValueError,
        r"`params\.recurrent_kernel` must be .* 4 hidden",
    ),
    "integer kernels": (
        lambda: lstm_apply(PARAMS._replace(input_kernel=PARAMS.input_kernel.astype(int)), STATE, CARRY, XS, True),
        TypeError,
        r"`params\.input_kernel` must be floating",
    ),
    "key, a seed": (lambda: lstm_init(0, 2, 3, 4), TypeError, r"`key` must be .*jax\.random\.key"),
    "key, None": (lambda: lstm_init(None, 2, 3, 4), TypeError, r"`key` must be .*jax\.random\.key"),
    "key, of another trace": (
        lambda: lstm_init(leak(jax.random.key(0)), 2, 3, 4),
        jax.errors.UnexpectedTracerError,
        "escape",
    ),
    "an initializer's name": (
        lambda: lstm_init(jax.random.key(0), 2, 3, 4, kernel_init="lecun_normal"),
        TypeError,
        "`kernel_init` .* must be functions",
    ),
    "an initializer of another shape": (
        lambda: lstm_init(jax.random.key(0), 2, 3, 4, kernel_init=lambda key, shape, dtype: jnp.ones(3)),
        ValueError,
        r"shape that it gets, \(2, 3\)",
    ),
    "carry": (lambda: lstm_carry(STATE, BATCH), TypeError, "lstm_init"),
    "batch, a float": (lambda: lstm_carry(PARAMS, 2.0), TypeError, "`batch` must be an int"),
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
