"""Fold into the layer before or after: the same outputs as layer and normalization in float64."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from folding import dense, exact, far, layer, normalized, plus
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from params import named, pairs

from jaxbn.inference._fold import fold, fold_into_next


def conv(x, kernel, strides=1, padding="SAME", dilation=1, groups=1):
    """Apply a convolution in flax's layout."""
    n = kernel.ndim - 2
    space = "DHW"[-n:]
    numbers = (f"N{space}C", f"{space}IO", f"N{space}C")
    if padding == "CIRCULAR":
        x = jnp.pad(x, [(0, 0), *[((k - 1) // 2, k // 2) for k in kernel.shape[:n]], (0, 0)], mode="wrap")
        padding = "VALID"
    return lax.conv_general_dilated(
        x, kernel, (strides,) * n, padding, (1,) * n, (dilation,) * n, numbers, groups, precision="highest"
    )


def transposed(x, kernel, swapped):
    return lax.conv_transpose(x, kernel, (2,) * (kernel.ndim - 2), "SAME", transpose_kernel=swapped)


def several(x, kernel):
    """Apply a dense layer to two feature axes."""
    return jnp.tensordot(x, kernel, 1, precision="highest")


LAYERS = {
    "dense": (dense, (6, 5), (5, 4), -1),
    "several": (several, (6, 5), (5, 2, 3), (-2, -1)),
    "conv 1d": (conv, (2, 9, 3), (3, 3, 4), -1),
    "conv 2d": (conv, (2, 6, 5, 3), (3, 3, 3, 4), -1),
    "conv 3d": (conv, (2, 3, 4, 3, 2), (2, 3, 1, 2, 4), -1),
    "valid": (partial(conv, padding="VALID"), (2, 6, 5, 3), (3, 2, 3, 4), -1),
    "grouped": (partial(conv, groups=2), (2, 6, 5, 4), (3, 3, 2, 6), -1),
    "depthwise": (partial(conv, groups=3), (2, 6, 5, 3), (3, 3, 1, 6), -1),
    "strided": (partial(conv, strides=2), (2, 7, 5, 3), (3, 3, 3, 4), -1),
    "dilated": (partial(conv, dilation=2), (2, 7, 6, 3), (3, 2, 3, 4), -1),
    "transposed": (partial(transposed, swapped=False), (2, 4, 3, 3), (3, 3, 3, 4), -1),
    "transposed, axes swapped": (partial(transposed, swapped=True), (2, 4, 3, 3), (3, 3, 4, 3), -2),
}
NEXT = {
    "dense": (dense, (6, 5), (5, 4), None, 1),
    "conv 1d": (partial(conv, padding="VALID"), (2, 9, 3), (3, 3, 4), "VALID", 1),
    "conv 2d": (partial(conv, padding="VALID", strides=2), (2, 6, 5, 3), (3, 2, 3, 4), [(0, 0), (0, 0)], 1),
    "numbers and pairs": (partial(conv, padding="VALID"), (2, 6, 5, 3), (3, 2, 3, 4), [(0, 0), 0], 1),
    "lower case": (partial(conv, padding="valid"), (2, 6, 5, 3), (3, 2, 3, 4), "valid", 1),
    "conv 3d": (partial(conv, padding="VALID", dilation=2), (2, 5, 4, 3, 2), (2, 2, 1, 2, 4), 0, 1),
    "grouped": (partial(conv, padding="VALID", groups=2), (2, 6, 5, 4), (3, 3, 2, 6), "VALID", 2),
    "depthwise": (partial(conv, padding="VALID", groups=3), (2, 6, 5, 3), (3, 3, 1, 6), "VALID", 3),
    "window of 1": (partial(conv, strides=2), (2, 5, 5, 3), (1, 1, 3, 4), "SAME", 1),
    "circular": (partial(conv, padding="CIRCULAR"), (2, 6, 5, 3), (3, 2, 3, 4), "CIRCULAR", 1),
}
PRESENT = named((True, True), (False, True), (True, False), (False, False))


@pairs("name, present", named(*LAYERS), PRESENT)
def test_into_the_layer_before(name, present):
    """Agree to 1e-5: sums of 27 products of float32 at most, some roundings of 6e-8 each, before digits cancel."""
    linear, shape, kernel_shape, axis = LAYERS[name]
    rng = np.random.default_rng(0)
    x, kernel = (np.asarray(rng.normal(size=s), np.float32) for s in (shape, kernel_shape))
    features = tuple(kernel_shape[a] for a in (axis if isinstance(axis, tuple) else (axis,)))
    params, state = layer(rng, features, present=present)
    for bias in (None, np.asarray(rng.normal(size=features), np.float32)):
        h = exact(linear, x, kernel) + (0 if bias is None else bias)
        wanted = normalized(params, state, h, axis if name == "several" else -1, epsilon=1e-3)
        new_kernel, new_bias = fold(params, state, kernel, bias, epsilon=1e-3, axis=axis)
        assert (new_kernel.shape, new_kernel.dtype) == (kernel.shape, kernel.dtype)
        assert (new_bias.shape, new_bias.dtype) == (features, kernel.dtype)
        assert far(plus(linear(x, new_kernel), new_bias), wanted) < 1e-5


@pairs("name, present", named(*NEXT), PRESENT)
def test_into_the_layer_after(name, present):
    """Agree to 1e-5, as above."""
    linear, shape, kernel_shape, padding, groups = NEXT[name]
    rng = np.random.default_rng(1)
    x, kernel = (np.asarray(rng.normal(size=s), np.float32) for s in (shape, kernel_shape))
    params, state = layer(rng, shape[-1], present=present)
    for bias in (None, np.asarray(rng.normal(size=kernel_shape[-1]), np.float32)):
        wanted = exact(linear, normalized(params, state, x), kernel) + (0 if bias is None else bias)
        new_kernel, new_bias = fold_into_next(params, state, kernel, bias, padding=padding, groups=groups)
        assert (new_kernel.shape, new_kernel.dtype) == (kernel.shape, kernel.dtype)
        assert (new_bias.shape, new_bias.dtype) == (kernel_shape[-1:], kernel.dtype)
        assert far(plus(linear(x, new_kernel), new_bias), wanted) < 1e-5


def test_a_dense_layer_after_a_flattened_image():
    rng = np.random.default_rng(2)
    x, kernel = (np.asarray(rng.normal(size=s), np.float32) for s in ((2, 3, 2, 4), (24, 5)))
    params, state = layer(rng, 4)
    wanted = exact(dense, normalized(params, state, x).reshape(2, 24), kernel)
    with pytest.raises(ValueError, match="padding"):
        fold_into_next(params, state, kernel.reshape(6, 4, 5))
    new, bias = fold_into_next(params, state, kernel.reshape(6, 4, 5), padding="VALID")
    assert far(plus(x.reshape(2, 24) @ np.asarray(new).reshape(24, 5), bias), wanted) < 1e-5


@pytest.mark.parametrize("axis", [(0, 2), (2, 0)])
def test_two_input_axes_after(axis):
    """Features of the normalization in the order of `axis`."""
    rng = np.random.default_rng(3)
    kernel = np.asarray(rng.normal(size=(3, 2, 4, 5)), np.float32)
    x = np.asarray(rng.normal(size=(6, 3, 2, 4)), np.float32)
    params, state = layer(rng, tuple(kernel.shape[a] for a in axis))
    h = normalized(params, state, x, axis=tuple(a + 1 for a in axis))
    new, bias = fold_into_next(params, state, kernel, padding="VALID", axis=axis)
    wanted = h.reshape(6, -1) @ kernel.reshape(-1, 5).astype(np.float64)
    assert far(plus(x.reshape(6, -1) @ np.asarray(new).reshape(-1, 5), bias), wanted) < 1e-5


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 4), fan_in=st.integers(1, 40), features=st.integers(1, 5), seed=st.integers(0, 99),
    present=st.tuples(st.booleans(), st.booleans()), epsilon=st.sampled_from([1e-5, 1e-3, 2.0]),
)  # fmt: skip
@pytest.mark.slow
def test_both_at_any_size(rows, fan_in, features, seed, present, epsilon):
    """The error relative to the sum of the sizes of the terms, for which roundings of up to 40 products are 1e-5."""
    rng = np.random.default_rng(seed)
    x, kernel = (np.asarray(rng.normal(size=s), np.float32) for s in ((rows, fan_in), (fan_in, features)))
    size = np.abs(x).astype(np.float64) @ np.abs(kernel)
    params, state = layer(rng, features, present=present)
    new, bias = fold(params, state, kernel, epsilon=epsilon)
    wanted = normalized(params, state, x.astype(np.float64) @ kernel, epsilon=epsilon)
    room = plus(size, np.abs(state.mean)) * np.max(np.abs(new) / np.abs(kernel)) + np.max(np.abs(bias))
    assert np.all(np.abs(plus(x @ np.asarray(new), bias) - wanted) < 1e-5 * room)

    params, state = layer(rng, fan_in, present=present)
    new, bias = fold_into_next(params, state, kernel, epsilon=epsilon)
    wanted = normalized(params, state, x, epsilon=epsilon) @ kernel
    room = plus(np.abs(x), np.abs(state.mean)) @ np.abs(np.asarray(new)) + np.max(np.abs(kernel)) * fan_in * 4
    assert np.all(np.abs(plus(x @ np.asarray(new), bias) - wanted) < 1e-5 * room)
