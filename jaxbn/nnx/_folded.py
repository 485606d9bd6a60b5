"""Stand in for a folded normalization in an nnx model."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from jaxbn._core import check
from jaxbn._core.epilogue import apply_epilogue
from jaxbn._core.layout import lay_out_affine
from jaxbn._core.state import BatchNormParams
from jaxbn._flax.dtypes import choose_output_dtype, widen_input
from jaxbn._flax.forward import check_features, choose_affine


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
        x = check.array("x", x)
        given = BatchNormParams(*(choose_affine(n, None, v, None) for n, v in (("scale", scale), ("bias", bias))))
        dtype = choose_output_dtype(x, jnp.zeros((), self.held_dtype), *given, dtype=self.dtype)
        features = check.axes(self.axis, x.ndim)
        check_features(x, self.axis, tuple(x.shape[a] for a in features), "", **given._asdict())
        x = widen_input(x, dtype)
        residual = None if residual is None else check.like_x("residual", residual, x)
        # In the dtype of sums, as in the layer: rounded once.
        z = x.astype(check.accumulation_dtype(x.dtype))
        gamma, beta = (lay_out_affine(v, features, z, z.dtype) for v in given)
        return apply_epilogue(self.activation, gamma, beta, residual, dtype, z)

    # `nnx.view_info` reads the arguments from the docstring, where it wants two spaces before each.
    def set_view(self, use_running_average: bool | None = None):
        """Take the settings of `nnx.view` for a normalization.

        Args:
          use_running_average: without effect.
        """
