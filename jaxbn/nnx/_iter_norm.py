"""Hold the variables of IterNorm (decorrelated batch norm) for Flax nnx; `whiten_apply` computes it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jax.typing import ArrayLike

from jaxbn._core import check
from jaxbn._core.momentum import Momentum
from jaxbn._core.state import BatchNormParams
from jaxbn._flax.dtypes import check_dtypes
from jaxbn._flax.forward import WHITENING, call_whitening, negate_flag, read_constant, read_options
from jaxbn.nnx._batch_norm import BatchNorm, choose_mode
from jaxbn.whitening import WhitenState, whiten_init


class IterNorm(nnx.Module):
    """Whitening, instead of a `BatchNorm`: `y = scale W (x - mean) + bias`; see `jaxbn.whitening.whiten_apply`.

    Attributes that hold arrays: `scale` and `bias` (`nnx.Param` or None), `mean`, `cov` and `count` (`nnx.BatchStat`).
    `train()` and `eval()` set `use_running_average`.

    Args:
        num_features: the size of the feature axis.
        use_running_average: normalize by the running statistics (evaluation) rather than by the batch (training). The
            call's argument wins.
        axis: the feature axis.
        group_size: how many neighbouring features are whitened together; all by default.
        iterations: of the Newton iteration.
        momentum: the fraction of the running value that is kept, or a schedule of the number of updates.
        epsilon: added to the diagonal of the covariance.
        dtype: of the output; by default that to which x, scale and bias promote.
        param_dtype: of scale and bias.
        use_bias, use_scale: whether the layer has them.
        bias_init, scale_init: their initializers.
        axis_name: named axis or axes over which statistics are shared.
        axis_index_groups: a partition of that axis into groups that share statistics.
        rngs: for the initializers.

    Raises:
        TypeError, ValueError: as `whiten_init` and `whiten_apply`; and where `use_running_average` is None throughout.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxbn.nnx import IterNorm
        >>> layer = IterNorm(2, iterations=15, rngs=nnx.Rngs(0))
        >>> print(jnp.var(layer(jnp.array([[1.0, 2.0], [3.0, 4.5], [0.0, 7.0]])), 0).round(2))
        [1. 1.]

    Huang et al. 2019, "Iterative normalization: beyond standardization towards efficient whitening".
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | jax.Array | None = False,
        axis: int = -1,
        group_size: int | None = None,
        iterations: int = 5,
        momentum: Momentum = 0.99,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = nnx.initializers.zeros,
        scale_init: Initializer = nnx.initializers.ones,
        axis_name: str | Sequence[str] | None = None,
        axis_index_groups: Any = None,
        rngs: nnx.Rngs,
    ):
        check_dtypes(dtype=dtype, param_dtype=param_dtype)
        _, state = whiten_init(num_features, group_size=group_size)
        shape = state.mean.shape
        self.scale = nnx.Param(scale_init(rngs.params(), shape, param_dtype)) if use_scale else nnx.data(None)
        self.bias = nnx.Param(bias_init(rngs.params(), shape, param_dtype)) if use_bias else nnx.data(None)
        self.mean, self.cov, self.count = map(nnx.BatchStat, state)
        self.use_running_average = use_running_average
        self.axis = axis
        self.iterations = iterations
        self.momentum = momentum
        self.epsilon = read_constant(epsilon)
        self.dtype = dtype
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | jax.Array | None = None,
        *,
        mask: ArrayLike | None = None,
        update: bool | jax.Array = True,
    ) -> jax.Array:
        """Whiten `x`, and in training update the running statistics.

        Args:
            x: the input.
            use_running_average: as in the constructor; wins over it.
            mask: True where an example counts, broadcastable to `x`, the same for all features.
            update: False leaves the running statistics as they are.

        Returns:
            An array of x's shape.
        """
        x = check.array("x", x)
        scale, bias = (None if v is None else v[...] for v in (self.scale, self.bias))
        train = negate_flag(choose_mode(self, use_running_average))
        update, kept = check.flag("update", update), (self.mean, self.cov, self.count)
        y, new = call_whitening(
            read_options(self, WHITENING),
            BatchNormParams(scale, bias),
            WhitenState(*(v[...] for v in kept)),
            x,
            train,
            dtype=self.dtype,
            advice="Make the layer with `num_features={}`.",
            mask=mask,
            update=update,
        )
        if train is not False and update is not False:
            for variable, v in zip(kept, new, strict=True):
                variable.set_value(v)
        return y

    set_view = BatchNorm.set_view
