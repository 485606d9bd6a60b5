"""What folding a linen model and an nnx model have in common: which pairs, and whether they were right."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._core.fetch import fetch_array
from jaxbn._core.layout import to_layout
from jaxbn._core.state import BatchNormParams, BatchNormState
from jaxbn.inference._fold import affine, fold


def checked(pairs: Any, layers: Iterable[str], norms: Iterable[str]) -> dict[str, str]:
    """`pairs` as a dict of known names, each normalization in it once."""
    if not isinstance(pairs, Mapping) or not pairs:
        raise TypeError(
            f"`pairs` must map layers to the normalizations behind them, {{'Conv_0': 'BatchNorm_0'}}; got {pairs!r}."
        )
    for kind, names, known in (
        ("layer with a kernel", list(pairs), sorted(layers)),
        ("normalization with running mean and var", list(pairs.values()), sorted(norms)),
    ):
        for name in names:
            if name not in known:
                close = get_close_matches(str(name), known, 1)
                meant = f"Did you mean {close[0]!r}?" if close else f"There are {', '.join(known) or 'none'}."
                raise ValueError(f"`pairs` names {name!r}, which is no {kind}. {meant}")
            if names.count(name) > 1:
                raise ValueError(f"`pairs` must name each normalization once; got {name!r} twice.")
    return dict(pairs)


def folded(
    layer: str,
    norm: str,
    module: Any,
    params: BatchNormParams,
    state: BatchNormState,
    kernel: Any,
    bias: Any,
    before: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return kernel and bias of the layer `before`, and the shift as statistics have it, if it takes no bias."""
    for option in ("num_domains", "example_weight"):
        if value := getattr(module, option, None):
            raise ValueError(
                f"`pairs` cannot fold {norm!r} into {layer!r}: with {option}={value} it is not the same affine map for "
                "all inputs. Leave the pair out."
            )
    features = len(module.axis) if isinstance(module.axis, (tuple, list)) else 1
    stacked = np.ndim(state.mean) - features
    axes = (*range(stacked), *((-2,) if getattr(before, "transpose_kernel", False) else range(-features, 0)))
    try:
        kernel, new_bias = fold(params, state, kernel, bias, epsilon=module.epsilon, axis=axes)
    except (TypeError, ValueError) as error:
        raise type(error)(f"`pairs` cannot fold {norm!r} into {layer!r}: {error}") from None
    shift = affine(params, state, None, epsilon=module.epsilon, dtype=state.mean.dtype)[1]
    if bias is None and (shape := _bias_shape(before, kernel.shape, stacked)):
        new_bias = jnp.broadcast_to(to_layout(new_bias, tuple(a % len(shape) for a in axes), len(shape)), shape)
    return kernel, new_bias, shift


def _bias_shape(layer: Any, kernel: tuple[int, ...], stacked: int) -> tuple[int, ...] | None:
    """Return the shape of the bias that a layer without one would have, where it has more axes than features."""
    if type(layer).__name__ == "ConvLocal":  # a kernel and a bias of their own for each position
        return (*kernel[:-2], kernel[-1])
    outputs = getattr(layer, "out_features", getattr(layer, "features", None))
    batched = getattr(layer, "batch_axis", getattr(layer, "batch_dims", ()))
    if isinstance(outputs, Sequence) and len(outputs) > 1:
        return (*kernel[: stacked + len(batched)], *kernel[-len(outputs) :])
    return None


def probe(mean: Any, var: Any, seed: int) -> tuple[jax.Array, jax.Array]:
    """Other statistics: for those at hand something between layer and normalization may happen to do nothing."""
    rng = np.random.default_rng(seed)
    wide = jnp.promote_types(var.dtype, jnp.float32)
    away = jnp.asarray(rng.choice([-1.0, 1.0], np.shape(mean)), wide)
    factor = jnp.asarray(rng.uniform(0.5, 2.0, np.shape(var)), wide)
    moved = mean.astype(wide) + away * jnp.sqrt(var.astype(wide))
    return moved.astype(mean.dtype), (var.astype(wide) * factor).astype(var.dtype)


def verify(pairs: Mapping[str, str], difference: Callable[[Mapping[str, str]], float], tolerance: float) -> None:
    """That folding all `pairs` leaves the outputs as they are; if not, say for which pairs it does not."""
    total = difference(pairs)
    if total <= tolerance:
        return
    alone = {layer: difference({layer: norm}) for layer, norm in pairs.items()}
    wrong = [f"{k!r} -> {pairs[k]!r} ({d:.1e})" for k, d in alone.items() if not d <= tolerance]
    raise ValueError(
        f"`pairs` must be layers and the normalizations directly behind them, but folding changes the outputs, by "
        f"{total:.1e} of the largest where {tolerance:.1e} is allowed. At fault: "
        f"{', '.join(wrong) or 'all of them together'}. There may be an activation or padding between the two, the "
        "layer may be used elsewhere too, or the normalization be of other features. Where the model computes in half "
        "precision pass `tolerance=3e-2`."
    )


def gap(before: Any, after: Any) -> float:
    """The largest difference of two trees of outputs, relative to the largest entry of the array that it is in."""
    worst = [0.0]
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        if jnp.issubdtype(jnp.result_type(one), jnp.inexact) and np.size(one):
            one, other = (fetch_array(v).astype(np.complex128) for v in (one, other))
            worst.append(np.max(np.abs(one - other)) / max(np.max(np.abs(one)), np.finfo(np.float32).tiny))
    return float(np.max(worst))  # NaN if there is one
