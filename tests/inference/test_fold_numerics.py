"""Fold in half precision, with large means, under transformations; refuse wrong arrays."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folding import dense, far, layer, normalized, plus

import jaxbn
from jaxbn.inference._fold import fold, fold_into_next


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
    """Folding keeps the digits that the two layers had: at most twice their error; all, for a bias."""
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
    uncounted = state._replace(count=None)
    np.testing.assert_array_equal(fold(params, uncounted, kernel)[0], fold(params, state, kernel)[0])
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
    "list": (partial(fold, PARAMS, STATE._replace(mean=[0.0] * 4), KERNEL), TypeError, ["state.mean", "array", "[0.0"]),
    "list after": (
        partial(fold_into_next, PARAMS._replace(scale=[1.0] * 4), STATE, KERNEL, padding=0),
        TypeError,
        ["params.scale", "array", "[1.0"],
    ),
    "integers": (partial(fold, PARAMS, STATE, np.ones((3, 4), int)), TypeError, ["kernel", "floating"]),
    "bias": (partial(fold, PARAMS, STATE, KERNEL, np.ones(3, np.float32)), ValueError, ["bias", "(4,)", "(3,)"]),
    "axis": (partial(fold, PARAMS, STATE, KERNEL, axis=4), ValueError, ["axis", "kernel", "4"]),
    "epsilon": (partial(fold, PARAMS, STATE, KERNEL, epsilon=0.0), ValueError, ["epsilon"]),
    "a vector": (partial(fold_into_next, PARAMS, STATE, np.ones(4, np.float32)), ValueError, ["kernel", "(4,)"]),
    "padding not said": (partial(fold_into_next, PARAMS, STATE, KERNEL), ValueError, ["padding", "zeros", "fold"]),
    "same": (partial(fold_into_next, PARAMS, STATE, KERNEL, padding="SAME"), ValueError, ["padding", "SAME"]),
    "pairs": (partial(fold_into_next, PARAMS, STATE, KERNEL, padding=[(0, 0), (1, 0)]), ValueError, ["padding"]),
    "number and pair": (partial(fold_into_next, PARAMS, STATE, KERNEL, padding=[1, (0, 0)]), ValueError, ["padding"]),
    "no number": (partial(fold_into_next, PARAMS, STATE, KERNEL, padding=[None]), ValueError, ["padding", "[None]"]),
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
