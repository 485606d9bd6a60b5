"""Fold the batch normalizations of an nnx model into the layers before them."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from flax import nnx

from jaxbn._flax.fold import fold_model
from jaxbn.nnx._view import NnxView

Module = TypeVar("Module", bound=nnx.Module)


def fold(
    model: Module,
    x: Any,
    call: Callable[[Any, Any], Any] = lambda model, x: model(x),
    *,
    pairs: Mapping[str, str] | None = None,
    tolerance: float = 1e-4,
) -> Module:
    """Fold each batch normalization into the layer before it: a model for inference, without their cost.

    The layer takes on `y = a x + b` of the normalization after it (`jaxbn.inference.fold`), and has a bias from then
    on. The normalization becomes a module that returns `activation(x + residual)`, or just x, and applies a scale and
    bias that are given to the call. The old model is left as it is, and shares no variables with the new one.

    By default the pairs are found: a normalization whose input is the very output of one layer with a kernel. One that
    has no such layer, or whose folding would change the outputs, is left as it is, and a warning says which and why: a
    model may well begin with a normalization, or have its activations before them, and is as right as before. Named
    `pairs` are folded or refused, without a warning about the rest.

    Args:
        model: an nnx module.
        x: an example input. On it, by these statistics and by others, the new model is compared with the old one. The
            outputs of a global array of several processes are brought together in each of them.
            Some outputs must be floating point: logits, not classes. Integers must be equal; leaves that are neither
            arrays nor numbers are not compared.
        call: `call(model, x)` uses the model, of which it is given a copy in evaluation mode.
        pairs: layer -> normalization directly after it, by their paths: `{"layers/0": "layers/1"}`. Any layer with a
            kernel whose last axis are the output features, and `nnx.ConvTranspose`; stacks of layers on a leading
            axis too. Flax's `BatchNorm` and ours.
        tolerance: the difference of outputs allowed, relative to the largest.

    Returns:
        A model of the same structure, in evaluation mode.

    Raises:
        TypeError, ValueError: no pair was found. Or of `pairs`: an unknown path, feature counts that do not match, a
            normalization named twice, of several domains or with an `example_weight`; or the outputs differ, because
            something is between layer and normalization.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> import jaxbn.nnx
        >>> rngs, x = nnx.Rngs(0), jnp.ones((2, 4))
        >>> norm = jaxbn.nnx.BatchNorm(3, activation=jax.nn.relu, rngs=rngs)
        >>> model = nnx.Sequential(nnx.Linear(4, 3, use_bias=False, rngs=rngs), norm)
        >>> new = jaxbn.nnx.fold(model, x)
        >>> print(new.layers[0].bias[...], bool(jnp.allclose(new(x), nnx.view(model, use_running_average=True)(x))))
        [0. 0. 0.] True

    Source: as `jaxbn.inference.fold`. The comparison is on one input: give one like those to come.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"`model` must be an nnx module; got {type(model).__name__}.")
    return fold_model(NnxView(model, call, evaluating=True), x, pairs, tolerance).model
