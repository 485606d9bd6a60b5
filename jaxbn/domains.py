"""Domain-specific batch normalization: statistics, scale and bias for each of several domains."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxbn._core import check
from jaxbn._core.batch_norm import bn_apply
from jaxbn._core.layout import replicate_on_mesh
from jaxbn._core.state import BatchNormParams, BatchNormState, bn_init

__all__ = ["domain_apply", "domain_init"]


def domain_init(num_domains: int, num_features: Any, **options: Any) -> tuple[BatchNormParams, BatchNormState]:
    """Initialize parameters and state for `domain_apply`: those of `bn_init`, once for each domain.

    Args:
        num_domains: the number of domains.
        num_features, **options: as for `bn_init`.

    Returns:
        `(params, state)`, every array with a leading axis of domains.

    Raises:
        TypeError, ValueError: `num_domains` is not a positive int; or as `bn_init`.

    Example:
        >>> import jaxbn
        >>> params, state = jaxbn.domains.domain_init(2, 3)
        >>> params.scale.shape, state.count.shape
        ((2, 3), (2,))

    Xie et al. 2020, "Adversarial examples improve image recognition"; Chang et al. 2019, "Domain-specific batch
    normalization for unsupervised domain adaptation".
    """
    number = check.positive("num_domains", num_domains)
    return jax.tree.map(lambda v: jnp.array(jnp.broadcast_to(v, (number, *v.shape))), bn_init(num_features, **options))


def domain_apply(
    params: BatchNormParams,
    state: BatchNormState,
    x: ArrayLike,
    train: bool | jax.Array,
    domain: int | jax.Array,
    **options: Any,
) -> tuple[jax.Array, BatchNormState]:
    """Normalize a batch from one of several domains by that domain's statistics, scale and bias.

    `y, new = bn_apply(params[domain], state[domain], x, train)`, and only that domain's state changes.

    Args:
        params, state: from `domain_init`.
        x, train, **options: as for `bn_apply`.
        domain: an int or a scalar integer array, in [0, domains). One program serves all of them. A traced number
            cannot be checked: one that is out of range is clipped.

    Returns:
        `(y, new_state)`, as `bn_apply`; `new_state` has the leading axis of domains.

    Raises:
        TypeError, ValueError: `domain` is not an integer or out of range, the arrays have no common axis of domains; or
            as `bn_apply`.

    Example:
        >>> import jax.numpy as jnp, jaxbn
        >>> params, state = jaxbn.domains.domain_init(2, 1)
        >>> clean, attacked = 0, 1
        >>> x = jnp.array([[1.0], [3.0]])
        >>> _, state = jaxbn.domains.domain_apply(params, state, x, True, attacked, momentum=0.9)
        >>> print(state.mean.ravel(), state.count)
        [0.  0.2] [0 1]

    Xie et al. 2020, "Adversarial examples improve image recognition", normalize clean and adversarial batches apart so;
    Chang et al. 2019, "Domain-specific batch normalization for unsupervised domain adaptation", source and target. In a
    training step concatenate nothing: call the layer once for each domain, and pass the state on.
    """
    leaves = jax.tree.leaves((params, state))
    number = np.shape(leaves[0])[0] if leaves and np.ndim(leaves[0]) else 0
    if not number or any(np.shape(leaf)[:1] != (number,) for leaf in leaves):
        raise ValueError(
            "`params` and `state` must have a leading axis of domains, the same in all arrays; got shapes "
            f"{[np.shape(leaf) for leaf in leaves]}. Make them by `domain_init`."
        )
    at = _check_domain(domain, number)

    def own(v):
        return lax.dynamic_index_in_dim(jnp.asarray(v), at, keepdims=False)

    x = check.floating("x", x, or_complex=True)
    state = jax.tree.map(lambda v: replicate_on_mesh(jnp.asarray(v), x), state)
    y, new = bn_apply(jax.tree.map(own, params), jax.tree.map(own, state), x, train, **options)
    return y, jax.tree.map(lambda v, n: lax.dynamic_update_index_in_dim(v, n, at, 0), state, new)


def _check_domain(domain: Any, number: int) -> jax.Array:
    try:
        shape, kind = np.shape(domain), domain.dtype if isinstance(domain, Tracer) else np.asarray(domain).dtype
    except ValueError:  # a ragged list
        shape, kind = None, np.dtype(object)
    if shape != () or not jnp.issubdtype(kind, jnp.integer):
        raise TypeError(
            f"`domain` must be an int or a scalar integer array; got {domain!r}. A batch is of one domain: call the "
            "layer for each, or map it by `jax.vmap`."
        )
    if not isinstance(domain, Tracer) and not 0 <= int(domain) < number:
        raise ValueError(f"`domain` must lie in [0, {number}); got {int(domain)}.")
    return jnp.clip(jnp.asarray(domain).astype(jnp.int32), 0, number - 1)
