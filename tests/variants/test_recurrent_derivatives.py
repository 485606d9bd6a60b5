"""Derivatives of recurrent batch normalization against float64 differences, in both modes; what is kept for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lstm_oracle import ENDED, FULL_IS_SLOW, GRADIENT, LENGTHS, ROWS, TRAIN, XS, G, model, reference, run
from ways import assert_close

rng = np.random.default_rng(2)


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
@FULL_IS_SLOW
def test_gradients_against_float64_differences(train, lengths):
    """Compare every parameter's and input's with differences of the NumPy loop, and float32 with float64."""
    gradients, drawn = {}, np.random.default_rng(1)
    for dtype in ("float64", "float32"):
        with jax.enable_x64(dtype == "float64"):
            params, state = model(dtype=dtype)
            state = jax.tree.map(lambda v: v + (0.3 if jnp.issubdtype(v.dtype, jnp.floating) else 1), state)
            xs = jnp.asarray(XS if lengths is None else np.where(ENDED, np.nan, XS), dtype)

            def loss(params, xs, state=state, dtype=dtype):
                return jnp.sum(run(params, state, xs, train, lengths)[1] * G.astype(dtype))

            gradients[dtype] = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, xs)
            if dtype == "float64":
                leaves, tree = jax.tree.flatten((params, jnp.asarray(XS, dtype)))
                leaves = [np.array(v) for v in leaves]

                def value(leaves=leaves, tree=tree, state=state):
                    params, xs = jax.tree.unflatten(tree, leaves)
                    return np.sum(reference(params, state, xs, train, lengths)[1] * G)

                for leaf, gradient in zip(leaves, jax.tree.leaves(gradients[dtype]), strict=True):
                    # A random eighth of the entries, and always the last: of the inputs, padding where there is any.
                    for at in [*drawn.permutation(leaf.size)[: leaf.size // 8 + 1], leaf.size - 1]:
                        held, ends = leaf.flat[at], []
                        for steps in (1, -1, 2, -2):
                            leaf.flat[at] = held + 2e-6 * steps
                            ends.append(value())
                        leaf.flat[at] = held
                        # Of fourth order: the third derivative is some 1e5 where the first h has little variance. What
                        # is left is rounding over the step.
                        slope = (8 * (ends[0] - ends[1]) - (ends[2] - ends[3])) / 24e-6
                        assert abs(slope - np.asarray(gradient).flat[at]) < 1e-8
    small, exact = (map(np.asarray, jax.tree.leaves(gradients[d])) for d in ("float32", "float64"))
    for a, b in zip(small, exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1.0, float(np.abs(b).max())))
    if lengths is not None:
        assert np.all(np.where(ENDED, gradients["float32"][1], 0) == 0)


@pytest.mark.slow
def test_under_vmap_and_both_modes_of_differentiation():
    models = [model(seed=s) for s in (0, 1)]
    params, state = jax.tree.map(lambda *v: jnp.stack(v), *models)
    xs = np.stack([XS, XS[::-1] * 2])
    each = jax.jit(jax.vmap(lambda p, s, x: run(p, s, x, True, LENGTHS)))(params, state, xs)
    for i in range(2):
        assert_close(jax.tree.map(lambda v, i=i: v[i], each), TRAIN(*models[i], xs[i], LENGTHS), atol=2e-6)
    f = lambda p, x: run(p, models[0][1], x, True, LENGTHS)[1]  # noqa: E731
    tangents = jax.tree.map(lambda v: jnp.asarray(rng.standard_normal(v.shape), v.dtype), (models[0][0], XS))
    forward = jax.jit(lambda *t: jax.jvp(f, (models[0][0], XS), t)[1])(*tangents)
    back = jax.jit(lambda g: jax.vjp(f, models[0][0], XS)[1](g))(G)
    inner = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(tangents), strict=True))
    np.testing.assert_allclose(jnp.vdot(forward, G), inner, rtol=2e-5)


def test_extreme_input_gives_finite_output_and_gradients():
    """Constant inputs and inputs at the ends of float32, and sequences that end: outputs, states, gradients."""
    params, state = model()
    constants = (np.zeros_like(XS), np.full_like(XS, 7e4), np.full_like(XS, -1e15))
    for xs in (*constants, XS * np.float32(1e-30), XS * np.float32(1e15)):
        assert all(np.all(np.isfinite(v)) for v in jax.tree.leaves(GRADIENT(params, state, xs)))
    broken = XS.copy()
    broken[1, 2] = np.nan
    _, (_, ys, after) = GRADIENT(params, state, broken)
    assert np.all(np.isnan(ys[1, 2]))
    assert all(np.all(np.isfinite(v)) for v in jax.tree.leaves(after))


@pytest.mark.slow
def test_the_backward_pass_keeps_no_state():
    """The bytes kept grow with steps and sequences, not with the rows of statistics."""
    kept = []
    for steps in (ROWS, 64 * ROWS):
        params, state = model(steps=steps)
        back = jax.vjp(lambda p, x, s=state: run(p, s, x)[1], params, XS)[1]
        kept.append(sum(leaf.nbytes for leaf in jax.tree.leaves(back)))
    assert kept[0] == kept[1]
