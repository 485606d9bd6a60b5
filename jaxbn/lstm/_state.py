"""Parameters, running statistics and carry of a batch-normalized LSTM."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.export import register_namedtuple_serialization
from jax.typing import ArrayLike, DTypeLike

from jaxbn._core import check
from jaxbn._core.state import BatchNormParams, BatchNormState, bn_init

Initializer = Callable[..., jax.Array]

LECUN, ORTHOGONAL = jax.nn.initializers.lecun_normal(), jax.nn.initializers.orthogonal()
TENTH, ZEROS = jax.nn.initializers.constant(0.1), jax.nn.initializers.zeros


@partial(register_namedtuple_serialization, serialized_name="jaxbn.lstm.LSTMParams")
class LSTMParams(NamedTuple):
    """Learned parameters. The gates' four blocks lie side by side: input, forget, candidate, output (i, f, g, o).

    Attributes:
        input_kernel: `[inputs, 4 hidden]`.
        recurrent_kernel: `[hidden, 4 hidden]`.
        input_norm: of `x W_x`: scale `[4 hidden]`, no bias.
        recurrent_norm: of `h W_h`: scale and bias `[4 hidden]`; its bias is that of the gates.
        cell_norm: of c: scale and bias `[hidden]`.
    """

    input_kernel: jax.Array
    recurrent_kernel: jax.Array
    input_norm: BatchNormParams
    recurrent_norm: BatchNormParams
    cell_norm: BatchNormParams


@partial(register_namedtuple_serialization, serialized_name="jaxbn.lstm.LSTMState")
class LSTMState(NamedTuple):
    """Running statistics, each array with a leading axis of time steps: `[max_steps, ...]`."""

    input_norm: BatchNormState
    recurrent_norm: BatchNormState
    cell_norm: BatchNormState


@partial(register_namedtuple_serialization, serialized_name="jaxbn.lstm.LSTMCarry")
class LSTMCarry(NamedTuple):
    """State of the recurrence, from step to step.

    Attributes:
        c, h: cell and output, `[*batch, hidden]`.
        step: int32 `[]`, how many steps the batch has made. (Flax gives it other shapes; the largest counts.)
        lengths: int32 `[*batch]`, how many steps each sequence has in all; None where all are endless.
    """

    c: jax.Array
    h: jax.Array
    step: jax.Array
    lengths: jax.Array | None = None


def lstm_init(
    key: jax.Array,
    num_inputs: int,
    num_hidden: int,
    max_steps: int,
    *,
    dtype: DTypeLike = jnp.float32,
    scale: ArrayLike = 0.1,
    kernel_init: Initializer = LECUN,
    recurrent_kernel_init: Initializer = ORTHOGONAL,
) -> tuple[LSTMParams, LSTMState]:
    """Initialize the parameters and the state of a batch-normalized LSTM.

    Args:
        key: for the kernels.
        num_inputs, num_hidden: features of x and of h.
        max_steps: for how many time steps statistics are kept; later ones share the last.
        dtype: of the parameters, floating point. The state is float32, or float64 if `dtype` is.
        scale: where the three scales start. At 1 the tanh saturates, and its gradient vanishes.
        kernel_init, recurrent_kernel_init: initializers `(key, shape, dtype)` of the block of each gate.

    Returns:
        `(params, state)`.

    Raises:
        TypeError, ValueError: a size is not a positive int, `key` is not one key, or an initializer is not a function
            that returns the shape it gets; or as `bn_init`.

    Example:
        >>> import jax, jaxbn
        >>> from jaxbn.lstm import lstm_init
        >>> params, state = lstm_init(jax.random.key(0), 3, 5, max_steps=10)
        >>> params.recurrent_kernel.shape, state.cell_norm.mean.shape, state.cell_norm.count.shape
        ((5, 20), (10, 5), (10,))

    Cooijmans et al. 2017, "Recurrent batch normalization".
    """
    for name, value in (("num_inputs", num_inputs), ("num_hidden", num_hidden), ("max_steps", max_steps)):
        check.positive(name, value)
    wide = 4 * num_hidden
    norms = [
        bn_init(n, dtype=dtype, scale=scale, bias=bias)[0] for n, bias in ((wide, None), (wide, 0), (num_hidden, 0))
    ]
    kind = jnp.result_type(norms[-1].bias)
    if jnp.issubdtype(kind, jnp.complexfloating):
        raise TypeError(f"`dtype` must be real: the gates are; got {kind}.")
    try:
        for_inputs, for_hidden = jax.random.split(key)
    except jax.errors.UnexpectedTracerError:  # a TypeError too, which says more
        raise
    except (TypeError, ValueError):
        raise TypeError(f"`key` must be one key, such as `jax.random.key(0)`; got {key!r}.") from None
    params = LSTMParams(
        init_by_gate(kernel_init)(for_inputs, (num_inputs, wide), kind),
        init_by_gate(recurrent_kernel_init)(for_hidden, (num_hidden, wide), kind),
        *norms,
    )
    return params, LSTMState(*(init_rows(max_steps, n, kind) for n in (wide, wide, num_hidden)))


def lstm_carry(params: LSTMParams, batch: int | Sequence[int], lengths: ArrayLike | None = None) -> LSTMCarry:
    """Return the carry with which a batch of sequences starts: c and h are zero, at step 0.

    Args:
        params: from `lstm_init`.
        batch: the number of sequences, an int or a tuple of ints.
        lengths: the number of steps of each, integers `[*batch]`. A sequence that has ended enters no statistic and
            stays as it is; its padding may hold anything, NaN too.

    Returns:
        The carry, in float32, or float64 if `params` are.

    Raises:
        TypeError, ValueError: `batch` is not made of ints, `lengths` are not integers, negative, beyond int32, or of
            another shape, or `params` are not those of `lstm_init`.

    Example:
        >>> import jax, jaxbn
        >>> from jaxbn.lstm import lstm_carry, lstm_init
        >>> params, _ = lstm_init(jax.random.key(0), 3, 5, max_steps=10)
        >>> carry = lstm_carry(params, 2, lengths=[10, 7])
        >>> carry.c.shape, carry.lengths
        ((2, 5), Array([10,  7], dtype=int32))
    """
    hidden, dtype = count_hidden(params), check.accumulation_dtype(params.recurrent_kernel.dtype)
    shape = (*check.sizes(batch, "batch"), hidden)
    return _start_carry(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), lengths)


def carry_for_flax(
    init: Initializer, keys: Sequence[Any], shape: tuple[int, ...], dtype: DTypeLike, lengths: ArrayLike | None
) -> LSTMCarry:
    """Return the carry of `lstm_carry`, for `RNN` of either Flax API.

    Its loop, unlike that of `lstm_apply`, takes no carry that is the same on all devices where x is not: under
    `shard_map(check_vma=True)` and on an explicit mesh JAX refuses it, unless there are `lengths`, whose type says
    along which axes it differs.
    """
    c, h = (init(key, shape, check.accumulation_dtype(dtype)) for key in keys)
    carry = _start_carry(c, h, lengths)
    # RNN takes the last carry of each sequence along axis 1 of `[time, batch, ...]`. Of size 1 it serves all of them.
    return carry._replace(step=carry.step[None])


def init_rows(max_steps: int, num_features: int, dtype: DTypeLike) -> BatchNormState:
    """Initialize the state of one normalization, with a row for each time step."""
    _, state = bn_init(num_features, dtype=dtype)
    return jax.tree.map(lambda v: jnp.array(jnp.broadcast_to(v, (max_steps, *v.shape))), state)


def init_by_gate(init: Initializer) -> Initializer:
    """Return an initializer of a kernel `[inputs, 4 hidden]` from that of one gate's block."""
    if not callable(init):
        raise TypeError(
            "`kernel_init` and `recurrent_kernel_init` must be functions `(key, shape, dtype)`, such as "
            f"`jax.nn.initializers.orthogonal()`; got {init!r}."
        )

    def blocks(key: jax.Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> jax.Array:
        block = (shape[0], shape[1] // 4)
        # No orthogonal matrix can be computed in half precision. And all gates in one: several batches of QR
        # decompositions at the same time can wait for each other for ever on a CPU of two cores.
        parts = jax.vmap(lambda k: init(k, block, check.accumulation_dtype(dtype)))(jax.random.split(key, 4))
        if any(v.shape[1:] != block for v in jax.tree.leaves(parts)):
            raise ValueError(
                f"An initializer must return an array of the shape that it gets, {block}; got "
                f"{[v.shape[1:] for v in jax.tree.leaves(parts)]}. It makes the block of one gate."
            )
        # A block may be a box with the names of its axes.
        return jax.tree.map(lambda v: jnp.moveaxis(v, 0, 1).reshape(shape).astype(dtype), parts)

    return blocks


def _start_carry(c: jax.Array, h: jax.Array, lengths: ArrayLike | None) -> LSTMCarry:
    """Return the carry before the first step."""
    step = jnp.zeros((), jnp.int32)
    if lengths is None:
        return LSTMCarry(c, h, step)
    check_steps("lengths", lengths)
    if np.shape(lengths) != c.shape[:-1]:
        raise ValueError(f"`lengths` must have the shape of the batch, {c.shape[:-1]}; got {np.shape(lengths)}.")
    if not isinstance(lengths, Tracer) and not np.all((np.asarray(lengths) >= 0) & (np.asarray(lengths) < 2**31)):
        raise ValueError(f"`lengths` must be at least 0 and fit int32; got {lengths}.")
    lengths = jnp.asarray(lengths, jnp.int32)
    # Zeros are the same on all devices and lengths are not: a loop must start with the types that it continues with.
    c, h = (v + jnp.zeros_like(lengths, v.dtype)[..., None] for v in (c, h))
    return LSTMCarry(c, h, step, lengths)


def check_steps(name: str, value: Any) -> None:
    """Check that `value`, the argument `name`, is made of integers."""
    try:
        kind = value.dtype if isinstance(value, jax.Array) else np.asarray(value).dtype
    except ValueError:  # a ragged list
        kind = np.dtype(object)
    if not jnp.issubdtype(kind, jnp.integer):
        raise TypeError(f"`{name}` must be integers, numbers of steps; got dtype {kind}.")


def count_hidden(params: Any) -> int:
    """Return the number of hidden features, after a check of the recurrent kernel."""
    require_type("params", params, LSTMParams, "lstm_init")
    kernel = params.recurrent_kernel
    if not isinstance(kernel, jax.ShapeDtypeStruct):  # shape and dtype are all that a carry needs
        check.floating("params.recurrent_kernel", kernel)
    if len(getattr(kernel, "shape", ())) != 2:
        raise ValueError(
            f"`params.recurrent_kernel` must be an array [hidden, 4 hidden]; got {type(kernel).__name__} of shape "
            f"{np.shape(kernel)}. Make it by `lstm_init`."
        )
    return kernel.shape[0]


def require_type(name: str, value: Any, kind: type, maker: str) -> None:
    """Raise TypeError unless `value` is a `kind`, which `maker` makes."""
    if not isinstance(value, kind):
        raise TypeError(f"`{name}` must be a {kind.__name__}; got {type(value).__name__}. Make it by `{maker}`.")
