"""A folded layer does what the layer and its normalization did in evaluation, and folding refuses what it cannot do."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from oracle import evaluation

import jaxbn
from jaxbn.inference._fold import fold, fold_into_next


def conv(x, kernel, strides=1, padding="SAME", dilation=1, groups=1):
    """A convolution in flax's layout."""
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


def dense(x, kernel):
    return jnp.matmul(x, kernel, precision="highest")


def several(x, kernel):
    """A dense layer to two feature axes."""
    return jnp.tensordot(x, kernel, 1, precision="highest")


# The linear layer, the shapes of its input and kernel, the kernel's output axes.
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
# The layer, the input and kernel, its padding and groups: where what comes before it can be folded into it.
NEXT = {
    "dense": (dense, (6, 5), (5, 4), None, 1),
    "conv 1d": (partial(conv, padding="VALID"), (2, 9, 3), (3, 3, 4), "VALID", 1),
    "conv 2d": (partial(conv, padding="VALID", strides=2), (2, 6, 5, 3), (3, 2, 3, 4), [(0, 0), (0, 0)], 1),
    "conv 3d": (partial(conv, padding="VALID", dilation=2), (2, 5, 4, 3, 2), (2, 2, 1, 2, 4), 0, 1),
    "grouped": (partial(conv, padding="VALID", groups=2), (2, 6, 5, 4), (3, 3, 2, 6), "VALID", 2),
    "depthwise": (partial(conv, padding="VALID", groups=3), (2, 6, 5, 3), (3, 3, 1, 6), "VALID", 3),
    "window of 1": (partial(conv, strides=2), (2, 5, 5, 3), (1, 1, 3, 4), "SAME", 1),
    "circular": (partial(conv, padding="CIRCULAR"), (2, 6, 5, 3), (3, 2, 3, 4), "CIRCULAR", 1),
}
PRESENT = pytest.mark.parametrize("present", [(True, True), (False, True), (True, False), (False, False)])


def layer(rng, features, ratio=1.0, present=(True, True), dtype=jnp.float32):
    """A normalization of some age; its mean is `ratio` deviations, its scale of both signs."""
    var = rng.uniform(0.1, 4, features)
    params, state = jaxbn.bn_init(
        features,
        dtype=dtype,
        scale=rng.normal(1, 1, features) if present[0] else None,
        bias=rng.normal(size=features) if present[1] else None,
        mean=ratio * np.sqrt(var) * rng.choice([-1, 1], features),
        var=var,
    )
    return params, state


def exact(linear, *arrays):
    """A linear layer in float64."""
    with jax.enable_x64(True):
        return np.asarray(linear(*(jnp.asarray(np.asarray(v, np.float64)) for v in arrays)))


def normalized(params, state, h, axis=-1, epsilon=1e-5):
    parts = [None if v is None else np.asarray(v, np.float64) for v in params]
    return evaluation(h, state.mean, state.var, *parts, axis=axis, epsilon=epsilon)


def plus(y, bias):
    return np.asarray(y) + np.asarray(bias)


def far(got, wanted):
    """The largest error, relative to the largest output."""
    return np.max(np.abs(np.asarray(got, np.float64) - wanted)) / np.max(np.abs(wanted))


@PRESENT
@pytest.mark.parametrize("name", LAYERS)
def test_into_the_layer_before(name, present):
    """To 1e-5: sums of at most 27 products of float32, some roundings of 6e-8 each, before they cancel some digits."""
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


@PRESENT
@pytest.mark.parametrize("name", NEXT)
def test_into_the_layer_behind(name, present):
    """To 1e-5, as above."""
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


def test_a_dense_layer_behind_a_flattened_image():
    rng = np.random.default_rng(2)
    x, kernel = (np.asarray(rng.normal(size=s), np.float32) for s in ((2, 3, 2, 4), (24, 5)))
    params, state = layer(rng, 4)
    wanted = exact(dense, normalized(params, state, x).reshape(2, 24), kernel)
    with pytest.raises(ValueError, match="padding"):
        fold_into_next(params, state, kernel.reshape(6, 4, 5))
    new, bias = fold_into_next(params, state, kernel.reshape(6, 4, 5), padding="VALID")
    assert far(plus(x.reshape(2, 24) @ np.asarray(new).reshape(24, 5), bias), wanted) < 1e-5


@pytest.mark.parametrize("axis", [(0, 2), (2, 0)])
def test_two_input_axes_behind(axis):
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


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_rounded_once(dtype):
    """Kernel and bias are those computed in float32 from the same numbers, rounded; and so nearly are the outputs."""
    rng = np.random.default_rng(4)
    kernel, bias = (jnp.asarray(rng.normal(size=s), dtype) for s in ((8, 4), 4))
    params, state = layer(rng, 4, dtype=dtype)
    wide = jax.tree.map(lambda v: v.astype(jnp.float32), (params, kernel, bias))
    for how in (fold, fold_into_next):
        if how is fold_into_next:
            params, state = layer(rng, 8, dtype=dtype)
            wide = jax.tree.map(lambda v: v.astype(jnp.float32), (params, kernel, bias))
        got, exact = how(params, state, kernel, bias), how(wide[0], state, *wide[1:])
        for narrow, full in zip(got, exact, strict=True):
            assert narrow.dtype == dtype
            np.testing.assert_array_equal(narrow, full.astype(dtype))
    x = np.asarray(rng.normal(size=(16, 8)), np.float64)
    wanted = x @ np.asarray(exact[0], np.float64) + np.asarray(exact[1], np.float64)
    got = x @ np.asarray(got[0], np.float64) + np.asarray(got[1], np.float64)
    # Each weight is half an eps off, and they do not conspire.
    assert far(got, wanted) < float(jnp.finfo(dtype).eps)
    mixed = fold(params._replace(scale=None, bias=None), state, kernel.T, jnp.zeros(8, jnp.float32))
    assert (mixed[0].dtype, mixed[1].dtype) == (dtype, jnp.float32)


