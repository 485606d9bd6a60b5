"""Diagnose the normalizations of a linen model."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxbn._flax.health import check_model
from jaxbn.diagnostics._report import Health
from jaxbn.linen._view import LinenView, check_apply


def health(
    variables: Mapping[str, Any],
    apply: Callable[[Any, Any], Any] | None = None,
    x: Any = None,
    *,
    epsilon: float = 1e-5,
) -> Health:
    """Find the problems of a model's batch normalizations: the first step when evaluation is bad.

    `jaxbn.diagnostics.health` of each layer. Given a batch, each layer's input is compared with its running statistics
    while the layers normalize by the batch, as in training: so a layer is not blamed for faults of those before it.

    Args:
        variables: the model's, with `batch_stats`; flax's layers, ours, and stacks of them that `nn.scan` keeps. Its
            layers are all with `mean` and `var` there, each `IterNorm`, by the variances of its features, and each
            normalization of a `BatchNormLSTMCell`, by the time steps that training has reached.
        apply: `apply(variables, x)` calls the model, `lambda v, x: model.apply(v, x, train=False)`, in the mode without
            dropout. Nothing is updated. Calls inside compiled functions cannot be observed; a warning says so if no
            layer could be compared.
        x: a batch from where evaluation is bad, some hundred examples if there are as many. A global array of several
            processes is brought together in each of them.
        epsilon: of layers that `apply` does not show: of all without it.

    Returns:
        A tuple of `LayerHealth`, one for each layer, in the order of the calls; `print` shows a table with advice.
        Mapped layers (`nn.vmap`) are compared member by member, by their worst. Layers inside a loop or a compiled part
        of the model, of several domains, frozen, or with complex input, `IterNorm` and LSTM cells are not compared with
        the batch, and normalize as the call has it.

    Raises:
        TypeError: the variables are traced: it runs on the host, outside `jit`.
        ValueError: there is no normalization, or `apply` without `x`.

    Example:
        >>> import jax, jax.numpy as jnp, flax.linen as nn, jaxbn.linen
        >>> model = nn.Sequential([nn.Dense(3), jaxbn.linen.BatchNorm(use_running_average=True)])
        >>> x = 3 + jax.random.normal(jax.random.key(1), (64, 2))
        >>> variables = model.init(jax.random.key(0), x)
        >>> found = jaxbn.linen.health(variables, model.apply, x)
        >>> found[0].path, found[0].untouched, found[0].batch.mean > 1
        ('layers_1', True, True)

    Source: as `jaxbn.diagnostics.health`.
    """
    if (apply is None) != (x is None):
        raise ValueError("`apply` and `x` go together: the function is called with the batch.")
    view = LinenView(apply and check_apply(apply), variables)
    if not view.kinds:
        raise ValueError("`variables` must hold `batch_stats` with mean and var; it has none. Pass all collections.")
    return check_model(view, x, epsilon)
