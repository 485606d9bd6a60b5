"""Hold the variables of batch normalization for Flax nnx; `bn_apply` computes it.

The layer is SyncBatchNorm (cross-replica) by `axis_name`, or under `jit` with sharded arrays; FrozenBatchNorm by
`frozen=True`; conditional batch norm by `scale` and `bias` of the call; ghost batch norm and batch renormalization by
options of these names.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import Dtype, Initializer, PromoteDtypeFn
from jax.typing import ArrayLike

from jaxbn._core import check
from jaxbn._core.momentum import Momentum
from jaxbn._core.renorm import Renorm, needs_count
from jaxbn._core.state import BatchNormParams, BatchNormState
from jaxbn._flax.dtypes import allow_promotion, check_dtypes, choose_output_dtype, choose_statistics_dtypes
from jaxbn._flax.forward import (
    BATCH_NORM,
    call_batch_norm,
    choose_affine,
    make_domain_shape,
    negate_flag,
    read_constant,
    read_options,
)


class BatchNorm(nnx.BatchNorm):
    """Batch normalization, a drop-in for `flax.nnx.BatchNorm`: a subclass with its arguments, defaults and attributes.

    `y = activation(scale (x - mean) / sqrt(var + epsilon) + bias + residual)`; see `jaxbn.bn_apply`, which computes it.
    Attributes that hold arrays: `scale` and `bias` (`nnx.Param` or None), `mean` and `var` (`nnx.BatchStat`), and
    `count` (`nnx.BatchStat`) where `momentum` or a limit of `renorm` is a schedule. `train()`, `eval()` and `nnx.view`
    set `use_running_average`.

    Args:
        num_features: the size of the feature axis, or a tuple of sizes in the order of `axis`.
        use_running_average: normalize by the running statistics (evaluation) rather than by the batch (training). The
            call's argument wins. A scalar bool array makes one program of both.
        axis: the feature axis or axes.
        momentum: the fraction of the running value that is kept, or a schedule of the number of updates.
        epsilon: added to the variance.
        dtype: of the output; by default that to which x, the statistics, scale and bias promote.
        param_dtype: of scale and bias. Where it or `dtype` is complex, the running mean is.
        use_bias, use_scale: whether the layer has them.
        bias_init, scale_init: their initializers.
        axis_name: named axis or axes over which statistics are shared. Not needed under `jit` with sharded arrays.
        axis_index_groups: a partition of that axis into groups that share statistics.
        use_fast_variance: accepted for compatibility and without effect: the variance is always the exact one.
        promote_dtype: as in flax, but for the running statistics, which stay float32.
        rngs: for the initializers.
        bias_metadata, scale_metadata: for the variables, sharding for example.
        unbiased_running_var: average the unbiased variance, as PyTorch does.
        activation: an elementwise function, applied inside the layer at no cost in memory.
        frozen: normalize by the running statistics and never update them, after `train()` too.
        mean_init, var_init: initializers of the running statistics.
        mean_metadata, var_metadata: for their variables.
        ghost_batches: into how many parts the batch is divided, each normalized by its own statistics.
        renorm: batch renormalization, `jaxbn.Renorm`.
        example_weight: in evaluation, the share of each example's own statistics in those that normalize it, in [0, 1];
            see `jaxbn.statistics.apply_with_example_weight`.
        num_domains: so many sets of all variables, on a leading axis; the call says which
            (`jaxbn.domains.domain_apply`).

    Raises:
        TypeError, ValueError: as `bn_apply`; as flax where `use_running_average` is None throughout; and where complex
            `x` would change the type of a real mean.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxbn.nnx import BatchNorm
        >>> layer = BatchNorm(1, momentum=0.9, rngs=nnx.Rngs(0))
        >>> print(layer(jnp.array([[1.0], [3.0]])).round(2).ravel(), layer.mean[...])
        [-1.  1.] [0.2]

    Ioffe and Szegedy 2015, "Batch normalization". Unlike flax's, masks of different sizes on different devices are
    weighted by their counts, statistics that are not finite never enter the running ones, and those are float32 in
    half-precision evaluation too.
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        use_running_average: bool | jax.Array | None = False,
        axis: int | Sequence[int] = -1,
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
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        unbiased_running_var: bool = False,
        activation: Callable[[jax.Array], jax.Array] | None = None,
        frozen: bool = False,
        mean_init: Initializer = nnx.initializers.zeros,
        var_init: Initializer = nnx.initializers.ones,
        mean_metadata: Mapping[str, Any] = MappingProxyType({}),
        var_metadata: Mapping[str, Any] = MappingProxyType({}),
        ghost_batches: int = 1,
        renorm: Renorm | None = None,
        num_domains: int | None = None,
        example_weight: float | None = None,
    ):
        check_dtypes(dtype=dtype, param_dtype=param_dtype)
        domains = make_domain_shape(num_domains)
        shape = (*domains, *check.sizes(num_features))
        # Keys are drawn in flax's order, so that the same seed gives the same parameters.
        scale = nnx.Param(scale_init(rngs.params(), shape, param_dtype), **scale_metadata) if use_scale else None
        bias = nnx.Param(bias_init(rngs.params(), shape, param_dtype), **bias_metadata) if use_bias else None
        kept, kept_real = choose_statistics_dtypes(jnp.float32, param_dtype, dtype)
        self.mean = nnx.BatchStat(mean_init(jax.random.key(0), shape, kept), **mean_metadata)
        self.var = nnx.BatchStat(var_init(jax.random.key(0), shape, kept_real), **var_metadata)
        counted = callable(momentum) or needs_count(renorm)
        self.count = nnx.BatchStat(jnp.zeros(domains, jnp.int32)) if counted else nnx.data(None)
        self.scale = nnx.data(None) if scale is None else scale
        self.bias = nnx.data(None) if bias is None else bias
        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis = axis
        self.momentum = momentum
        self.epsilon = read_constant(epsilon)
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype
        self.unbiased_running_var = unbiased_running_var
        self.activation = activation
        self.frozen = frozen
        self.ghost_batches = check.positive("ghost_batches", ghost_batches)
        self.renorm = Renorm(*map(read_constant, renorm)) if isinstance(renorm, Renorm) else renorm
        self.num_domains = num_domains
        self.example_weight = example_weight

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
            use_running_average: as in the constructor; wins over it.
            mask: True where a value counts, broadcastable to `x`.
            residual: added before the activation, of x's shape.
            scale, bias: for a layer without its own, `[*features]` or `[batch, *features]`: conditional batch
                normalization.
            domain: for a layer of several domains, which of them x is from.
            update: False leaves the running statistics as they are.

        Returns:
            An array of x's shape.
        """
        evaluate = check.boolean("frozen", self.frozen) or choose_mode(self, use_running_average)
        if (callable(self.momentum) or needs_count(self.renorm)) and self.count is None:
            raise ValueError(
                "A layer whose `momentum` or `renorm` is a schedule must have a count of its updates; this one was "
                "made without. Set the schedule by `model = jaxbn.nnx.convert(model, momentum=...)`."
            )
        train, x, update = negate_flag(evaluate), check.array("x", x), check.flag("update", update)
        updates = train is not False and update is not False
        mean, var, domains = self.mean[...], self.var[...], make_domain_shape(self.num_domains)
        gamma = choose_affine("scale", None if self.scale is None else self.scale[...], scale, self.num_domains)
        beta = choose_affine("bias", None if self.bias is None else self.bias[...], bias, self.num_domains)
        with allow_promotion():
            promoted, _, _, gamma, beta = self.promote_dtype((x, mean, var, gamma, beta), dtype=self.dtype)
        one_axis = mean.ndim == 1 + len(domains)
        y, new = call_batch_norm(
            read_options(self, BATCH_NORM),
            BatchNormParams(gamma, beta),
            BatchNormState(mean, var, jnp.zeros(domains, jnp.int32) if self.count is None else self.count[...]),
            x,
            train,
            dtype=choose_output_dtype(promoted, gamma, beta, dtype=self.dtype),
            num_domains=self.num_domains,
            domain=domain,
            example_weight=self.example_weight,
            advice="Make the layer with `num_features={}`." if one_axis else "Make the layer for such an `x`.",
            updates=updates,
            mask=mask,
            residual=residual,
            update=update,
        )
        if updates:
            self.mean.set_value(new.mean)
            self.var.set_value(new.var)
            if self.count is not None:
                self.count.set_value(new.count)
        return y

    # `nnx.view_info` reads the arguments from the docstring, where it wants two spaces before each.
    def set_view(self, use_running_average: bool | None = None):
        """Set the attribute that `nnx.view` may set.

        Args:
          use_running_average: whether the running statistics are used instead of the batch's.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average


def choose_mode(module: Any, given: Any = None) -> Any:
    """Return whether a module uses the running statistics, by what was given to the call or else by its attribute."""
    evaluate = module.use_running_average if given is None else given
    if evaluate is None:
        raise ValueError(
            f"`use_running_average` must be True or False in {type(module).__name__}; got None. Pass it to the "
            "constructor or to a layer's call, or set it for a whole model by `model.train()`, `model.eval()` or "
            "`nnx.view(model, use_running_average=...)`."
        )
    return evaluate
