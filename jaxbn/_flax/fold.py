"""Fold the batch normalizations of a model into the layers before them, over either view."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxbn._core import check
from jaxbn._core.fetch import fetch_array
from jaxbn._core.layout import to_layout
from jaxbn._flax.view import Call, Fold, View, read_params, read_state
from jaxbn.inference._fold import compute_affine, fold

V = TypeVar("V", bound=View)


class Record(NamedTuple):
    """The calls of a model on one input, by path.

    Attributes:
        layers: the layers other than normalizations.
        norms: the first call of each batch normalization.
        sources: of each batch normalization, the layers whose very outputs it got; None among them for other input.
    """

    layers: dict[str, Any]
    norms: dict[str, Call]
    sources: dict[str, set[str | None]]


def fold_model(view: V, x: Any, pairs: Mapping[str, str] | None, tolerance: float, drop: bool = False) -> V:
    """Return the model with each normalization of `pairs`, by default all that can be, folded into its layer."""
    check.number("tolerance", tolerance, 0)
    record = record_calls(view, x)
    left: dict[str, str] = {}
    automatic = pairs is None
    pairs = find_pairs(view, record, left) if automatic else check_pairs(pairs, view, record)
    states = {norm: read_state(partial(view.read, norm)) for norm in pairs.values()}
    probed = view.replace({norm: perturb_statistics(state, seed) for seed, (norm, state) in enumerate(states.items())})
    before = [(v, v.run(x)) for v in (view, probed)]
    numbers = select_numbers(before[0][1])
    if not any(np.size(y) and jnp.issubdtype(jnp.result_type(y), jnp.inexact) for y in numbers):
        leaves = jax.tree.leaves(before[0][1])
        got = [f"{v.dtype}{list(v.shape)}" if hasattr(v, "dtype") else type(v).__name__ for v in leaves]
        raise ValueError(
            "`x` must hold an example, and `apply`, or `call`, give floating point outputs of it, by which the folded "
            f"model is compared: return logits, not classes; got {', '.join(got) or 'nothing'}."
        )

    def difference(chosen: Mapping[str, str]) -> float:
        gaps = [compare_outputs(y, fold_pairs(v, record, chosen, False).run(x)) for v, y in before]
        return max(gaps, key=lambda gap: (gap != gap, gap))

    total, wrong = difference(pairs), {}
    if pairs and not total <= tolerance:
        alone = {layer: difference({layer: norm}) for layer, norm in pairs.items()}
        wrong = {layer: gap for layer, gap in alone.items() if not gap <= tolerance}
        rest = {layer: norm for layer, norm in pairs.items() if layer not in wrong}
        if not automatic or not wrong or (rest and not difference(rest) <= tolerance):
            raise refuse_pairs(pairs, wrong, total, tolerance)
        left |= {pairs[layer]: f"folding it changes the outputs by {gap:.1e}" for layer, gap in wrong.items()}
        pairs = rest
    if left:
        reasons = "; ".join(f"{norm or 'the layer'!r}: {reason}" for norm, reason in left.items())
        if not pairs:
            half = "In half precision pass `tolerance=3e-2`; " if wrong else ""
            raise ValueError(
                f"`fold` must find a batch normalization directly after a layer with a kernel; got none. {reasons}. "
                f"{half}`jaxbn.inference.fold_into_next` folds into a layer after it."
            )
        warnings.warn(
            f"`fold` leaves {len(left)} of {len(left) + len(pairs)} normalizations as they are. {reasons}. Name "
            "`pairs` to fold without this warning.",
            stacklevel=3,
        )
    return fold_pairs(view, record, pairs, drop)


def record_calls(view: View, x: Any) -> Record:
    """Run the model once and record its calls."""
    record, outputs = Record({}, {}, {}), {}

    def after(path, layer, y):
        record.layers.setdefault(path, layer)
        if path in view.kernels:
            outputs[id(y)] = path, y  # holds y, so that no other array gets its id

    def observe(call):
        if call.kind == "batch":
            if not (isinstance(call.evaluate, Tracer) or bool(call.evaluate)):  # a traced choice shows in the outputs
                raise ValueError(
                    f"`apply`, or `call`, must use the model in evaluation; {call.path or 'the layer'!r} normalizes "
                    "by the batch: pass its flag, `lambda ..., x: model...(x, train=False)`."
                )
            record.norms.setdefault(call.path, call)
            record.sources.setdefault(call.path, set()).add(outputs.get(id(call.x), (None,))[0])
        return call.proceed()

    view.run(x, observe, after)
    return record


def find_pairs(view: View, record: Record, left: dict[str, str]) -> dict[str, str]:
    """Return layer -> normalization that gets its very output; add to `left` the others, with the reason."""
    pairs: dict[str, str] = {}
    feeding = [layer for sources in record.sources.values() for layer in sources]
    for norm in (path for path, kind in view.kinds.items() if kind == "batch"):
        sources = record.sources.get(norm, set())
        layer = next(iter(sources)) if len(sources) == 1 else None
        if norm not in record.norms:
            left[norm] = "not called, or not as a plain function"
        elif layer is None:
            left[norm] = "not directly after one layer with a kernel"
        elif feeding.count(layer) > 1:
            left[norm] = f"{layer!r} feeds several normalizations"
        else:
            try:
                fold_pair(view, record, layer, norm)
                pairs[layer] = norm
            except (TypeError, ValueError) as error:
                left[norm] = str(error).rstrip(".")
    if not (pairs or left):
        left["the model"] = "no batch normalization"
    return pairs


def check_pairs(pairs: Any, view: View, record: Record) -> dict[str, str]:
    """Return given `pairs` as a dict of layers and normalizations that are called, each normalization once."""
    if not isinstance(pairs, Mapping) or not pairs:
        raise TypeError(
            f"`pairs` must map layers to the normalizations after them, {{'Conv_0': 'BatchNorm_0'}}; got {pairs!r}."
        )
    normalized = [path for path, kind in view.kinds.items() if kind == "batch"]
    known: tuple[tuple[str, list, Iterable[str]], ...] = (
        ("layer with a kernel", list(pairs), view.kernels),
        ("normalization with running mean and var", list(pairs.values()), normalized),
    )
    for kind, names, paths in known:
        for name in names:
            if name not in paths:
                close = get_close_matches(str(name), paths, 1)
                meant = f"Did you mean {close[0]!r}?" if close else f"There are {', '.join(sorted(paths)) or 'none'}."
                raise ValueError(f"`pairs` names {name!r}, which is no {kind}. {meant}")
            if names.count(name) > 1:
                raise ValueError(f"`pairs` must name each normalization once; got {name!r} twice.")
    for name in (*pairs, *pairs.values()):
        if name not in record.layers and name not in record.norms:
            raise ValueError(f"`pairs` names {name!r}, which `apply` does not call, or not as a plain function.")
    for name in pairs.values():
        if name not in record.norms:
            kind = type(record.layers[name]).__name__
            raise ValueError(f"`pairs` must name BatchNorm layers; {name!r} is a {kind}.")
    return dict(pairs)


def fold_pairs(view: V, record: Record, pairs: Mapping[str, str], drop: bool) -> V:
    """Return the model with `pairs` folded."""
    return view.replace_folded({layer: fold_pair(view, record, layer, norm) for layer, norm in pairs.items()}, drop)


def fold_pair(view: View, record: Record, layer: str, norm: str) -> Fold:
    """Compute kernel and bias of `layer` with the normalization `norm` in it."""
    module, before, read = record.norms[norm].layer, record.layers[layer], partial(view.read, norm)
    params, state = read_params(read), read_state(read)._replace(count=jnp.zeros((), jnp.int32))
    kernel, bias, epsilon = view.read(layer, "kernel"), view.read(layer, "bias"), module.epsilon
    for option in ("num_domains", "example_weight"):
        if value := getattr(module, option, None):
            raise ValueError(
                f"`fold` cannot fold {norm!r} into {layer!r}: with {option}={value} it is not the same affine map for "
                "all inputs. Leave it as it is."
            )
    features = len(module.axis) if isinstance(module.axis, (tuple, list)) else 1
    stacked = np.ndim(state.mean) - features
    axes = (*range(stacked), *((-2,) if getattr(before, "transpose_kernel", False) else range(-features, 0)))
    try:
        kernel, new_bias = fold(params, state, kernel, bias, epsilon=epsilon, axis=axes)
    except (TypeError, ValueError) as error:
        raise type(error)(f"`fold` cannot fold {norm!r} into {layer!r}: {error}") from None
    shift = compute_affine(params, state, None, epsilon=epsilon, dtype=state.mean.dtype)[1]
    if bias is None and (shape := _bias_shape(before, kernel.shape, stacked)):
        new_bias = jnp.broadcast_to(to_layout(new_bias, tuple(a % len(shape) for a in axes), len(shape)), shape)
    return Fold(norm, kernel, new_bias, shift, epsilon)


def _bias_shape(layer: Any, kernel: tuple[int, ...], stacked: int) -> tuple[int, ...] | None:
    """Return the shape of the bias that a layer without one would have, where it has more axes than features."""
    if type(layer).__name__ == "ConvLocal":  # a kernel and a bias of their own for each position
        return (*kernel[:-2], kernel[-1])
    outputs = getattr(layer, "out_features", getattr(layer, "features", None))
    batched = getattr(layer, "batch_axis", getattr(layer, "batch_dims", ()))
    if isinstance(outputs, Sequence) and len(outputs) > 1:
        return (*kernel[: stacked + len(batched)], *kernel[-len(outputs) :])
    return None


def perturb_statistics(state: Any, seed: int) -> dict[str, jax.Array]:
    """Perturb mean and var, so that an operation between layer and normalization cannot pass unnoticed."""
    rng = np.random.default_rng(seed)
    wide = jnp.promote_types(state.var.dtype, jnp.float32)
    sign = jnp.asarray(rng.choice([-1.0, 1.0], np.shape(state.mean)), wide)
    factor = jnp.asarray(rng.uniform(0.5, 2.0, np.shape(state.var)), wide)
    mean = state.mean.astype(wide) + sign * jnp.sqrt(state.var.astype(wide))
    var = state.var.astype(wide) * factor
    return {"mean": mean.astype(state.mean.dtype), "var": var.astype(state.var.dtype)}


def select_numbers(outputs: Any) -> list[Any]:
    """Return the leaves that are arrays of numbers or bools, or one of them."""
    held = (jax.Array, np.ndarray, np.generic, int, float, complex)
    leaves = [(v, getattr(v, "dtype", type(v))) for v in jax.tree.leaves(outputs) if isinstance(v, held)]
    return [v for v, dtype in leaves if jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)]


def compare_outputs(before: Any, after: Any) -> float:
    """Return the largest difference of two trees, relative to the largest entry of its array; NaN if there is one.

    Integers and bools that differ are infinitely far: classes may hide any change of the logits.
    """
    worst = [0.0]
    for pair in zip(select_numbers(before), select_numbers(after), strict=True):
        one, other = map(fetch_array, pair)
        if not jnp.issubdtype(one.dtype, jnp.inexact):
            worst.append(0.0 if np.array_equal(one, other) else np.inf)
        elif one.size:
            one, other = one.astype(np.complex128), other.astype(np.complex128)
            worst.append(np.max(np.abs(one - other)) / max(np.max(np.abs(one)), np.finfo(np.float32).tiny))
    return float(np.max(worst))


def refuse_pairs(pairs: Mapping[str, str], wrong: Mapping[str, float], total: float, tolerance: float) -> ValueError:
    """Make the error for pairs whose folding changes the outputs."""
    named = ", ".join(f"{layer!r} -> {pairs[layer]!r} ({gap:.1e})" for layer, gap in wrong.items())
    return ValueError(
        f"`pairs` must be layers and the normalizations directly after them, but folding changes the outputs, by "
        f"{total:.1e} of the largest where {tolerance:.1e} is allowed, and nothing in integers. At fault: "
        f"{named or 'all of them together'}. "
        "There may be an activation or padding between the two, the layer may be used elsewhere too, or the "
        "normalization be of other features. Where the model computes in half precision pass `tolerance=3e-2`."
    )
