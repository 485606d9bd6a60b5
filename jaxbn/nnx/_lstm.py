"""Hold the variables of a batch-normalized LSTM cell for Flax nnx; `lstm_step` computes it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.recurrent import RNNCellBase
from flax.typing import Dtype, Initializer
from jax.typing import ArrayLike

from jaxbn._core import check
from jaxbn._core.momentum import Momentum
from jaxbn._core.state import BatchNormParams, BatchNormState
from jaxbn._flax.dtypes import check_dtypes
from jaxbn._flax.forward import LSTM, call_lstm, negate_flag, read_constant, read_options
from jaxbn._flax.rnn_lengths import find_rnn_lengths
from jaxbn.lstm._state import (
    LECUN,
    ORTHOGONAL,
    TENTH,
    ZEROS,
    LSTMCarry,
    LSTMParams,
    LSTMState,
    carry_for_flax,
    init_by_gate,
    init_rows,
)
from jaxbn.nnx._batch_norm import BatchNorm, choose_mode


class BatchNormLSTMCell(RNNCellBase):
    """An LSTM cell with recurrent batch normalization, for `flax.nnx.RNN`; see `jaxbn.lstm.lstm_step`.

    `i, f, g, o = BN(x W_x) + BN(h W_h) + bias`, `c' = sigmoid(f) c + sigmoid(i) tanh(g)` and
    `h' = sigmoid(o) tanh(BN(c'))`, with statistics of their own for each time step, which are carried through the
    scan: `nnx.RNN(cell, state_axes=nnx.StateAxes({nnx.BatchStat: nnx.Carry, ...: None}))`.

    Attributes that hold arrays: `input_kernel` and `recurrent_kernel`, `nnx.Param` `[.., 4 hidden]` in the order
    i, f, g, o; and `input_norm`, `recurrent_norm` and `cell_norm`, each with `scale` and `bias` (`nnx.Param`; the first
    has no bias) and `mean`, `var` and `count` (`nnx.BatchStat`, `[max_steps, ...]`). `train()`, `eval()` and `nnx.view`
    set `use_running_average`.

    Args:
        in_features: of x.
        hidden_features: of h.
        max_steps: for how many time steps statistics are kept; later ones share the last.
        use_running_average: normalize by the running statistics (evaluation) rather than by the batch (training). A
            scalar bool array makes one program of both.
        momentum: the fraction of the running value that is kept, or a schedule of the number of updates.
        epsilon: added to the variance.
        dtype: of the output; by default that to which x and the parameters promote. The carry is float32 at least.
        param_dtype: of the parameters.
        kernel_init, recurrent_kernel_init: initializers of the kernels, for the block of each gate.
        bias_init: of the bias of the gates, `[4 hidden]`.
        scale_init: of the three scales, 0.1. At 1 the tanh saturates.
        axis_name: named axis or axes over which statistics are shared. Not needed under `jit` with sharded arrays.
        axis_index_groups: a partition of that axis into groups that share statistics.
        rngs: for the initializers.

    Raises:
        TypeError, ValueError: as `lstm_init` and `lstm_step`; and where `use_running_average` is None.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxbn.nnx import BatchNormLSTMCell
        >>> cell = BatchNormLSTMCell(3, 5, max_steps=4, rngs=nnx.Rngs(0))
        >>> rnn = nnx.RNN(cell, state_axes=nnx.StateAxes({nnx.BatchStat: nnx.Carry, ...: None}))
        >>> x = jax.random.normal(jax.random.key(0), (8, 4, 3))  # [batch, time, inputs]
        >>> y = rnn(x)
        >>> y.shape, cell.cell_norm.count[...].tolist()
        ((8, 4, 5), [1, 1, 1, 1])

        Sequences of different lengths: padding enters no statistic.

        >>> carry, y = rnn(x, seq_lengths=jnp.array([4, 4, 3, 3, 2, 2, 1, 1]), return_carry=True)
        >>> carry.h.shape, bool((carry.h[6] == y[6, 0]).all())
        ((8, 5), True)

    Cooijmans et al. 2017, "Recurrent batch normalization". An `initial_carry` of your own must hold the lengths:
    `initialize_carry(..., lengths=...)`. Under `jax.shard_map(check_vma=True)` and on Explicit meshes give lengths in
    any case: without them the carry starts the same on all devices, which `lax.scan` refuses. `jaxbn.lstm.lstm_apply`
    takes `update=False` and other options of `bn_apply`, which `nnx.RNN` does not hand to its cell.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        max_steps: int,
        *,
        use_running_average: bool | jax.Array | None = False,
        momentum: Momentum = 0.99,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = LECUN,
        recurrent_kernel_init: Initializer = ORTHOGONAL,
        bias_init: Initializer = ZEROS,
        scale_init: Initializer = TENTH,
        axis_name: str | Sequence[str] | None = None,
        axis_index_groups: Any = None,
        rngs: nnx.Rngs,
    ):
        check_dtypes(dtype=dtype, param_dtype=param_dtype)
        inputs, hidden = (
            check.positive("in_features", in_features),
            check.positive("hidden_features", hidden_features),
        )
        steps = check.positive("max_steps", max_steps)

        def kernel(init, size):
            return nnx.Param(init_by_gate(init)(rngs.params(), (size, 4 * hidden), param_dtype))

        def norm(features, **inits):
            own = {part: nnx.Param(init(rngs.params(), (features,), param_dtype)) for part, init in inits.items()}
            stats = init_rows(steps, features, param_dtype)._asdict()
            return nnx.Dict(own | {part: nnx.BatchStat(v) for part, v in stats.items()})

        self.input_kernel = kernel(kernel_init, inputs)
        self.recurrent_kernel = kernel(recurrent_kernel_init, hidden)
        self.input_norm = norm(4 * hidden, scale=scale_init)
        self.recurrent_norm = norm(4 * hidden, scale=scale_init, bias=bias_init)
        self.cell_norm = norm(hidden, scale=scale_init, bias=ZEROS)
        self.in_features, self.hidden_features, self.max_steps = inputs, hidden, steps
        self.use_running_average = use_running_average
        self.momentum, self.epsilon = momentum, read_constant(epsilon)
        self.dtype, self.param_dtype = dtype, param_dtype
        self.axis_name, self.axis_index_groups = axis_name, axis_index_groups

    def __call__(self, carry: LSTMCarry, inputs: ArrayLike) -> tuple[LSTMCarry, jax.Array]:  # type: ignore[override]
        """Make one step; in training update the running statistics.

        Args:
            carry: from `initialize_carry` or the step before.
            inputs: `[*batch, in_features]`.

        Returns:
            The new carry, and the output `[*batch, hidden_features]`.
        """
        x, train = check.array("inputs", inputs), negate_flag(choose_mode(self))
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"`inputs` must be [*batch, {self.in_features}], for which the cell was made; got {x.shape}. Make it "
                "with `in_features` of such inputs."
            )
        norms = [getattr(self, name) for name in LSTMState._fields]
        own = [BatchNormParams(n["scale"][...], n["bias"][...] if "bias" in n else None) for n in norms]
        params = LSTMParams(self.input_kernel[...], self.recurrent_kernel[...], *own)
        state = LSTMState(*(BatchNormState(*(n[part][...] for part in BatchNormState._fields)) for n in norms))
        carry, y, new = call_lstm(read_options(self, LSTM), params, state, carry, x, train, dtype=self.dtype)
        if train is not False:
            for n, stats in zip(norms, new, strict=True):
                for part, value in stats._asdict().items():
                    n[part].set_value(value)
        return carry, y

    def initialize_carry(  # type: ignore[override]
        self,
        input_shape: tuple[int, ...],
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        carry_init: Initializer | None = None,
        *,
        lengths: ArrayLike | None = None,
    ) -> LSTMCarry:
        """Make the carry before the first step of a batch of sequences.

        Args:
            input_shape: `[*batch, inputs]`.
            rngs: for `carry_init`.
            carry_init: initializer of c and h, zeros by default.
            lengths: how many steps each sequence has, integers `[*batch]`; None where all are endless, or for the
                `seq_lengths` of the `nnx.RNN` that asks.

        Returns:
            The carry, in float32 at least.
        """
        lengths = find_rnn_lengths(nnx.RNN) if lengths is None else lengths
        keys = [None, None]
        if carry_init is not None:
            if rngs is None:
                raise ValueError("`rngs` must be given with `carry_init`, for example `nnx.Rngs(0)`.")
            stream = rngs["carry"] if isinstance(rngs, nnx.Rngs) else rngs
            keys = [stream(), stream()]
        shape = (*input_shape[:-1], self.hidden_features)
        return carry_for_flax(carry_init or ZEROS, keys, shape, self.param_dtype, lengths)

    @property
    def num_feature_axes(self) -> int:
        """Return the number of feature axes of the input."""
        find_rnn_lengths(nnx.RNN)  # which asks for this first: lengths that do not fit are refused
        return 1

    set_view = BatchNorm.set_view
