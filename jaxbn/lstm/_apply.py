"""One step and a whole sequence of a batch-normalized LSTM."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxbn._core import check
from jaxbn._core.batch_norm import bn_apply
from jaxbn._core.layout import name_mesh, replicate_on_mesh
from jaxbn._core.state import BatchNormParams, BatchNormState, check_record
from jaxbn.lstm._state import LSTMCarry, LSTMParams, LSTMState, check_steps, count_hidden, require_type

# Options that the cell itself passes to `bn_apply`.
_OWN = {"axis", "mask", "residual", "activation"}


def lstm_step(
    params: LSTMParams, state: LSTMState, carry: LSTMCarry, x: ArrayLike, train: bool | jax.Array, **options: Any
) -> tuple[LSTMCarry, jax.Array, LSTMState]:
    """Compute one step of a batch-normalized LSTM.

    With BN by the statistics of this time step,

        i, f, g, o = BN(x W_x; scale_x) + BN(h W_h; scale_h) + bias
        c' = sigmoid(f) c + sigmoid(i) tanh(g)
        h' = sigmoid(o) tanh(BN(c'; scale_c, bias_c))

    Args:
        params, state: from `lstm_init`; `state` from an earlier batch too.
        carry: from `lstm_carry` or the step before.
        x: inputs of this step, `[*batch, inputs]`, floating point. Products and gates are in its dtype, statistics in
            float32 at least.
        train: True for batch statistics, False for running ones; a scalar bool array makes one program of both.
        **options: as for `bn_apply`: momentum, epsilon, axis_name, axis_index_groups, update, and so on. They go to
            all three normalizations.

    Returns:
        `(carry, y, state)`: y is h', in the dtype of x. In training at step t row `min(t, max_steps - 1)` of the state
        is updated. In evaluation the row is that of step t, or the last before it that has had an update.

    Raises:
        TypeError, ValueError: an argument of another type or shape than stated, or as `bn_apply`.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbn
        >>> from jaxbn.lstm import lstm_step
        >>> from jaxbn.lstm import lstm_carry, lstm_init
        >>> params, state = lstm_init(jax.random.key(0), 3, 5, max_steps=10)
        >>> carry, x = lstm_carry(params, 2), jnp.array([[0.0, 1.0, 2.0], [1.0, 0.0, 1.0]])
        >>> carry, y, state = lstm_step(params, state, carry, x, train=True)
        >>> y.shape, int(carry.step), state.cell_norm.count.tolist()
        ((2, 5), 1, [1, 0, 0, 0, 0, 0, 0, 0, 0, 0])

    Cooijmans et al. 2017, "Recurrent batch normalization". Late steps are reached by few sequences, and seldom:
    `momentum=jaxbn.zero_debiased(0.99)` makes their statistics right from the first update. All sequences of a batch
    start together; one that restarts in the middle has no statistics of its own.
    """
    x = check.floating("x", x)
    train = check.flag("train", train)
    _check_shapes(params, state, carry, x.shape, options)
    x = _select_active(_find_active(carry, _current_step(carry)), x, 0)
    return _step(params, state, carry, _multiply(x, params.input_kernel), train, options)


def lstm_apply(
    params: LSTMParams, state: LSTMState, carry: LSTMCarry, xs: ArrayLike, train: bool | jax.Array, **options: Any
) -> tuple[LSTMCarry, jax.Array, LSTMState]:
    """Run a batch-normalized LSTM over a batch of sequences: `lstm_step` under `jax.lax.scan`.

    Args:
        params, state, train, **options: as for `lstm_step`.
        carry: from `lstm_carry`, with `lengths` where they differ; or where an earlier piece of the sequences ended.
        xs: inputs, `[time, *batch, inputs]`.

    Returns:
        `(carry, ys, state)`: `ys` `[time, *batch, hidden]`. Where a sequence has ended y is its last one, so `ys[-1]`
        holds the end of each.

    Raises:
        TypeError, ValueError: as `lstm_step`.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbn
        >>> from jaxbn.lstm import lstm_apply
        >>> from jaxbn.lstm import lstm_carry, lstm_init
        >>> params, state = lstm_init(jax.random.key(0), 1, 5, max_steps=3)
        >>> xs = jnp.array([[[0.0], [1.0]], [[2.0], [1.0]], [[3.0], [jnp.nan]]])
        >>> carry, ys, state = lstm_apply(params, state, lstm_carry(params, 2, lengths=[3, 2]), xs, train=True)
        >>> ys.shape, bool(jnp.isfinite(ys).all()), bool((ys[2, 1] == ys[1, 1]).all())
        ((3, 2, 5), True, True)

    Cooijmans et al. 2017, "Recurrent batch normalization"; averaging the statistics over time degrades it severely.
    Where h starts at zero, the variance of `h W_h` at step 0 is zero, and so is that of inputs that all sequences start
    with: do not evaluate with another start than that of training.
    """
    xs = check.floating("xs", xs)
    train = check.flag("train", train)
    if xs.ndim < 2:
        raise ValueError(f"`xs` must be [time, *batch, inputs]; got shape {xs.shape}. One step is `lstm_step`.")
    _check_shapes(params, state, carry, xs.shape[1:], options)
    now = _current_step(carry)
    if carry.lengths is not None:
        steps = now + jnp.arange(xs.shape[0], dtype=now.dtype)
        xs = _select_active(jax.vmap(partial(_find_active, carry))(steps), xs, 0)

    def step(loop, projected):
        after, y, state = _step(params, loop[1], loop[0], projected, train, options)
        return (after, state), y

    def first(loop, projected):
        return step(loop, projected[0])[0]

    projected, loop = _multiply(xs, params.input_kernel), (carry, state)  # of all steps at once
    for _ in range(2 if xs.shape[0] else 0):
        # Zeros are the same on all devices and h is not: a loop must start with the types that it continues with. Once
        # for the axes along which x varies, once for those of h.
        after = jax.eval_shape(first, loop, projected)
        loop = jax.tree.map(lambda v, to: v + jnp.zeros_like(name_mesh(to, xs)), loop, after)
    (carry, state), ys = lax.scan(step, loop, projected)
    return carry, ys, state


def _step(params, state, carry, projected, train, options):
    """Compute a step from `x W_x`."""
    at, dtype = _current_step(carry), projected.dtype
    active = _find_active(carry, at)
    mask = None if active is None else active[..., None]

    def normalize_row(norm, rows, v, **more):
        row = _find_row(rows.count, at, train)
        own = jax.tree.map(lambda s: lax.dynamic_index_in_dim(s, row, keepdims=False), rows)
        y, new = bn_apply(norm, own, v, train, mask=mask, **more, **options)
        rows = jax.tree.map(lambda s: replicate_on_mesh(jnp.asarray(s), v), rows)
        return y, jax.tree.map(lambda s, n: lax.dynamic_update_index_in_dim(s, n, row, 0), rows, new)

    from_x, input_norm = normalize_row(params.input_norm, state.input_norm, projected)
    from_h = _multiply(carry.h.astype(dtype), params.recurrent_kernel)
    gates, recurrent_norm = normalize_row(params.recurrent_norm, state.recurrent_norm, from_h, residual=from_x)
    i, f, g, o = (v.astype(carry.c.dtype) for v in jnp.split(gates, 4, -1))
    c = jax.nn.sigmoid(f) * carry.c + jax.nn.sigmoid(i) * jnp.tanh(g)
    bounded, cell_norm = normalize_row(params.cell_norm, state.cell_norm, c, activation=jnp.tanh)
    h = (jax.nn.sigmoid(o) * bounded).astype(carry.h.dtype)
    after = LSTMCarry(
        _select_active(active, c, carry.c), _select_active(active, h, carry.h), carry.step + 1, carry.lengths
    )
    return after, after.h.astype(dtype), LSTMState(input_norm, recurrent_norm, cell_norm)


def _find_row(count: jax.Array, at: jax.Array, train: bool | jax.Array) -> jax.Array:
    """Return the row of the state that holds the statistics for step `at`."""
    own = jnp.minimum(at, count.shape[0] - 1)
    if train is True:
        return own
    rows = jnp.arange(count.shape[0], dtype=own.dtype)
    seen = jnp.max(jnp.where((count > 0) & (rows <= own), rows, 0))
    return seen if train is False else jnp.where(train, own, seen)


def _current_step(carry: LSTMCarry) -> jax.Array:
    return jnp.max(carry.step)


def _find_active(carry: LSTMCarry, at: jax.Array) -> jax.Array | None:
    """Return which sequences have not ended."""
    return None if carry.lengths is None else at < carry.lengths


def _select_active(active: jax.Array | None, v: jax.Array, otherwise: Any) -> jax.Array:
    return v if active is None else jnp.where(active[..., None], v, otherwise)


def _multiply(v: jax.Array, kernel: jax.Array) -> jax.Array:
    return v @ kernel.astype(v.dtype)


def _check_shapes(params: Any, state: Any, carry: Any, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    """Check that all arrays fit x of `shape`, `[*batch, inputs]`."""
    hidden, batch = count_hidden(params), shape[:-1]
    require_type("state", state, LSTMState, "lstm_init")
    require_type("carry", carry, LSTMCarry, "lstm_carry")
    if taken := _OWN & set(options):
        raise TypeError(f"`{min(taken)}` is not an option here: the cell itself passes it to `bn_apply`.")
    check_steps("carry.step", carry.step)
    wanted = {
        "params.input_kernel": (params.input_kernel, (*shape[-1:], 4 * hidden)),
        "params.recurrent_kernel": (params.recurrent_kernel, (hidden, 4 * hidden)),
        "carry.c": (carry.c, (*batch, hidden)),
        "carry.h": (carry.h, (*batch, hidden)),
    }
    if carry.lengths is not None:
        check_steps("carry.lengths", carry.lengths)
        wanted["carry.lengths"] = (carry.lengths, batch)
    for name, norm in state._asdict().items():
        check_record(f"params.{name}", getattr(params, name), "that of `lstm_init`", BatchNormParams)
        check_record(f"state.{name}", norm, "that of `lstm_init`", BatchNormState)
        steps, features = np.shape(norm.count), hidden if name == "cell_norm" else 4 * hidden
        if len(steps) != 1 or steps[0] < 1:
            raise ValueError(f"`state.{name}.count` must be [max_steps]; got shape {steps}. Make it by `lstm_init`.")
        wanted |= {f"state.{name}.{part}": (getattr(norm, part), (*steps, features)) for part in ("mean", "var")}
    for name, (value, expected) in wanted.items():
        if name != "carry.lengths":
            check.floating(name, value)
        if not hasattr(value, "astype"):
            raise TypeError(f"`{name}` must be an array; got {type(value).__name__}. Convert it by `jnp.asarray`.")
        if np.shape(value) != expected:
            raise ValueError(
                f"`{name}` must have shape {expected} for x {shape} and {hidden} hidden features; got "
                f"{np.shape(value)}. Make params and state by `lstm_init`, the carry for this batch by `lstm_carry`; a "
                "Flax cell makes its own by `initialize_carry`."
            )
