"""Stand in for a folded normalization in an nnx model."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from jaxbn._core import check
from jaxbn._core.batch_norm import bn_apply
from jaxbn._core.state import BatchNormParams, BatchNormState
from jaxbn._flax.dtypes import choose_output_dtype


class Folded(nnx.Module):
    """Compute `activation(scale x + bias + residual)` in the dtype of the normalization that was folded away."""

    def __init__(self, norm: Any):
        self.activation, self.dtype = getattr(norm, "activation", None), norm.dtype
        self.axis = norm.axis
        held = [v[...] for v in (norm.mean, norm.var, norm.scale, norm.bias) if v is not None]
        self.held_dtype = choose_output_dtype(*held, dtype=None)

    def __call__(
        self, x: ArrayLike, *_: Any, residual: Any = None, scale: Any = None, bias: Any = None, **unused: Any
    ) -> jax.Array:
        """Take the arguments of a normalization, of which mode, mask and `update` are without effect.

        Args:
            x: the folded layer's output.
            *_: the mode, without effect.
            residual: added before the activation, of x's shape.
            scale: for a layer without its own, `[*features]` or `[batch, *features]`.
            bias: likewise.
            **unused: without effect.

        Returns:
            An array of x's shape.
        """
        x = jnp.asarray(x)
        given = BatchNormParams(*(None if v is None else jnp.asarray(v) for v in (scale, bias)))
        y = x.astype(choose_output_dtype(x, jnp.zeros((), self.held_dtype), *given, dtype=self.dtype))
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
        """Take the settings of `nnx.view` for a normalization.

        Args:
          use_running_average: without effect.
        """
