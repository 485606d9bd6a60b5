"""Fold the batch normalizations of a linen model into the layers before them."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxbn._flax.fold import fold_model
from jaxbn.linen._model import V
from jaxbn.linen._view import LinenView, check_apply


def fold(
    apply: Callable[[Any, Any], Any],
    variables: V,
    x: Any,
    *,
    pairs: Mapping[str, str] | None = None,
    drop: bool = False,
    tolerance: float = 1e-4,
) -> V:
    """Fold each batch normalization into the layer before it: variables with the same outputs in evaluation.

    The layer takes on `y = a x + b` of the normalization after it (`jaxbn.inference.fold`), which becomes the identity:
    scale 1, bias and mean 0, and variance `1 - epsilon`, with which `sqrt(var + epsilon)` is 1 to the last bit of
    float32. A layer without a bias leaves the shift in the normalization, as mean `-b`.

    The normalizations still run, though. `drop=True` gives variables without them, for the same model built with
    identities instead and a bias in each of the layers: `norm=lambda **_: lambda x: x`. Options inside the layer,
    `activation` and `residual`, or given to its call, `scale` and `bias`, that model must apply itself.

    By default the pairs are found: a normalization whose input is the very output of one layer with a kernel. One that
    has no such layer, or whose folding would change the outputs, is left as it is, and a warning says which and why: a
    model may well begin with a normalization, or have its activations before them, and is as right as before. Named
    `pairs` are folded or refused, without a warning about the rest.

    Args:
        apply: `apply(variables, x)` calls the model in evaluation, `lambda v, x: model.apply(v, x, train=False)`; with
            `mutable=["batch_stats"]`, as `recalibrate` wants it, too. Functions that are compiled inside it are not
            seen into.
        variables: the model's, with `params` and `batch_stats`.
        x: an example input. On it, by these statistics and by others, the model is compared with the folded one. The
            outputs of a global array of several processes are brought together in each of them.
            Some outputs must be floating point: logits, not classes. Integers must be equal; leaves that are neither
            arrays nor numbers are not compared.
        pairs: layer -> normalization directly after it, by their paths: `{"block/Conv_0": "block/BatchNorm_0"}`.
            Any layer with a kernel whose last axis are the output features, and `nn.ConvTranspose`; stacks of layers
            that `nn.scan` keeps on a leading axis too. Flax's `BatchNorm` and ours.
        drop: leave the normalizations out.
        tolerance: the difference of outputs allowed, relative to the largest.

    Returns:
        New nested dicts, frozen where `variables` are; arrays that are not folded are the same objects.

    Raises:
        TypeError, ValueError: no pair was found. Or of `pairs`: an unknown path, feature counts that do not match, a
            normalization named twice, of several domains, with an `example_weight`, or not in evaluation; or the
            outputs differ, because something is between layer and normalization.

    Example:
        >>> import jax, jax.numpy as jnp, flax.linen as nn, jaxbn.linen
        >>> model = nn.Sequential([nn.Dense(3), jaxbn.linen.BatchNorm(use_running_average=True)])
        >>> variables = model.init(jax.random.key(0), x := jnp.ones((2, 4)))
        >>> new = jaxbn.linen.fold(model.apply, variables, x, drop=True)
        >>> y = nn.Sequential([nn.Dense(3)]).apply(new, x)
        >>> bool(jnp.allclose(y, model.apply(variables, x), atol=1e-5))
        True

    Source: as `jaxbn.inference.fold`. The comparison is on one input: give one like those to come.
    """
    view = fold_model(LinenView(check_apply(apply), variables), x, pairs, tolerance, drop)
    return view.variables  # type: ignore[return-value]
