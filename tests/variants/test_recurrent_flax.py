"""The recurrent cells of linen and nnx in Flax's `RNN`, against the functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from flax.errors import ModifyScopeVariableError
from lstm_oracle import (
    BATCH,
    EVALUATE,
    FULL_IS_SLOW,
    HIDDEN,
    INPUTS,
    KEEP,
    LENGTHS,
    PARTS,
    ROWS,
    TRAIN,
    XS,
    G,
    model,
    run,
)
from ways import assert_close, each_way

import jaxbn
from jaxbn.linen import BatchNormLSTMCell as LinenCell
from jaxbn.lstm import LSTMParams, LSTMState, lstm_carry, lstm_step
from jaxbn.nnx import BatchNormLSTMCell as NnxCell

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
    """The result is the same without `state_axes`, which carries the parameters through the loop as well."""
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
    """The loop of flax's `RNN` must keep the type of its carry: the lengths make the carry differ."""
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
