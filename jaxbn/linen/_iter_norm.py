"""Hold the variables of IterNorm (decorrelated batch norm) for Flax linen; `whiten_apply` computes it."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jax.typing import ArrayLike

from jaxbn._core import check
from jaxbn._core.momentum import Momentum
from jaxbn._core.state import BatchNormParams
from jaxbn._flax.dtypes import check_dtypes
from jaxbn._flax.forward import WHITENING, call_whitening, negate_flag, read_options
from jaxbn.whitening import WhitenState, whiten_init
from jaxbn.whitening._state import check_axis


class IterNorm(nn.Module):
    """Whitening, instead of a `BatchNorm`: `y = scale W (x - mean) + bias`; see `jaxbn.whitening.whiten_apply`.

    Variables: `params/{scale,bias}`, and `batch_stats/{mean,cov,count}`.

    Attributes:
        use_running_average: normalize by `batch_stats` (evaluation) rather than by the batch (training). Here or at
            the call, not both.
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

    Raises:
        TypeError, ValueError: as `whiten_apply`; and as flax where `use_running_average` is given twice or never.
        flax.errors.ModifyScopeVariableError: training where `batch_stats` are not mutable, unless the call says
            `update=False`.
        flax.errors.ScopeParamShapeError: scale or bias in the variables have another number of features than `x`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxbn.linen import IterNorm
        >>> x = jnp.array([[1.0, 2.0], [3.0, 4.5], [0.0, 7.0]])
        >>> layer = IterNorm(use_running_average=False, iterations=15)
        >>> y, _ = layer.init_with_output(jax.random.key(0), x)
        >>> print(jnp.var(y, 0).round(2))
        [1. 1.]

    Huang et al. 2019, "Iterative normalization: beyond standardization towards efficient whitening".
    """

    use_running_average: bool | jax.Array | None = None
    axis: int = -1
    group_size: int | None = None
    iterations: int = 5
    momentum: Momentum = 0.99
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = nn.initializers.zeros
    scale_init: Initializer = nn.initializers.ones
    axis_name: str | Sequence[str] | None = None
    axis_index_groups: Any = None

    @nn.compact
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
            use_running_average: as the attribute.
            mask: True where an example counts, broadcastable to `x`, the same for all features.
            update: False leaves the statistics as they are; `batch_stats` need not be mutable then.

        Returns:
            An array of x's shape.
        """
        check_dtypes(dtype=self.dtype, param_dtype=self.param_dtype)
        x = check.array("x", x)
        evaluate = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        at = check_axis(self.axis, x.ndim)
        shape = (x.shape[at],)
        scale = self.param("scale", self.scale_init, shape, self.param_dtype) if self.use_scale else None
        bias = self.param("bias", self.bias_init, shape, self.param_dtype) if self.use_bias else None
        _, fresh = whiten_init(*shape, group_size=self.group_size)
        kept = {k: self.variable("batch_stats", k, lambda v=v: v) for k, v in fresh._asdict().items()}
        starting, train, update = self.is_initializing(), negate_flag(evaluate), check.flag("update", update)
        updates = not starting and train is not False and update is not False
        y, new = call_whitening(
            read_options(self, WHITENING, starting) | {"axis": at},
            BatchNormParams(scale, bias),
            WhitenState(**{k: v.value for k, v in kept.items()}),
            x,
            train,
            dtype=self.dtype,
            advice="Initialize the variables with such an `x`.",
            mask=mask,
            update=update if updates else False,
        )
        if updates:  # flax refuses where they are not mutable
            for k, v in new._asdict().items():
                kept[k].value = v
        return y
