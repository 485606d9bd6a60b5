"""Diagnose the normalizations of an nnx model."""

from collections.abc import Callable
from typing import Any

from jaxbn._flax.health import check_model
from jaxbn.diagnostics._report import Health
from jaxbn.nnx._view import NnxView


def health(model: Any, x: Any = None, call: Callable[[Any, Any], Any] = lambda model, x: model(x)) -> Health:
    """Find the problems of a model's batch normalizations: the first step when evaluation is bad.

    `jaxbn.diagnostics.health` of each layer. Given a batch, each layer's input is compared with its running statistics
    while the layers normalize by the batch, as in training: so a layer is not blamed for faults of those before it. The
    model is left as it is.

    Args:
        model: an nnx module, with flax's layers, ours, and stacks of them that `nnx.vmap` makes; and with `IterNorm`,
            by the variances of its features, and `BatchNormLSTMCell`, each of whose normalizations counts as a layer,
            by the time steps that training has reached.
        x: a batch from where evaluation is bad, some hundred examples if there are as many. A global array of several
            processes is brought together in each of them.
        call: `call(model, x)` uses the model, of which it is given a copy in evaluation mode. Calls inside
            compiled functions cannot be observed; a warning says so if no layer could be compared.

    Returns:
        A tuple of `LayerHealth`, one for each layer, in the order of the calls; `print` shows a table with advice.
        Mapped layers (`nnx.vmap`) are compared member by member, by their worst. Layers inside a loop or a compiled
        part of the model, of several domains, frozen, or with complex input, `IterNorm` and LSTM cells are not compared
        with the batch, and normalize by their running statistics.

    Raises:
        TypeError: the arrays are traced: it runs on the host, outside `jit`.
        ValueError: there is no normalization.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> import jaxbn.nnx
        >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
        >>> found = jaxbn.nnx.health(model, 3 + jax.random.normal(jax.random.key(1), (64, 2)))
        >>> found[0].path, found[0].untouched, found[0].batch.mean > 1
        ('layers/1', True, True)

    Source: as `jaxbn.diagnostics.health`.
    """
    view = NnxView(model, call, evaluating=True)
    if not view.kinds:
        raise ValueError("`model` must have batch normalizations, `jaxbn.nnx.BatchNorm` or flax's; it has none.")
    return check_model(view, x)
