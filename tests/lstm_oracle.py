"""Compute recurrent batch normalization in float64 NumPy, and hold the model, inputs and programs of its tests."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from ways import MEMBERS

from jaxbn.lstm import lstm_apply, lstm_carry, lstm_init

TIME, BATCH, INPUTS, HIDDEN, ROWS = 5, 6, 2, 3, 4
KEEP = 0.8
LENGTHS = np.array([5, 2, 4, 0, 5, 3], np.int32)
# Step 4 has two sequences left: two values a feature are normalized to +1 and -1, for any two.
rng = np.random.default_rng(0)
XS = rng.standard_normal((TIME, BATCH, INPUTS)).astype(np.float32)
G = rng.standard_normal((TIME, BATCH, HIDDEN)).astype(np.float32)
ENDED = (np.arange(TIME)[:, None] >= LENGTHS)[..., None]
WIDE = 2 * MEMBERS
PARTS = {
    "xs": rng.standard_normal((WIDE, TIME, INPUTS)).astype(np.float32),
    # The first device's sequences have both ended after one step, the second's never began.
    "lengths": np.array([1, 1, 0, 0, *rng.integers(2, TIME + 1, WIDE - 4)], np.int32),
    "g": rng.standard_normal((WIDE, TIME, HIDDEN)).astype(np.float32),
}
PARTS["xs"] = np.where(np.arange(TIME)[:, None] >= PARTS["lengths"][:, None, None], np.nan, PARTS["xs"])
# Without lengths the loop is the same with less in it.
FULL_IS_SLOW = pytest.mark.parametrize(
    "lengths", [pytest.param(None, id="full", marks=pytest.mark.slow), pytest.param(LENGTHS, id="ragged")]
)


def model(steps=ROWS, dtype=jnp.float32, seed=0, hidden=HIDDEN, inputs=INPUTS):
    """Parameters away from where they start, and a state that has seen nothing."""
    params, _ = lstm_init(jax.random.key(seed), inputs, hidden, steps)
    random = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda v: np.asarray(v + np.float32(0.3) * random.standard_normal(v.shape, np.float32)), params
    )
    _, state = lstm_init(jax.random.key(seed), inputs, hidden, steps, dtype=dtype)
    return jax.tree.map(lambda v: jnp.asarray(v, dtype), params), state


def run(params, state, xs, train=True, lengths=None, momentum=KEEP, **options):
    carry = lstm_carry(params, xs.shape[1:-1], lengths)
    return lstm_apply(params, state, carry, xs, train, momentum=momentum, **options)


# Compiled once for all tests.
TRAIN = jax.jit(lambda params, state, xs, lengths=None: run(params, state, xs, True, lengths))
EVALUATE = jax.jit(lambda params, state, xs, lengths=None: run(params, state, xs, False, lengths))


def with_loss(params, state, xs):
    """Return a scalar of all outputs, and everything."""
    carry, ys, after = run(params, state, xs, True, LENGTHS)
    return jnp.sum(ys * G), (carry, ys, after)


GRADIENT = jax.jit(jax.grad(with_loss, argnums=(0, 2), has_aux=True))


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


def reference(params, state, xs, train=True, lengths=None):
    """Run the definition step by step: `(c, ys, state)`. The state is a dict of lists of rows."""
    params = jax.tree.map(lambda v: np.asarray(v, np.float64), params)
    state = {
        name: {k: list(np.asarray(v)) for k, v in norm._asdict().items()} for name, norm in state._asdict().items()
    }
    batch, hidden = xs.shape[1], params.recurrent_kernel.shape[0]
    lengths = np.full(batch, len(xs)) if lengths is None else np.asarray(lengths)
    c, h, ys = np.zeros((batch, hidden)), np.zeros((batch, hidden)), []
    for t, x in enumerate(np.asarray(xs, np.float64)):
        runs = (t < lengths)[:, None]

        def norm(name, v, t=t, runs=runs):
            rows, p = state[name], getattr(params, name)
            if not train:
                seen = [r for r in range(min(t, len(rows["count"]) - 1) + 1) if rows["count"][r]]
                row = max(seen, default=0)
                return oracle.evaluation(v, rows["mean"][row], rows["var"][row], p.scale, p.bias)
            row, out = min(t, len(rows["count"]) - 1), oracle.training(v, p.scale, p.bias, mask=runs)
            if runs.any():
                rows["mean"][row] = KEEP * rows["mean"][row] + (1 - KEEP) * out.mean
                rows["var"][row] = KEEP * rows["var"][row] + (1 - KEEP) * out.var
                rows["count"][row] = rows["count"][row] + 1
            return out.y

        gates = norm("input_norm", np.where(runs, x, 0) @ params.input_kernel)
        gates = gates + norm("recurrent_norm", h @ params.recurrent_kernel)
        i, f, g, o = np.split(gates, 4, -1)
        new = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        c, h = np.where(runs, new, c), np.where(runs, sigmoid(o) * np.tanh(norm("cell_norm", new)), h)
        ys.append(h)
    return c, np.stack(ys), state


def worst(got, wanted):
    """Return the largest difference between a state or an array and the reference."""
    if isinstance(wanted, dict):
        got = {name: norm._asdict() for name, norm in got._asdict().items()}
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(jax.tree.map(np.asarray, wanted)), strict=False)
    if isinstance(wanted, dict):
        pairs = [(got[n][k], np.stack(wanted[n][k])) for n in wanted for k in wanted[n]]
    return max(float(np.max(np.abs(np.asarray(a, np.float64) - b))) for a, b in pairs)