@pytest.mark.parametrize("ratio", [1e2, 1e4])
def test_a_mean_of_many_deviations(ratio):
    """What remains of float32's digits is what the two layers had left: at most twice their error; all, for a bias."""
    rng = np.random.default_rng(5)
    x = np.asarray(rng.normal(size=(256, 16)) + ratio, np.float32)
    kernel = np.asarray(rng.normal(size=(16, 8)), np.float32)
    h = x.astype(np.float64) @ kernel
    params, state = jaxbn.bn_init(8, mean=h.mean(0), var=h.var(0))
    wanted = normalized(params, state, h)
    apart = jaxbn.bn_apply(params, state, dense(x, kernel), False)[0]
    new, bias = fold(params, state, kernel)
    # Three roundings where there were two: of the kernel, of the bias, and of the sum. |b| is up to 16 ratio 2^-24.
    assert far(plus(dense(x, new), bias), wanted) < max(2 * far(apart, wanted), 1e-6)

    # The mean is that of the layer's own bias: the two cancel before anything is rounded.
    x = np.asarray(rng.normal(size=(256, 16)), np.float32)
    own = np.full(8, ratio, np.float32)
    h = x.astype(np.float64) @ kernel + own
    params, state = jaxbn.bn_init(8, mean=h.mean(0), var=h.var(0))
    new, bias = fold(params, state, kernel, own)
    assert far(plus(dense(x, new), bias), normalized(params, state, h)) < 2e-6


def test_compiled_mapped_and_differentiated():
    """Folding is a function of arrays like any other, so it can stand inside training: its gradients are those."""
    rng = np.random.default_rng(6)
    x, kernel, bias = (np.asarray(rng.normal(size=s), np.float32) for s in ((7, 5), (5, 4), 4))
    params, state = layer(rng, 4)
    np.testing.assert_allclose(jax.jit(fold)(params, state, kernel)[0], fold(params, state, kernel)[0], rtol=1e-6)
    stacked = jax.tree.map(lambda v: jnp.stack([v, 2 * v]), (params, state, kernel))
    for got, one in zip(jax.vmap(fold)(*stacked), fold(params, state, kernel), strict=True):
        np.testing.assert_allclose(got[0], one, rtol=1e-6)

    def through(params, kernel, bias):
        new, shift = fold(params, state, kernel, bias)
        return jnp.sum(jnp.sin(dense(x, new) + shift[None]))

    def beside(params, kernel, bias):
        return jnp.sum(jnp.sin(jaxbn.bn_apply(params, state, dense(x, kernel) + bias[None], False)[0]))

    got = jax.grad(through, (0, 1, 2))(params, jnp.asarray(kernel), jnp.asarray(bias))
    wanted = jax.grad(beside, (0, 1, 2))(params, jnp.asarray(kernel), jnp.asarray(bias))
    # Sums of 35 terms of size 10 and less, rounded in another order.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, wanted)


PARAMS, STATE = jaxbn.bn_init(4)
KERNEL = np.ones((3, 3, 4, 4), np.float32)
REFUSED = {
    "features": (partial(fold, PARAMS, STATE, np.ones((4, 3), np.float32)), ValueError, ["kernel", "(4,)", "(3,)"]),
    "swapped": (partial(fold, STATE, PARAMS, KERNEL), TypeError, ["state", "bn_init"]),
    "integers": (partial(fold, PARAMS, STATE, np.ones((3, 4), int)), TypeError, ["kernel", "floating"]),
    "bias": (partial(fold, PARAMS, STATE, KERNEL, np.ones(3, np.float32)), ValueError, ["bias", "(4,)", "(3,)"]),
    "axis": (partial(fold, PARAMS, STATE, KERNEL, axis=4), ValueError, ["axis", "kernel", "4"]),
    "epsilon": (partial(fold, PARAMS, STATE, KERNEL, epsilon=0.0), ValueError, ["epsilon"]),
    "a vector": (partial(fold_into_next, PARAMS, STATE, np.ones(4, np.float32)), ValueError, ["kernel", "(4,)"]),
    "padding not said": (partial(fold_into_next, PARAMS, STATE, KERNEL), ValueError, ["padding", "zeros", "fold"]),
    "same": (partial(fold_into_next, PARAMS, STATE, KERNEL, padding="SAME"), ValueError, ["padding", "SAME"]),
    "pairs": (partial(fold_into_next, PARAMS, STATE, KERNEL, padding=[(0, 0), (1, 0)]), ValueError, ["padding"]),
    "causal": (partial(fold_into_next, PARAMS, STATE, KERNEL, padding="CAUSAL"), ValueError, ["padding", "CAUSAL"]),
    "group count": (partial(fold_into_next, PARAMS, STATE, KERNEL, padding=0, groups=2), ValueError, ["groups=2"]),
    "no divisor": (partial(fold_into_next, PARAMS, STATE, KERNEL, padding=0, groups=3), ValueError, ["groups", "3"]),
    "groups None": (partial(fold_into_next, PARAMS, STATE, KERNEL, padding=0, groups=None), TypeError, ["groups"]),
    "output axis": (partial(fold_into_next, PARAMS, STATE, KERNEL, padding=0, axis=-1), ValueError, ["axis", "input"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, kind, words = REFUSED[name]
    with pytest.raises(kind) as error:
        call()
    assert all(word in str(error.value) for word in words), error.value
