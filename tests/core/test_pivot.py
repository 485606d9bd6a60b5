"""The pivot of the sums loses nothing: rows in any order, a running mean of any age, the form for GPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jaxbn

# mean / std of the four features: from easy to where float32 resolves a sixteenth of a standard deviation.
RATIOS = np.array([0.0, 1e2, 1e4, 1e6])
IMAGES = (4, 5, 28, len(RATIOS))


def arranged(kind: str, rows: int) -> np.ndarray:
    """Rows in an order that misleads whoever looks at some of them."""
    deviations, i = np.random.default_rng(rows).standard_normal((rows, len(RATIOS))), np.arange(rows)[:, None]
    if kind == "sorted":
        return np.sort(deviations, axis=0)
    far = {"first": i < rows // 64, "last": i >= rows - rows // 64, "most": i > 0}
    far |= {f"every {k}th": i % k == 0 for k in (2, 3, 16, 32)}
    return deviations + 300 * far[kind]


@pytest.fixture(scope="module")
def forms():
    """Return the layer and its pullback: at a fresh running mean, at one that is 0.9 std off, and as on a GPU."""

    params, start = jaxbn.bn_init(len(RATIOS))

    def step(mean, x, dy):
        state = start._replace(mean=mean)
        y, pull, new = jax.vjp(lambda x: jaxbn.bn_apply(params, state, x, True, momentum=0.0), x, has_aux=True)
        return y, pull(dy)[0], new.var

    default = jax.jit(step)
    jax.clear_caches()  # traced before, or after, the platform is another
    with pytest.MonkeyPatch.context() as patch:  # the form of a GPU, computed here
        patch.setattr(
            jax.lax, "platform_dependent", lambda *args, default, cuda=None, **others: (cuda or default)(*args)
        )
        arrays = [np.zeros(shape, np.float32) for shape in ((999, len(RATIOS)), (4096, len(RATIOS)), IMAGES)]
        compiled = {x.shape: jax.jit(step).lower(start.mean, x, x).compile() for x in arrays}
    jax.clear_caches()

    def on_gpu(mean, x, dy):
        return compiled[x.shape](mean, x, dy)

    return {"fresh": (default, 0.0), "old": (default, 0.9), "gpu": (on_gpu, 0.0)}


@pytest.mark.parametrize("rows", [999, 4096])
@pytest.mark.parametrize(
    "kind", ["first", "last", "most", "sorted", "every 2th", "every 3th", "every 16th", "every 32th"]
)
@pytest.mark.parametrize("form", ["fresh", "old", "gpu"])
def test_any_order_of_the_rows(forms, form, kind, rows):
    """The pivot may be far off, or the part of x that it is the mean of no fair sample: nothing is lost."""
    step, off = forms[form]
    x = (arranged(kind, rows) + RATIOS).astype(np.float32)
    exact = oracle.training(x)
    mean = jnp.asarray(exact.mean + off * np.sqrt(exact.var) if off else np.zeros(len(RATIOS)), jnp.float32)
    dy = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    y, dx, var = (np.asarray(v, np.float64) for v in step(mean, x, dy))
    # Of outputs up to 64, where float32 has steps of 4e-6.
    assert np.max(np.abs(y - exact.y) / np.maximum(np.abs(exact.y), 1)) <= 2e-6
    np.testing.assert_allclose(var, exact.var, rtol=1e-6)
    wanted = oracle.gradients(x, dy)[0]
    assert np.max(np.abs(dx - wanted)) <= 5e-6 * np.max(np.abs(wanted))


@pytest.mark.parametrize("offset", [5, 30, 300])
@pytest.mark.parametrize(("first", "limit"), [(0, 2e-6), (7, 5e-5)])
def test_columns_of_images_at_the_period_of_the_part(forms, first, limit, offset):
    """The pivot of a GPU is the mean of columns 7 and 21 of 28: a pattern of just these columns costs digits."""
    deviations = np.random.default_rng(first).standard_normal(IMAGES)
    x = (deviations + RATIOS + offset * (np.arange(28) % 14 == first)[:, None]).astype(np.float32)
    exact = oracle.training(x)
    for (step, _), bound in ((forms["gpu"], limit), (forms["fresh"], 2e-6)):
        y, _, var = (np.asarray(v, np.float64) for v in step(np.zeros(len(RATIOS), np.float32), x, x))
        assert np.max(np.abs(y - exact.y) / np.maximum(np.abs(exact.y), 1)) <= bound
        np.testing.assert_allclose(var, exact.var, rtol=bound)


@pytest.mark.parametrize(("dtype", "epsilon"), [("float32", 1e-22), ("float64", 1e-66)])
def test_a_constant_beside_the_running_mean_keeps_its_bias(dtype, epsilon):
    """No second pass is made there: an epsilon that is no smaller covers the digits of the mean that cancel."""
    with jax.enable_x64(dtype == "float64"):
        params, state = jaxbn.bn_init(1, dtype=jnp.dtype(dtype))
        params = params._replace(bias=jnp.ones(1, dtype))
        values = jnp.geomspace(1e-16, 1e-2, 700, dtype=dtype)[:, None, None]
        y = jax.jit(jax.vmap(lambda x: jaxbn.bn_apply(params, state, x, True, epsilon=epsilon)[0]))(values)
    np.testing.assert_allclose(y, np.ones((700, 1, 1)), rtol=2e-6)


def test_a_running_mean_that_is_a_constant_of_the_program():
    """XLA folds `(c + v) - c` to v, which would lose what rounding took from the mean."""
    x = np.float32([[0.245], [-1.254], [2.805], [0.32]]) + np.float32(1e4)
    params, state = jaxbn.bn_init(1)
    state = state._replace(mean=jnp.full(1, 1e4 + 0.557, jnp.float32))
    y = jax.jit(lambda x: jaxbn.bn_apply(params, state, x, True)[0])(x)
    np.testing.assert_allclose(y, oracle.training(x).y, rtol=0, atol=2e-6)


@pytest.mark.compiler
def test_members_of_vmap_share_the_second_pass():
    """One is far from its running mean, and all take a second pass: in a loop still, not in all steps."""
    x = np.stack([arranged("sorted", 999) + offset for offset in (0.0, 1e5, 0.5)]).astype(np.float32)
    params, state = jaxbn.bn_init(len(RATIOS))

    def layer(x):
        return jaxbn.bn_apply(params, state, x, True)[0]

    mapped = jax.jit(jax.vmap(layer)).lower(x).compile()
    assert " while(" in mapped.as_text()
    for y, member in zip(mapped(x), x, strict=True):
        np.testing.assert_allclose(y, oracle.training(member).y, atol=2e-6)


@pytest.mark.parametrize(("std", "epsilon"), [(1e-6, 1e-12), (1e-7, 1e-14), (1e-7, 1e-20)])
def test_a_small_epsilon_shows_no_running_mean(std, epsilon):
    """Next to the running mean 0 the square of the batch's mean is far above epsilon: its digits must not be lost."""
    x = (3e-4 + std * np.random.default_rng(0).standard_normal((256, 2))).astype(np.float32)
    y, _ = jaxbn.bn_apply(*jaxbn.bn_init(2), x, True, epsilon=epsilon)
    exact = x.astype(np.float64) - x.mean(0, dtype=np.float64)
    exact /= np.sqrt((exact**2).mean(0) + epsilon)
    np.testing.assert_allclose(y, exact, atol=2e-6)  # some roundings of numbers up to 4
