"""Recurrent batch normalization: an LSTM in float64 NumPy is the reference."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import linen, nnx
from flax.errors import ModifyScopeVariableError
from ways import MEMBERS, assert_close, each_way, shard_map_way

import jaxbn
from jaxbn.linen import BatchNormLSTMCell as LinenCell
from jaxbn.lstm import LSTMParams, LSTMState, lstm_apply, lstm_carry, lstm_init, lstm_step
from jaxbn.nnx import BatchNormLSTMCell as NnxCell

TIME, BATCH, INPUTS, HIDDEN, ROWS = 5, 6, 2, 3, 4
KEEP = 0.8
LENGTHS = np.array([5, 2, 4, 0, 5, 3], np.int32)
# Step 4 has two sequences left: two values a feature are normalized to +1 and -1, for any two.
rng = np.random.default_rng(0)
XS = rng.standard_normal((TIME, BATCH, INPUTS)).astype(np.float32)
G = rng.standard_normal((TIME, BATCH, HIDDEN)).astype(np.float32)
ENDED = (np.arange(TIME)[:, None] >= LENGTHS)[..., None]


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
STEP = jax.jit(partial(lstm_step, train=True, momentum=KEEP))


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


# Without lengths the loop is the same with less in it.
FULL_IS_SLOW = pytest.mark.parametrize(
    "lengths", [pytest.param(None, id="full", marks=pytest.mark.slow), pytest.param(LENGTHS, id="ragged")]
)


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
@FULL_IS_SLOW
def test_gradients_against_float64_differences(train, lengths):
    """Of every parameter and input, by differences of the NumPy loop; and float32 against those in float64."""
    gradients, drawn = {}, np.random.default_rng(1)
    for dtype in ("float64", "float32"):
        with jax.enable_x64(dtype == "float64"):
            params, state = model(dtype=dtype)
            state = jax.tree.map(lambda v: v + (0.3 if jnp.issubdtype(v.dtype, jnp.floating) else 1), state)
            xs = jnp.asarray(XS if lengths is None else np.where(ENDED, np.nan, XS), dtype)

            def loss(params, xs, state=state, dtype=dtype):
                return jnp.sum(run(params, state, xs, train, lengths)[1] * G.astype(dtype))

            gradients[dtype] = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, xs)
            if dtype == "float64":
                leaves, tree = jax.tree.flatten((params, jnp.asarray(XS, dtype)))
                leaves = [np.array(v) for v in leaves]

                def value(leaves=leaves, tree=tree, state=state):
                    params, xs = jax.tree.unflatten(tree, leaves)
                    return np.sum(reference(params, state, xs, train, lengths)[1] * G)

                for leaf, gradient in zip(leaves, jax.tree.leaves(gradients[dtype]), strict=True):
                    # A random eighth of the entries, and always the last: of the inputs, padding where there is any.
                    for at in [*drawn.permutation(leaf.size)[: leaf.size // 8 + 1], leaf.size - 1]:
                        held, ends = leaf.flat[at], []
                        for steps in (1, -1, 2, -2):
                            leaf.flat[at] = held + 2e-6 * steps
                            ends.append(value())
                        leaf.flat[at] = held
                        # Of fourth order: the third derivative is some 1e5 where the first h has little variance. What
                        # is left is rounding over the step.
                        slope = (8 * (ends[0] - ends[1]) - (ends[2] - ends[3])) / 24e-6
                        assert abs(slope - np.asarray(gradient).flat[at]) < 1e-8
    small, exact = (map(np.asarray, jax.tree.leaves(gradients[d])) for d in ("float32", "float64"))
    for a, b in zip(small, exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1.0, float(np.abs(b).max())))
    if lengths is not None:
        assert np.all(np.where(ENDED, gradients["float32"][1], 0) == 0)


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


def test_extreme_input_gives_finite_output_and_gradients():
    """Constant inputs and inputs at the ends of float32, and sequences that end: outputs, states, gradients."""
    params, state = model()
    constants = (np.zeros_like(XS), np.full_like(XS, 7e4), np.full_like(XS, -1e15))
    for xs in (*constants, XS * np.float32(1e-30), XS * np.float32(1e15)):
        assert all(np.all(np.isfinite(v)) for v in jax.tree.leaves(GRADIENT(params, state, xs)))
    broken = XS.copy()
    broken[1, 2] = np.nan
    _, (_, ys, after) = GRADIENT(params, state, broken)
    assert np.all(np.isnan(ys[1, 2]))
    assert all(np.all(np.isfinite(v)) for v in jax.tree.leaves(after))


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


@pytest.mark.slow
def test_under_vmap_and_both_modes_of_differentiation():
    models = [model(seed=s) for s in (0, 1)]
    params, state = jax.tree.map(lambda *v: jnp.stack(v), *models)
    xs = np.stack([XS, XS[::-1] * 2])
    each = jax.jit(jax.vmap(lambda p, s, x: run(p, s, x, True, LENGTHS)))(params, state, xs)
    for i in range(2):
        assert_close(jax.tree.map(lambda v, i=i: v[i], each), TRAIN(*models[i], xs[i], LENGTHS), atol=2e-6)
    f = lambda p, x: run(p, models[0][1], x, True, LENGTHS)[1]  # noqa: E731
    tangents = jax.tree.map(lambda v: jnp.asarray(rng.standard_normal(v.shape), v.dtype), (models[0][0], XS))
    forward = jax.jit(lambda *t: jax.jvp(f, (models[0][0], XS), t)[1])(*tangents)
    back = jax.jit(lambda g: jax.vjp(f, models[0][0], XS)[1](g))(G)
    inner = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(tangents), strict=True))
    np.testing.assert_allclose(jnp.vdot(forward, G), inner, rtol=2e-5)


@pytest.mark.slow
def test_microbatches_pool_to_the_whole_batch():
    """The statistics of the inputs do not pass through h, so their update by parts is exactly that of the whole."""
    params, state = model()
    parts = [TRAIN(params, state, XS[:, at])[2] for at in (slice(0, 3), slice(3, 6))]
    pooled = jaxbn.pool_updates(jax.tree.map(lambda *v: jnp.stack(v), *parts), KEEP)
    whole = TRAIN(params, state, XS)[2]
    kept = slice(ROWS - 1)  # the last row has had two updates in one pass, which do not pool
    for got, wanted in zip(pooled.input_norm, whole.input_norm, strict=True):
        assert_close(got[kept], wanted[kept], atol=2e-6)


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


# Devices

WIDE = 2 * MEMBERS
PARTS = {
    "xs": rng.standard_normal((WIDE, TIME, INPUTS)).astype(np.float32),
    # The first device's sequences have both ended after one step, the second's never began.
    "lengths": np.array([1, 1, 0, 0, *rng.integers(2, TIME + 1, WIDE - 4)], np.int32),
    "g": rng.standard_normal((WIDE, TIME, HIDDEN)).astype(np.float32),
}
PARTS["xs"] = np.where(np.arange(TIME)[:, None] >= PARTS["lengths"][:, None, None], np.nan, PARTS["xs"])


def member(name, total):
    def one(whole, parts):
        def loss(params):
            xs = jnp.moveaxis(parts["xs"], 1, 0)
            _, ys, state = run(params, whole["state"], xs, True, parts["lengths"], axis_name=name)
            ys = jnp.moveaxis(ys, 0, 1)
            return jnp.sum(ys * parts["g"]), (ys, state)

        gradients, (ys, state) = jax.grad(loss, has_aux=True)(whole["params"])
        return ys, (state, total(gradients))

    return one


@pytest.fixture(scope="module")
def one_device():
    params, state = model()
    return jax.jit(member(None, lambda g: g))({"params": params, "state": state}, PARTS)


@pytest.mark.slow
@each_way
def test_eight_devices_equal_one(way, one_device):
    """Outputs, states and gradients, with sequences that have ended on whole devices and NaN after them."""
    params, state = model()
    got = way.run(member(way.axis_name, way.total), {"params": params, "state": state}, PARTS)
    assert_close(got, one_device, atol=1e-5)
    assert got[1][0].cell_norm.count.tolist() == [1, 1, 1, 2]


@pytest.mark.slow
def test_each_device_its_own():
    """Without an axis name `shard_map` knows that statistics differ between devices, and each is as if alone."""
    params, state = model()

    def alone(whole, parts):
        _, ys, after = run(whole["params"], whole["state"], jnp.moveaxis(parts["xs"], 1, 0), True, parts["lengths"])
        return (jnp.moveaxis(ys, 0, 1), jax.tree.map(lambda v: v[None], after)), ()

    (ys, states), _ = shard_map_way(True).run(alone, {"params": params, "state": state}, PARTS)
    for i in (0, 5):
        own = jax.tree.map(lambda v, i=i: v[2 * i : 2 * i + 2], PARTS)
        (y, after), _ = alone({"params": params, "state": state}, own)
        assert_close(ys[2 * i : 2 * i + 2], y, atol=2e-5)
        assert_close(jax.tree.map(lambda v, i=i: v[i], states), jax.tree.map(lambda v: v[0], after), atol=2e-5)


# Flax

BATCH_MAJOR = XS.swapaxes(0, 1)


def linen_rnn(train, dtype=None, **options):
    cell = LinenCell(HIDDEN, ROWS, not train, KEEP, dtype=dtype)
    how = {"variable_carry": "batch_stats"} if train else {"variable_broadcast": ("params", "batch_stats")}
    return linen.RNN(cell, **how, **options)


def of_linen(variables):
    """Return the arrays of a linen cell, as those of the functions."""
    p, s = variables["params"]["cell"], variables["batch_stats"]["cell"]
    norms = [jaxbn.BatchNormParams(p[name]["scale"], p[name].get("bias")) for name in LSTMState._fields]
    params = LSTMParams(p["input_kernel"], p["recurrent_kernel"], *norms)
    return params, LSTMState(*(jaxbn.BatchNormState(**s[name]) for name in LSTMState._fields))


def nnx_rnn(**options):
    cell = NnxCell(INPUTS, HIDDEN, ROWS, momentum=KEEP, rngs=nnx.Rngs(0), **options)
    return nnx.RNN(cell, state_axes=nnx.StateAxes({nnx.BatchStat: nnx.Carry, ...: None}))


def of_nnx(cell):
    """Return the arrays of an nnx cell, as those of the functions."""

    def parts(norm, kind):
        return kind(*(norm[part][...] if part in norm else None for part in kind._fields))

    norms = [getattr(cell, name) for name in LSTMState._fields]
    own = (parts(norm, jaxbn.BatchNormParams) for norm in norms)
    params = LSTMParams(cell.input_kernel[...], cell.recurrent_kernel[...], *own)
    return params, LSTMState(*(parts(norm, jaxbn.BatchNormState) for norm in norms))


@pytest.mark.slow
@FULL_IS_SLOW
def test_linen_cell_is_the_function(lengths):
    variables = linen_rnn(True).init(jax.random.key(0), BATCH_MAJOR)
    assert_close(linen_rnn(False).init(jax.random.key(0), BATCH_MAJOR), variables, atol=0.0)
    params, state = of_linen(variables)
    assert_close(state, model()[1], atol=0.0)  # left alone by init
    start = LinenCell(HIDDEN, ROWS, True).initialize_carry(jax.random.key(0), (BATCH, INPUTS), lengths)

    @jax.jit
    def train(variables):
        def loss(p):
            inputs = {"initial_carry": start, "return_carry": True}
            (carry, y), update = linen_rnn(True).apply(
                variables | {"params": p}, BATCH_MAJOR, **inputs, mutable=["batch_stats"]
            )
            return jnp.sum(y * G.swapaxes(0, 1)), (carry, y, update)

        return jax.grad(loss, has_aux=True)(variables["params"])

    def wanted(params):
        carry, ys, after = run(params, state, XS, True, lengths)
        return jnp.sum(ys * G), (carry, ys, after)

    gradients, (carry, y, update) = train(variables)
    own, (own_carry, ys, after) = jax.jit(jax.grad(wanted, has_aux=True))(params)
    new = variables | update
    assert_close(
        (y.swapaxes(0, 1), of_linen(new)[1], carry.c, carry.h), (ys, after, own_carry.c, own_carry.h), atol=2e-6
    )
    assert_close(of_linen({"params": gradients, "batch_stats": update["batch_stats"]})[0], own, atol=2e-5)
    y = linen_rnn(False).apply(new, BATCH_MAJOR, initial_carry=start)
    assert_close(y.swapaxes(0, 1), EVALUATE(params, after, XS, lengths)[1], atol=2e-6)


@pytest.mark.slow
def test_linen_cell_alone_and_in_its_ways():
    """Standing alone, frozen statistics in training, a traced mode, and parameters of other shapes."""
    variables = linen_rnn(True).init(jax.random.key(0), BATCH_MAJOR)
    params, state = of_linen(variables)
    cell = LinenCell(HIDDEN, ROWS, jnp.array(False), KEEP)
    carry = cell.initialize_carry(jax.random.key(0), (BATCH, INPUTS))
    single = {name: v["cell"] for name, v in variables.items()}
    (after, y), update = cell.apply(single, carry, XS[0], mutable=["batch_stats"])
    own, own_y, new = lstm_step(params, state, lstm_carry(params, BATCH), XS[0], True, momentum=KEEP)
    assert_close((y, after.c), (own_y, own.c), atol=2e-6)
    assert_close(of_linen({n: {"cell": v} for n, v in (single | update).items()})[1], new, atol=2e-6)
    rnn = linen.RNN(cell.clone(), variable_broadcast=("params", "batch_stats"))
    with pytest.raises(ModifyScopeVariableError):  # not mutable, where training updates
        rnn.apply(variables, BATCH_MAJOR)
    y, _ = linen_rnn(True, jnp.bfloat16).apply(variables, BATCH_MAJOR, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    assert jax.tree.structure(cell.init(jax.random.key(0), carry, XS[0])) == jax.tree.structure(single)


@pytest.mark.slow
@FULL_IS_SLOW
def test_nnx_cell_is_the_function(lengths):
    rnn = nnx_rnn()
    params, state = of_nnx(rnn.cell)
    start = rnn.cell.initialize_carry((BATCH, INPUTS), lengths=lengths)

    @nnx.jit
    def train(rnn):
        def loss(rnn):
            carry, y = rnn(jnp.asarray(BATCH_MAJOR), initial_carry=start, return_carry=True)
            return jnp.sum(y * G.swapaxes(0, 1)), (carry, y)

        return nnx.grad(loss, has_aux=True)(rnn)

    def wanted(params):
        carry, ys, after = run(params, state, XS, True, lengths)
        return jnp.sum(ys * G), (carry, ys, after)

    gradients, (carry, y) = train(rnn)
    own, (own_carry, ys, after) = jax.jit(jax.grad(wanted, has_aux=True))(params)
    got = (y.swapaxes(0, 1), of_nnx(rnn.cell)[1], carry.c, carry.h)
    assert_close(got, (ys, after, own_carry.c, own_carry.h), atol=2e-6)
    flat = {tuple(map(str, path)): v for path, v in nnx.to_flat_state(nnx.state(gradients, nnx.Param))}
    for name, value in own._asdict().items():
        for part, wanted_part in value._asdict().items() if hasattr(value, "_asdict") else [(None, value)]:
            if wanted_part is not None:
                path = ("cell", name) if part is None else ("cell", name, part)
                assert_close(flat[path][...], wanted_part, atol=2e-5)
    rnn.eval()
    y = rnn(jnp.asarray(BATCH_MAJOR), initial_carry=start)
    assert_close(y.swapaxes(0, 1), EVALUATE(params, after, XS, lengths)[1], atol=2e-6)
    assert_close(of_nnx(rnn.cell)[1], after, atol=2e-6)


@pytest.mark.slow
def test_nnx_rnn_as_it_is():
    """Without `state_axes`, which carries the parameters through the loop as well: the same."""
    rnn, plain = nnx_rnn(), nnx.RNN(nnx_rnn().cell)
    ys = rnn(jnp.asarray(BATCH_MAJOR)), plain(jnp.asarray(BATCH_MAJOR))
    assert_close(ys[0], ys[1], atol=0.0)
    assert_close(of_nnx(rnn.cell), of_nnx(plain.cell), atol=0.0)
    noisy = rnn.cell.initialize_carry((2, INPUTS), nnx.Rngs(0), nnx.initializers.normal(0.1))
    assert np.all(noisy.c != 0)
    assert np.all(noisy.c != noisy.h)
    assert nnx_rnn(dtype=jnp.bfloat16)(jnp.asarray(BATCH_MAJOR)).dtype == jnp.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
def test_flax_may_take_the_last_carry_itself(reverse):
    """`seq_lengths` beside our lengths, and alone, where statistics know nothing of them (as in evaluation)."""
    variables = linen_rnn(True).init(jax.random.key(0), BATCH_MAJOR)
    lengths = np.maximum(LENGTHS, 1)
    cell = LinenCell(HIDDEN, ROWS, True)
    start = cell.initialize_carry(jax.random.key(0), (BATCH, INPUTS), lengths)
    rnn = linen_rnn(False, return_carry=True, reverse=reverse)
    ours, y = rnn.apply(variables, BATCH_MAJOR, initial_carry=start, seq_lengths=lengths)
    flax, _ = rnn.apply(variables, BATCH_MAJOR, seq_lengths=lengths)
    assert_close((ours.c, ours.h), (flax.c, flax.h), atol=1e-6)
    assert_close(ours.h, y[np.arange(BATCH), lengths - 1], atol=0.0)
    stateful = nnx_rnn(use_running_average=True)
    carry, y = stateful(jnp.asarray(BATCH_MAJOR), seq_lengths=jnp.asarray(lengths), return_carry=True, reverse=reverse)
    assert_close(carry.h, y[np.arange(BATCH), lengths - 1], atol=0.0)


@pytest.mark.slow
@each_way
def test_cells_on_many_devices(way):
    """Under flax's `RNN`, whose loop must keep the type of its carry: the lengths make the carry differ."""
    layer = linen.RNN(LinenCell(HIDDEN, ROWS, False, KEEP, axis_name=way.axis_name), variable_carry="batch_stats")
    variables = linen_rnn(True).init(jax.random.key(0), BATCH_MAJOR)
    params, state = of_linen(variables)
    graph, values = nnx.split(nnx_rnn(axis_name=way.axis_name))

    def member(whole, parts):
        shape = (len(parts["lengths"]), INPUTS)
        start = layer.cell.initialize_carry(jax.random.key(0), shape, parts["lengths"])
        y, update = layer.apply(whole["linen"], parts["xs"], initial_carry=start, mutable=["batch_stats"])
        rnn = nnx.merge(graph, whole["nnx"])
        again = rnn(parts["xs"], initial_carry=rnn.cell.initialize_carry(shape, lengths=parts["lengths"]))
        return (y, again), (of_linen(variables | update)[1], of_nnx(rnn.cell)[1])

    (y, again), states = way.run(member, {"linen": variables, "nnx": values}, PARTS)
    for got, new, held in ((y, states[0], (params, state)), (again, states[1], of_nnx(nnx_rnn().cell))):
        _, ys, after = TRAIN(*held, PARTS["xs"].swapaxes(0, 1), PARTS["lengths"])
        assert_close((got.swapaxes(0, 1), new), (ys, after), atol=1e-5)


@pytest.mark.slow
def test_the_backward_pass_keeps_no_state():
    """What is kept grows with steps and sequences, not with the rows of statistics."""
    kept = []
    for steps in (ROWS, 64 * ROWS):
        params, state = model(steps=steps)
        back = jax.vjp(lambda p, x, s=state: run(p, s, x)[1], params, XS)[1]
        kept.append(sum(leaf.nbytes for leaf in jax.tree.leaves(back)))
    assert kept[0] == kept[1]


# Mistakes

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
