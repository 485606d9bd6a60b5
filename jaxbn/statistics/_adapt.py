"""Adaptation of running statistics to other data (AdaBN)."""

import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn._core import check
from jaxbn._core.moments import Moments
from jaxbn._core.state import BatchNormState
from jaxbn._core.update_state import fit_moments


def adapt(state: BatchNormState, m: Moments, *, source_weight: ArrayLike = 0.0) -> BatchNormState:
    """Return a state with the statistics of other data, or with a mixture of its own and those.

    With n = `m.count` and N = `source_weight`, `mean = N / (N + n) mean_source + n / (N + n) mean_target`, and the same
    for the variance. With N = 0 the target's statistics replace the source's (AdaBN); with N infinite nothing changes.

    Args:
        state: the source's, from training; `mean` and `var` `[*features]`.
        m: moments of the inputs that the layer has on the target data, from `moments`, `pool` or `pool_batches`;
            `[*features]`.
        source_weight: the number of target values that the source counts as, at least 0; infinity too.

    Returns:
        The new state, of the same shapes and dtypes. A feature keeps its statistics if it has no values in `m`, or if
        its moments are not finite, also after the cast to the state's dtype. `count` is 1 at least if any feature's
        changed, so that training with a momentum schedule does not begin by forgetting them.

    Raises:
        TypeError, ValueError: `source_weight` is not a number from 0 to infinity, or `m` has another shape than the
            state.

    Example:
        >>> import jax.numpy as jnp, jaxbn
        >>> _, state = jaxbn.bn_init(1)
        >>> m = jaxbn.moments(jnp.array([[2.0], [6.0]]))
        >>> new = jaxbn.statistics.adapt(state, m)
        >>> print(new.mean, new.var, jaxbn.statistics.adapt(state, m, source_weight=2).var)
        [4.] [4.] [2.5]

    Li et al. 2016, "Revisiting batch normalization for practical domain adaptation"; Schneider et al. 2020, "Improving
    robustness against common corruptions by covariate shift adaptation". The paper counts images, not values, because
    the values of one image are much alike: for images of h x w positions pass `N * h * w`. As published, the variances
    are averaged; the variance between the two means, N n / (N + n)^2 (mean_source - mean_target)^2, is left out.
    `jaxbn.pool` of the target's moments and `Moments(N, state.mean, state.var)` has it in.
    """
    state, m = fit_moments(state, m)
    weight = jnp.asarray(check.number("source_weight", source_weight, 0), m.var.dtype)
    fine = (m.count > 0) & jnp.isfinite(m.mean) & jnp.isfinite(m.var)
    take = jnp.where(fine, m.count / jnp.where(fine, weight + m.count, 1), 0)

    def mix(source, target):
        mixture = (1 - take) * source.astype(target.dtype) + take * target
        # A term without a share may be anything, NaN too.
        return jnp.where(take == 1, target, jnp.where(take == 0, source.astype(target.dtype), mixture))

    mean, var = mix(state.mean, m.mean).astype(state.mean.dtype), mix(state.var, m.var).astype(state.var.dtype)
    fits = ~fine | (jnp.isfinite(mean) & jnp.isfinite(var))
    mean, var = (jnp.where(fits, new, old) for new, old in ((mean, state.mean), (var, state.var)))
    # Where nothing is taken over, as from no values or with an infinite weight, the state is as new as it was.
    return BatchNormState(mean, var, jnp.maximum(state.count, jnp.any(take > 0).astype(state.count.dtype)))
