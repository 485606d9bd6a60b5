"""A rematerialization policy that keeps the inputs of normalizations."""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

_NAME = "jaxbn"
_saved = jax.checkpoint_policies.save_only_these_names(_NAME)


def save_inputs(primitive: Any, *args: Any, **params: Any) -> bool:
    """Keep each normalization's input and statistics, and recompute all between them: a `jax.checkpoint` policy.

    A convolution keeps its input for the backward pass, which is mostly the output of a normalization and its
    activation. Under this policy that is recomputed, elementwise, from the normalization's input, which is kept anyway.
    So a network keeps one array a layer instead of two or more, and neither a convolution whose output is normalized
    nor a statistic, nor its collective, is computed twice.

    Values that reach no normalization are recomputed whole: to keep them too, join policies by
    `jax.checkpoint_policies.save_from_both_policies`. A loop over layers, `lax.scan`, keeps what it carries from step
    to step, so let it carry inputs of normalizations: normalization, activation, convolution, in this order.

    Args:
        primitive, *args, **params: the arguments that JAX passes to a policy.

    Returns:
        Whether the value is kept.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbn
        >>> params, state = jaxbn.bn_init(4)
        >>> def layer(x, kernel):
        ...     y, _ = jaxbn.bn_apply(params, state, x, True, activation=jax.nn.relu)
        ...     return y @ kernel, None
        >>> def network(x, kernels):
        ...     return jax.lax.scan(jax.checkpoint(layer, policy=jaxbn.save_inputs), x, kernels)[0].sum()
        >>> jax.grad(network)(jnp.ones((8, 4)), jnp.ones((16, 4, 4))).shape
        (8, 4)

    Chen et al. 2016, "Training deep nets with sublinear memory cost"; Rota Bulo, Porzi and Kontschieder 2018, "In-place
    activated BatchNorm", keep the output and invert the activation instead, which needs one that is invertible.
    """
    return bool(_saved(primitive, *args, **params))


def mark_saved(v: jax.Array) -> jax.Array:
    """Name `v` so that `save_inputs` keeps it."""
    return checkpoint_name(v, _NAME)
