"""Recurrent batch normalization: an LSTM in float64 NumPy is the reference."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lstm_oracle import (
    BATCH,
    ENDED,
    EVALUATE,
    HIDDEN,
    INPUTS,
    LENGTHS,
    ROWS,
    TRAIN,
    XS,
    model,
    reference,
    run,
    worst,
)
from ways import assert_close

import jaxbn
from jaxbn.lstm import lstm_carry, lstm_init, lstm_step


# A unit of rounding is 1e-16 or 6e-8, and 15 normalizations in a row amplify it, the more the smaller their variance.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 2e-14), ("float32", 4e-6)])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "ragged"])
def test_values_against_float64(dtype, tolerance, lengths):
    """Two batches of training, the last two steps on one row; and evaluation, longer than there are rows."""
    with jax.enable_x64(dtype == "float64"):
        params, state = model(dtype=dtype)
        xs = XS if lengths is None else np.where(ENDED, np.nan, XS)
        after = state
        for scale in (1, 2):
            batch = jnp.asarray(scale * xs, dtype)
            want_c, want_ys, want_state = reference(params, after, batch, True, lengths)
            carry, ys, after = TRAIN(params, after, batch, lengths)
            assert worst(ys, want_ys) < tolerance
            assert worst(carry.c, want_c) < tolerance
            assert worst(after, want_state) < tolerance
        assert after.cell_norm.count.tolist() == [2, 2, 2, 4]
        _, ys, same = EVALUATE(params, after, jnp.asarray(xs, dtype), lengths)
        assert worst(ys, reference(params, after, jnp.asarray(xs, dtype), False, lengths)[1]) < tolerance
        assert_close(same, after, atol=0.0)


@pytest.mark.slow
def test_update_off_and_options_reach_all_three():
    params, state = model()
    ys, same = run(params, state, XS, update=False)[1:]
    assert_close(same, state, atol=0.0)
    assert_close(ys, TRAIN(params, state, XS)[1], atol=2e-7)
    scheduled = run(params, state, XS, momentum=jaxbn.cumulative_average)[2]
    for norm, exact in zip(scheduled, run(params, state, XS, momentum=0.0)[2], strict=True):
        assert_close((norm.mean[: ROWS - 1], norm.var[: ROWS - 1]), (exact.mean[: ROWS - 1], exact.var[: ROWS - 1]))
        assert norm.count.tolist() == [1, 1, 1, 2]
    # Without limits renormalized training is evaluation, by the statistics before the update.
    free = jaxbn.Renorm(float("inf"), float("inf"))
    trained = TRAIN(params, state, XS)[2]
    assert_close(run(params, trained, XS, renorm=free)[1][:ROWS], EVALUATE(params, trained, XS)[1][:ROWS], atol=2e-5)


def test_one_program_for_modes_and_lengths_and_states():
    params, state = model()
    step = jax.jit(chex.assert_max_traces(lambda s, x, train, lengths: run(params, s, x, train, lengths), n=1))
    after = state
    for train in (True, False, True):
        for lengths in (LENGTHS, LENGTHS[::-1].copy()):
            wanted = (TRAIN if train else EVALUATE)(params, after, XS, lengths)
            got = step(after, XS, jnp.array(train), lengths)
            assert_close(got, wanted, atol=2e-6)
            after = got[2]


@pytest.mark.slow
@pytest.mark.parametrize("carried", [True, False], ids=["scan", "step"])
def test_dtypes(carried):
    """bfloat16 inputs: products and outputs in it, cell and statistics in float32."""
    params, state = model()
    xs = jnp.asarray(XS, jnp.bfloat16)
    if carried:
        carry, ys, after = TRAIN(params, state, xs, LENGTHS)
        exact = reference(params, state, xs.astype(jnp.float32), True, LENGTHS)[1]
        # Products and gates are rounded to 2^-9, and with two sequences left amplified.
        assert worst(ys[:4], exact[:4]) < 0.02
    else:
        carry, ys, after = lstm_step(params, state, lstm_carry(params, BATCH, LENGTHS), xs[0], True)
    assert (ys.dtype, carry.c.dtype, carry.h.dtype, carry.step.dtype) == (jnp.bfloat16, *[jnp.float32] * 2, jnp.int32)
    assert jax.tree.map(lambda v: v.dtype, after) == jax.tree.map(lambda v: v.dtype, state)
    half, half_state = lstm_init(jax.random.key(0), INPUTS, HIDDEN, ROWS, dtype=jnp.bfloat16)
    assert {v.dtype for v in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
    assert half_state.cell_norm.mean.dtype == lstm_carry(half, 2).c.dtype == jnp.float32
    assert np.all(np.isfinite(run(half, half_state, xs)[1].astype(jnp.float32)))


def test_start():
    """Recurrent kernels are orthogonal gate by gate, scales 0.1, and no array is there twice, so all can be donated."""
    params, state = lstm_init(jax.random.key(0), INPUTS, HIDDEN, ROWS)
    for block in jnp.split(params.recurrent_kernel, 4, -1):
        np.testing.assert_allclose(block.T @ block, np.eye(HIDDEN), atol=1e-6)
    for norm in params[2:]:
        assert np.all(norm.scale == np.float32(0.1))
    leaves = jax.tree.leaves((params, state, lstm_carry(params, 2, [1, 2])))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)
