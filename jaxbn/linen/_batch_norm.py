"""Hold the variables of batch normalization for Flax linen; `bn_apply` computes it.

The layer is SyncBatchNorm (cross-replica) by `axis_name`, or under `jit` with sharded arrays; FrozenBatchNorm by
`frozen=True`; conditional batch norm by `scale` and `bias` of the call; ghost batch norm and batch renormalization by
options of these names.
"""

# Some fields take more than Flax declares for them.
# pyright: reportIncompatibleVariableOverride=false

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jax.typing import ArrayLike

from jaxbn._core import check
from jaxbn._core.momentum import Momentum
from jaxbn._core.renorm import Renorm, needs_count
from jaxbn._core.state import BatchNormParams, BatchNormState
from jaxbn._flax.dtypes import check_dtypes, choose_output_dtype, choose_statistics_dtypes
from jaxbn._flax.forward import (
    BATCH_NORM,
    call_batch_norm,
    choose_affine,
    make_domain_shape,
    negate_flag,
    read_options,
)


class BatchNorm(nn.BatchNorm):
    """Batch normalization, a drop-in for `flax.linen.BatchNorm`: a subclass with its fields, defaults and variables.

    `y = activation(scale (x - mean) / sqrt(var + epsilon) + bias + residual)`; see `jaxbn.bn_apply`, which computes it.
    Variables: `params/{scale,bias}` and `batch_stats/{mean,var}`, and `batch_stats/count` where `momentum` or a limit
    of `renorm` is a schedule. Like flax's, it leaves the statistics alone during `init`, and needs no bound axis name
    then; and training without `mutable=["batch_stats"]` is an error, unless the call says `update=False`.

    Attributes:
        use_running_average: normalize by `batch_stats` (evaluation) rather than by the batch (training). Here or at
            the call, not both. A scalar bool array makes one program of both.
        axis: the feature axis or axes.
        momentum: the fraction of the running value that is kept, or a schedule of the number of updates.
        epsilon: added to the variance.
        dtype: of the output; by default that to which x, scale and bias promote.
        param_dtype: of scale and bias.
        use_bias, use_scale: whether the layer has them.
        bias_init, scale_init: their initializers.
        axis_name: named axis or axes over which statistics are shared. Not needed under `jit` with sharded arrays.
        axis_index_groups: a partition of that axis into groups that share statistics.
        use_fast_variance: accepted for compatibility and without effect: the variance is always the exact one.
        force_float32_reductions: False stores the statistics in `param_dtype`; the sums are float32 either way.
        unbiased_running_var: average the unbiased variance, as PyTorch does.
        activation: an elementwise function, applied inside the layer at no cost in memory.
        frozen: normalize by `batch_stats` and never update them, for either `use_running_average`.
        mean_init, var_init: initializers of the running statistics; with `nn.with_partitioning` they are sharded.
        ghost_batches: into how many parts the batch is divided, each normalized by its own statistics.
        renorm: batch renormalization, `jaxbn.Renorm`.
        example_weight: in evaluation, the share of each example's own statistics in those that normalize it, in [0, 1];
            see `jaxbn.statistics.apply_with_example_weight`.
        num_domains: so many sets of all variables, on a leading axis; the call says which
            (`jaxbn.domains.domain_apply`).

    Raises:
        TypeError, ValueError: as `bn_apply`; as flax where `use_running_average` is given twice or never; where a
            schedule finds statistics without their count; where complex `x` would change the type of a real mean.
        flax.errors.ModifyScopeVariableError: training where `batch_stats` are not mutable.
        flax.errors.ScopeParamShapeError: scale or bias in the variables have another number of features than `x`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxbn.linen import BatchNorm
        >>> layer, x = BatchNorm(momentum=0.9), jnp.array([[1.0], [3.0]])
        >>> variables = layer.init(jax.random.key(0), x, use_running_average=False)
        >>> y, update = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        >>> print(y.round(2).ravel(), update["batch_stats"]["mean"])
        [-1.  1.] [0.2]

    Ioffe and Szegedy 2015, "Batch normalization". Unlike flax's, masks of different sizes on different devices are
    weighted by their counts, and statistics that are not finite never enter `batch_stats`.
    """

    use_running_average: bool | jax.Array | None = None
    axis: int | Sequence[int] = -1
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
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    unbiased_running_var: bool = False
    activation: Callable[[jax.Array], jax.Array] | None = None
    frozen: bool = False
    mean_init: Initializer = nn.initializers.zeros
    var_init: Initializer = nn.initializers.ones
    ghost_batches: int = 1
    renorm: Renorm | None = None
    num_domains: int | None = None
    example_weight: float | None = None

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | jax.Array | None = None,
        *,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
        scale: ArrayLike | None = None,
        bias: ArrayLike | None = None,
        domain: int | jax.Array | None = None,
        update: bool | jax.Array = True,
    ) -> jax.Array:
        """Normalize `x`, and in training update the running statistics.

        Args:
            x: the input, floating point, complex or integer.
            use_running_average: as the attribute.
            mask: True where a value counts, broadcastable to `x`.
            residual: added before the activation, of x's shape.
            scale, bias: for a layer without its own, `[*features]` or `[batch, *features]`: conditional batch
                normalization.
            domain: for a layer of several domains, which of them x is from.
            update: False leaves the statistics as they are; `batch_stats` need not be mutable then.

        Returns:
            An array of x's shape.
        """
        check_dtypes(dtype=self.dtype, param_dtype=self.param_dtype)
        x, initializing = check.array("x", x), self.is_initializing()
        evaluate = True
        if not check.boolean("frozen", self.frozen):
            evaluate = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        axes, domains = tuple(sorted(check.axes(self.axis, x.ndim))), make_domain_shape(self.num_domains)
        shape = (*domains, *(x.shape[a] for a in axes))
        kept = jnp.float32 if self.force_float32_reductions else self.param_dtype
        kept, kept_real = choose_statistics_dtypes(kept, x.dtype, self.param_dtype, self.dtype)
        train, update = negate_flag(evaluate), check.flag("update", update)
        updates = not initializing and train is not False and update is not False

        # Parameters first: flax draws their keys in this order.
        own = self.param("scale", self.scale_init, shape, self.param_dtype) if self.use_scale else None
        gamma = choose_affine("scale", own, scale, self.num_domains)
        own = self.param("bias", self.bias_init, shape, self.param_dtype) if self.use_bias else None
        beta = choose_affine("bias", own, bias, self.num_domains)
        fresh = not self.has_variable("batch_stats", "mean")
        mean = self.variable("batch_stats", "mean", lambda: self.mean_init(self._key(), shape, kept))
        var = self.variable("batch_stats", "var", lambda: self.var_init(self._key(), shape, kept_real))
        count = None
        if callable(self.momentum) or needs_count(self.renorm):
            if fresh or self.has_variable("batch_stats", "count"):
                count = self.variable("batch_stats", "count", lambda: jnp.zeros(domains, jnp.int32))
            elif updates:  # evaluation does without
                raise ValueError(
                    "`batch_stats` must have the `count` of their updates where `momentum` or `renorm` is a schedule, "
                    "whose first step would replace statistics that were never counted; it has none. Add it by "
                    "`jaxbn.linen.convert(variables, count=...)`: an int, `[layers]` of a stack, `[domains]` with "
                    "`num_domains`."
                )
        y, new = call_batch_norm(
            read_options(self, BATCH_NORM, initializing) | {"axis": axes},
            BatchNormParams(gamma, beta),
            BatchNormState(mean.value, var.value, jnp.zeros(domains, jnp.int32) if count is None else count.value),
            x,
            train,
            dtype=choose_output_dtype(x, gamma, beta, dtype=self.dtype),
            num_domains=self.num_domains,
            domain=domain,
            example_weight=self.example_weight,
            advice="Initialize the variables with such an `x`.",
            updates=updates,
            mask=mask,
            residual=residual,
            update=update if updates else False,
        )
        if updates:  # flax refuses where they are not mutable
            mean.value, var.value = new.mean, new.var
            if count is not None:
                count.value = new.count
        return y

    def _key(self) -> Any:
        return self.make_rng("params") if self.has_rng("params") else None
