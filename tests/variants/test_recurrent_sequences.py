"""Sequences in recurrent batch normalization: statistics of each step, lengths, and pieces."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lstm_oracle import (
    BATCH,
    ENDED,
    EVALUATE,
    GRADIENT,
    HIDDEN,
    KEEP,
    LENGTHS,
    TIME,
    TRAIN,
    XS,
    model,
    reference,
    run,
)
from ways import assert_close

from jaxbn.lstm import lstm_apply, lstm_carry, lstm_step

STEP = jax.jit(partial(lstm_step, train=True, momentum=KEEP))


def test_steps_have_their_own_statistics_and_evaluation_uses_them():
    """One input is ever larger. Its statistics follow it; those of all steps together give another output."""
    params, state = model(steps=TIME)
    xs = XS * np.arange(1.0, TIME + 1, dtype=np.float32)[:, None, None]
    train = jax.jit(lambda s: run(params, s, xs, True, momentum=0.0))
    _, ys, after = train(state)
    growth = np.sqrt(after.input_norm.var.mean(-1))
    assert np.all(np.diff(growth) > 0)
    evaluate = jax.jit(lambda s: run(params, s, xs, False)[1])
    # With momentum 0 the running statistics are those of this batch.
    assert_close(evaluate(after), ys, atol=2e-5)
    everywhere = jax.tree.map(lambda v: jnp.broadcast_to(v.mean(0, keepdims=True).astype(v.dtype), v.shape), after)
    assert np.max(np.abs(evaluate(everywhere) - ys)) > 0.05


def test_past_the_last_statistics_the_last_are_used_again():
    """Past the last row, and where no training sequence was so long: for values, as with rows that were never there."""
    params, state = model(steps=TIME + 2)
    trained = TRAIN(params, state, XS[:3])[2]
    assert trained.cell_norm.count.tolist() == [1, 1, 1, 0, 0, 0, 0]
    short = jax.tree.map(lambda v: v[:3], trained)
    _, ys, same = EVALUATE(params, trained, XS)
    assert_close(same, trained, atol=0.0)
    assert_close(ys, EVALUATE(params, short, XS)[1], atol=0.0)
    assert_close(ys[3:], reference(params, short, XS, False)[1][3:].astype(np.float32), atol=2e-5)
    untrained = EVALUATE(params, state, XS)[1]
    assert_close(untrained, EVALUATE(params, jax.tree.map(lambda v: v[:1], state), XS)[1], atol=0.0)


def test_ragged_sequences():
    """In evaluation each is as if alone; in training its end is kept, and what is under the padding is not seen."""
    params, state = model()
    trained = TRAIN(params, state, XS)[2]
    carry, ys, _ = EVALUATE(params, trained, np.where(ENDED, np.nan, XS), LENGTHS)
    for b in (0, 1, 3):
        length = LENGTHS[b]
        alone, own, _ = EVALUATE(params, trained, XS[:length, b : b + 1])
        assert_close(ys[:length, b], own[:, 0], atol=1e-6)
        assert_close((carry.c[b], carry.h[b]), (alone.c[0], alone.h[0]), atol=1e-6)
        assert_close(ys[length:, b], jnp.broadcast_to(alone.h[0], (TIME - length, HIDDEN)), atol=1e-6)

    zeros = GRADIENT(params, state, np.where(ENDED, np.float32(0), XS))
    for padding in (np.nan, np.inf, 1e30):
        assert_close(GRADIENT(params, state, np.where(ENDED, np.float32(padding), XS)), zeros, atol=0.0)


def test_without_sequences_nothing_changes():
    params, state = model()
    _, ys, after = TRAIN(params, state, np.full_like(XS, np.nan), np.zeros(BATCH, np.int32))
    assert_close((after, ys), (state, jnp.zeros(ys.shape)), atol=0.0)
    _, ys, after = run(params, state, XS[:0])
    assert ys.shape == (0, BATCH, HIDDEN)
    assert_close(after, state, atol=0.0)


@pytest.mark.slow
def test_pieces_and_single_steps_make_the_whole():
    params, state = model()
    whole = TRAIN(params, state, XS, LENGTHS)
    carry, ys = lstm_carry(params, BATCH, LENGTHS), []
    pieces = state
    for piece in (XS[:2], XS[2:]):
        carry, y, pieces = lstm_apply(params, pieces, carry, piece, True, momentum=KEEP)
        ys.append(y)
    assert_close((carry, jnp.concatenate(ys), pieces), whole, atol=2e-6)
    carry, ys, single = lstm_carry(params, BATCH, LENGTHS), [], state
    for x in XS:
        carry, y, single = STEP(params, single, carry, x)
        ys.append(y)
    assert_close((carry, jnp.stack(ys), single), whole, atol=2e-6)
