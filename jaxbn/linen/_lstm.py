"""Hold the variables of a batch-normalized LSTM cell for Flax linen; `lstm_step` computes it."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import ScopeCollectionNotFound
from flax.typing import Dtype, Initializer
from jax.typing import ArrayLike

from jaxbn._core import check
from jaxbn._core.momentum import Momentum
from jaxbn._core.state import BatchNormParams, BatchNormState
from jaxbn._flax.dtypes import check_dtypes
from jaxbn._flax.forward import LSTM, call_lstm, negate_flag, read_options
from jaxbn._flax.rnn_lengths import find_rnn_lengths
from jaxbn.lstm._state import (
    ZEROS,
    LSTMCarry,
    LSTMParams,
    LSTMState,
    carry_for_flax,
    init_by_gate,
    init_rows,
)


def is_of_cell(flat: Mapping[tuple[str, ...], Any], path: tuple[str, ...]) -> bool:
    """Return whether the statistics at `path` are one of a cell's three normalizations, which are no modules."""
    parts = ((*path[:-1], name, part) for name in LSTMState._fields for part in BatchNormState._fields)
    return path[-1] in LSTMState._fields and all(part in flat for part in parts)


class BatchNormLSTMCell(nn.RNNCellBase):
    """An LSTM cell with recurrent batch normalization, for `flax.linen.RNN`; see `jaxbn.lstm.lstm_step`.

    `i, f, g, o = BN(x W_x) + BN(h W_h) + bias`, `c' = sigmoid(f) c + sigmoid(i) tanh(g)` and
    `h' = sigmoid(o) tanh(BN(c'))`, with statistics of their own for each time step, which training carries through
    the scan: `nn.RNN(cell, variable_carry="batch_stats")`. Flax carries only mutable variables, so in evaluation it is
    `nn.RNN(cell, variable_broadcast=("params", "batch_stats"))`.

    Variables: `params/{input_kernel,recurrent_kernel}` `[.., 4 features]`, in the order i, f, g, o, and for each `norm`
    of `input_norm`, `recurrent_norm`, `cell_norm` `params/norm/{scale,bias}` (the first has no bias) and
    `batch_stats/norm/{mean,var,count}`, each `[max_steps, ...]`. They are left alone during `init`.

    Attributes:
        features: of h.
        max_steps: for how many time steps statistics are kept; later ones share the last.
        use_running_average: normalize by `batch_stats` (evaluation) rather than by the batch (training). A scalar bool
            array makes one program of both.
        momentum: the fraction of the running value that is kept, or a schedule of the number of updates.
        epsilon: added to the variance.
        dtype: of the output; by default that to which x and the parameters promote. The carry is float32 at least.
        param_dtype: of the parameters.
        kernel_init, recurrent_kernel_init: initializers of the kernels, for the block of each gate.
        bias_init: of the bias of the gates, `[4 features]`.
        scale_init: of the three scales, 0.1. At 1 the tanh saturates.
        carry_init: of c and h.
        axis_name: named axis or axes over which statistics are shared. Not needed under `jit` with sharded arrays.
        axis_index_groups: a partition of that axis into groups that share statistics.

    Raises:
        TypeError, ValueError: as `lstm_init` and `lstm_step`; and under an `nn.RNN` that does not bring the statistics.
        flax.errors.ModifyScopeVariableError: training where `batch_stats` are not mutable.
        flax.errors.ScopeParamShapeError: the kernels in the variables are for another number of inputs or `features`.

    Example:
        >>> import jax, jax.numpy as jnp, flax.linen as nn
        >>> from jaxbn.linen import BatchNormLSTMCell
        >>> def rnn(train):
        ...     how = {"variable_carry": "batch_stats"} if train else {"variable_broadcast": ("params", "batch_stats")}
        ...     cell = BatchNormLSTMCell(5, max_steps=4, use_running_average=not train)
        ...     return nn.RNN(cell, return_carry=True, **how)
        >>> x = jax.random.normal(jax.random.key(0), (8, 4, 3))  # [batch, time, inputs]
        >>> variables = rnn(False).init(jax.random.key(1), x)
        >>> (carry, y), update = rnn(True).apply(variables, x, mutable=["batch_stats"])
        >>> y.shape, update["batch_stats"]["cell"]["cell_norm"]["count"].tolist()
        ((8, 4, 5), [1, 1, 1, 1])
        >>> carry, y = rnn(False).apply(variables | update, x)

        Sequences of different lengths: padding enters no statistic.

        >>> lengths = jnp.array([4, 4, 3, 3, 2, 2, 1, 1])
        >>> (carry, y), update = rnn(True).apply(variables, x, seq_lengths=lengths, mutable=["batch_stats"])
        >>> carry.h.shape, bool((carry.h[6] == y[6, 0]).all())
        ((8, 5), True)

    Cooijmans et al. 2017, "Recurrent batch normalization". An `initial_carry` of your own must hold the lengths:
    `initialize_carry(..., lengths=...)`. Under `jax.shard_map(check_vma=True)` and on Explicit meshes give lengths in
    any case: without them the carry starts the same on all devices, which `lax.scan` refuses. `jaxbn.lstm.lstm_apply`
    takes `update=False` and other options of `bn_apply`, which `nn.RNN` does not hand to its cell.
    """

    features: int
    max_steps: int
    use_running_average: bool | jax.Array
    momentum: Momentum = 0.99
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    recurrent_kernel_init: Initializer = nn.initializers.orthogonal()
    bias_init: Initializer = nn.initializers.zeros_init()
    scale_init: Initializer = nn.initializers.constant(0.1)
    carry_init: Initializer = nn.initializers.zeros_init()
    axis_name: str | Sequence[str] | None = None
    axis_index_groups: Any = None

    def setup(self):
        """Make the statistics, whose shapes need no input."""
        check_dtypes(dtype=self.dtype, param_dtype=self.param_dtype)
        hidden, steps = check.positive("features", self.features), check.positive("max_steps", self.max_steps)
        sizes = {"input_norm": 4 * hidden, "recurrent_norm": 4 * hidden, "cell_norm": hidden}
        try:
            self.stats = [
                self.variable("batch_stats", name, lambda n=n: init_rows(steps, n, self.param_dtype)._asdict())
                for name, n in sizes.items()
            ]
        except ScopeCollectionNotFound:
            raise ValueError(
                "`batch_stats` must come to the cell, and they do not: plain `nn.RNN(cell)` brings the parameters "
                'alone. In training make it `nn.RNN(cell, variable_carry="batch_stats")`, in evaluation '
                '`nn.RNN(cell, variable_broadcast=("params", "batch_stats"))`.'
            ) from None

    @nn.compact
    def __call__(self, carry: LSTMCarry, inputs: ArrayLike) -> tuple[LSTMCarry, jax.Array]:
        """Make one step.

        Args:
            carry: from `initialize_carry` or the step before.
            inputs: `[*batch, inputs]`.

        Returns:
            The new carry, and the output `[*batch, features]`.
        """
        x, wide = check.array("inputs", inputs), 4 * self.features
        if not x.ndim:
            raise ValueError("`inputs` must be [*batch, inputs]; got a number.")

        def kernel(name, init, size):
            return self.param(name, init_by_gate(init), (size, wide), self.param_dtype)

        def norm(name, features, **inits):
            def first(key):
                keys = dict(zip(inits, jax.random.split(key, len(inits)), strict=True))
                return {part: init(keys[part], (features,), self.param_dtype) for part, init in inits.items()}

            return BatchNormParams(**{"bias": None, **self.param(name, first)})

        params = LSTMParams(
            kernel("input_kernel", self.kernel_init, x.shape[-1]),
            kernel("recurrent_kernel", self.recurrent_kernel_init, self.features),
            norm("input_norm", wide, scale=self.scale_init),
            norm("recurrent_norm", wide, scale=self.scale_init, bias=self.bias_init),
            norm("cell_norm", self.features, scale=self.scale_init, bias=ZEROS),
        )
        train = negate_flag(self.use_running_average)
        updates = not self.is_initializing() and train is not False
        carry, y, new = call_lstm(
            read_options(self, LSTM, self.is_initializing()),
            params,
            LSTMState(*(BatchNormState(**stats.value) for stats in self.stats)),
            carry,
            x,
            train,
            dtype=self.dtype,
            update=updates,
        )
        if updates:  # flax refuses where they are not mutable
            for stats, value in zip(self.stats, new, strict=True):
                stats.value = value._asdict()
        return carry, y

    @nn.nowrap
    def initialize_carry(
        self, rng: jax.Array, input_shape: Sequence[int], lengths: ArrayLike | None = None
    ) -> LSTMCarry:
        """Make the carry before the first step of a batch of sequences.

        Args:
            rng: a key for `carry_init`.
            input_shape: `[*batch, inputs]`.
            lengths: how many steps each sequence has, integers `[*batch]`; None where all are endless, or for the
                `seq_lengths` of the `nn.RNN` that asks.

        Returns:
            The carry, in float32 at least.
        """
        lengths = find_rnn_lengths(nn.RNN) if lengths is None else lengths
        shape = (*input_shape[:-1], self.features)
        return carry_for_flax(self.carry_init, list(jax.random.split(rng)), shape, self.param_dtype, lengths)

    @property
    def num_feature_axes(self) -> int:
        """Return the number of feature axes of the input."""
        find_rnn_lengths(nn.RNN)  # which asks for this first: lengths that do not fit are refused
        # And before its scan, which can carry only variables that are there: have `setup` make them.
        if self.scope is not None:
            _ = self.stats
        return 1
