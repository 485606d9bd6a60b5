"""The batch normalizations of an nnx model folded into the layers before them."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from jaxbn._core import check
from jaxbn._core.batch_norm import bn_apply
from jaxbn._core.state import BatchNormParams, BatchNormState
from jaxbn._flax import fold_model
from jaxbn._flax.module import output_dtype
from jaxbn.nnx._batch_norm import BatchNorm
from jaxbn.nnx._model import replaced


class Folded(nnx.Module):
    """What is left of a normalization that was folded away: `activation(scale x + bias + residual)`, in its dtype."""

    def __init__(self, norm: Any):
        self.activation, self.dtype = getattr(norm, "activation", None), norm.dtype
        self.axis = norm.axis
        held = [v[...] for v in (norm.mean, norm.var, norm.scale, norm.bias) if v is not None]
        self.held_dtype = output_dtype(*held, dtype=None)

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | jax.Array | None = None,
        *,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
        scale: ArrayLike | None = None,
        bias: ArrayLike | None = None,
        update: bool | jax.Array = True,
    ) -> jax.Array:
        """Take the arguments of a normalization, of which mode, mask and `update` mean nothing here.

        Args:
            x: the folded layer's output.
            use_running_average: without effect.
            mask: without effect.
            residual: added before the activation, of x's shape.
            scale, bias: for a layer without its own, `[*features]` or `[batch, *features]`.
            update: without effect.

        Returns:
            An array of x's shape.
        """
        x = jnp.asarray(x)
        given = BatchNormParams(*(None if v is None else jnp.asarray(v) for v in (scale, bias)))
        y = x.astype(output_dtype(x, jnp.zeros((), self.held_dtype), *given, dtype=self.dtype))
        if any(v is not None for v in given):
            features = tuple(x.shape[a] for a in check.axes(self.axis, x.ndim))
            # With a half and a half sqrt(var + epsilon) is 1.
            half = jnp.full(features, 0.5, check.accumulation_dtype(y.dtype))
            state = BatchNormState(jnp.zeros_like(half), half, jnp.zeros((), jnp.int32))
            y, _ = bn_apply(given, state, y, False, axis=self.axis, epsilon=0.5)
        y = y if residual is None else y + jnp.asarray(residual).astype(y.dtype)
        return y if self.activation is None else self.activation(y).astype(y.dtype)

    # `nnx.view_info` reads the arguments from the docstring, where it wants two spaces before each.
    def set_view(self, use_running_average: bool | None = None):
        """Take what `nnx.view` sets for a normalization.

        Args:
          use_running_average: without effect.
        """


def fold(
    model: Any,
    pairs: Mapping[str, str],
    x: Any,
    call: Callable[[Any, Any], Any] = lambda model, x: model(x),
    *,
    tolerance: float = 1e-4,
) -> Any:
    """The model for inference: each normalization of `pairs` is part of the layer before it, and costs nothing.

    Each layer takes on `y = a x + b` of the normalization behind it, as `jaxbn.inference.fold` says, and has a bias
    from then on. In the place of the normalization is a module that returns `activation(x + residual)`, or just x, and
    applies a scale and bias that are given to the call. The old model is left as it is, and shares no variables with
    the new one.

    Args:
        model: an nnx module.
        pairs: layer -> normalization directly behind it, by their paths: `{"layers/0": "layers/1"}`. Any layer with a
            kernel whose last axis are the output features, and `nnx.ConvTranspose`; stacks of layers on a leading
            axis too. Flax's `BatchNorm` and ours.
        x: an example input. On it, by these statistics and by others, the new model is compared with the old one. The
            outputs of a global one of several processes are brought together in each of them.
        call: `call(model, x)` uses the model, of which it is given a copy in evaluation mode.
        tolerance: the difference of outputs allowed, relative to the largest.

    Returns:
        A model of the same structure, in evaluation mode.

    Raises:
        TypeError, ValueError: an unknown path, feature counts that do not match, a normalization named twice, of
            several domains or with an `example_weight`; or the outputs differ, because something is between layer and
            normalization.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> import jaxbn.nnx
        >>> rngs, x = nnx.Rngs(0), jnp.ones((2, 4))
        >>> norm = jaxbn.nnx.BatchNorm(3, activation=jax.nn.relu, rngs=rngs)
        >>> model = nnx.Sequential(nnx.Linear(4, 3, use_bias=False, rngs=rngs), norm)
        >>> new = jaxbn.nnx.fold(model, {"layers/0": "layers/1"}, x)
        >>> print(new.layers[0].bias[...], bool(jnp.allclose(new(x), nnx.view(model, use_running_average=True)(x))))
        [0. 0. 0.] True

    Source: as `jaxbn.inference.fold`. The comparison is on one input: give one like those to come.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"`model` must be an nnx module; got {type(model).__name__}.")
    modules = _modules(model)
    norms = {name for name, module in modules.items() if isinstance(module, (BatchNorm, nnx.BatchNorm))}
    layers = {name for name, module in modules.items() if isinstance(getattr(module, "kernel", None), nnx.Variable)}
    pairs = fold_model.checked(pairs, layers, norms)
    start, probed = _evaluating(model), _evaluating(model)
    for seed, norm in enumerate(pairs.values()):
        layer = _modules(probed)[norm]
        moved = fold_model.probe(layer.mean[...], layer.var[...], seed)
        for variable, value in zip((layer.mean, layer.var), moved, strict=True):
            variable.set_value(value)

    def difference(chosen: Mapping[str, str]) -> float:
        def run(model):
            return call(nnx.clone(model), x)

        gaps = [fold_model.gap(run(one), run(_folded(one, chosen))) for one in (start, probed)]
        return max(gaps, key=lambda gap: (gap != gap, gap))

    fold_model.verify(pairs, difference, tolerance)
    return _folded(start, pairs)


def _folded(model: Any, pairs: Mapping[str, str]) -> Any:
    """A copy of the model with `pairs` folded."""
    model = nnx.clone(model)
    modules = _modules(model)
    gone = {}
    for name, norm in pairs.items():
        layer, module = modules[name], modules[norm]
        bias = getattr(layer, "bias", None)
        scale, shift = (None if v is None else v[...] for v in (module.scale, module.bias))
        kernel, new_bias, _ = fold_model.folded(
            name,
            norm,
            module,
            BatchNormParams(scale, shift),
            BatchNormState(module.mean[...], module.var[...], jnp.zeros((), jnp.int32)),
            layer.kernel[...],
            None if bias is None else bias[...],
            layer,
        )
        layer.kernel.set_value(kernel)
        if bias is None:
            layer.bias, layer.use_bias = nnx.Param(new_bias), True
        else:
            bias.set_value(new_bias)
        gone[norm] = Folded(module)

    return replaced(model, lambda path, node: gone.get(_name(path)))


def _evaluating(model: Any) -> Any:
    model = nnx.clone(model)
    model.eval()
    return model


def _modules(model: Any) -> dict[str, Any]:
    return {_name(path): module for path, module in nnx.iter_modules(model)}


def _name(path: Any) -> str:
    return "/".join(map(str, path))
