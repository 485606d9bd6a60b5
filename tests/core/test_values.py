"""The output and the first gradients, against the float64 reference, jitted and eager alike."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from params import named, pairs

import jaxbn
from jaxbn import BatchNormParams, BatchNormState

# mean / std of the four features of `data`: from easy to where float32 resolves a sixteenth of a standard deviation.
RATIOS = np.array([0.0, 1e2, 1e4, 1e6])


def train_plainly(x):
    """Training by a layer without parameters, as one compiled function."""
    params, state = jaxbn.bn_init(x.shape[-1], scale=None, bias=None)
    return jaxbn.bn_apply(params, state, x, True, momentum=0.0)


WAYS = [pytest.param(train_plainly, id="eager"), pytest.param(jax.jit(train_plainly), id="jit")]


@cache
def data(rows: int) -> tuple[np.ndarray, oracle.Forward]:
    """Float32 input of std 1 and means `RATIOS`, and what float64 makes of the very same numbers."""
    rng = np.random.default_rng(rows)
    x = (rng.normal(size=(rows, len(RATIOS))) + RATIOS).astype(np.float32)
    return x, oracle.training(x)


@pytest.mark.parametrize("rows", [64, 4096, 65536, 2**20])
@pytest.mark.parametrize("apply", WAYS)
def test_float32_output_is_exact(apply, rows):
    x, exact = data(rows)
    y, state = apply(x)
    # x_hat of 2^20 values reaches 5, where half a unit of the last place is 2.4e-7, and it has a few roundings.
    worst = np.max(np.abs(np.asarray(y, np.float64) - exact.y), axis=0)
    assert np.all(worst <= 2e-6), dict(zip(RATIOS, worst, strict=True))
    # What is kept is the float32 nearest to the mean, but for the rounding of an average that keeps none of the past.
    np.testing.assert_allclose(state.mean, exact.mean, rtol=2e-7, atol=1e-6)
    np.testing.assert_allclose(state.var, exact.var, rtol=2e-6)


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
        sizes = [np.zeros((2, rows, len(RATIOS)), np.float32) for rows in (999, 4096)]
        compiled = {len(x): jax.jit(step).lower(start.mean, x, dy).compile() for x, dy in sizes}
    jax.clear_caches()

    def on_gpu(mean, x, dy):
        return compiled[len(x)](mean, x, dy)

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


def test_a_running_mean_that_is_a_constant_of_the_program():
    """XLA folds `(c + v) - c` to v, which would lose what rounding took from the mean."""
    x = np.float32([[0.245], [-1.254], [2.805], [0.32]]) + np.float32(1e4)
    params, state = jaxbn.bn_init(1)
    state = state._replace(mean=jnp.full(1, 1e4 + 0.557, jnp.float32))
    y = jax.jit(lambda x: jaxbn.bn_apply(params, state, x, True)[0])(x)
    np.testing.assert_allclose(y, oracle.training(x).y, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [1e6, 1e10, 1e15, 1e18])
@pytest.mark.parametrize("complex_x", [False, True], ids=["real", "complex"])
def test_one_bad_batch_does_not_spoil_later_ones(size, complex_x):
    """It leaves a running mean so far off that one step of its own dtype is many std: a second pass is not enough."""
    x = np.random.default_rng(0).normal(2, 3, (100, 3)).astype(np.complex64 if complex_x else np.float32)
    apply = jax.jit(partial(jaxbn.bn_apply, train=True, momentum=0.9))
    params, state = jaxbn.bn_init(3, dtype=x.dtype)
    _, state = apply(params, state, x * np.float32([size, 1, 0]))
    y, _ = apply(params, state, x * np.float32([1, 1, 0]))
    np.testing.assert_allclose(np.asarray(y)[:, :2], oracle.training(x.real[:, :2]).y, atol=2e-6)
    np.testing.assert_array_equal(np.asarray(y)[:, 2], 0)


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


def test_the_running_mean_has_no_gradient_in_training():
    params, state = jaxbn.bn_init(len(RATIOS))
    x, _ = data(64)

    def loss(mean, train):
        return jnp.sum(jnp.sin(jaxbn.bn_apply(params, state._replace(mean=mean), x, train)[0]))

    for train in (True, jnp.array(True)):
        np.testing.assert_array_equal(jax.grad(loss)(state.mean, train), np.zeros(len(RATIOS)))
    assert np.any(jax.grad(loss)(state.mean, jnp.array(False)) != 0)


@pytest.mark.parametrize("rows", [64, 65536])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_float32_output_is_exact_with_a_mask(jit, rows):
    x, _ = data(rows)
    mask = np.random.default_rng(1).random((rows, 1)) < 0.7
    exact = oracle.training(x, mask=mask)
    apply = partial(jaxbn.bn_apply, *jaxbn.bn_init(len(RATIOS)), train=True)
    y, _ = (jax.jit(apply) if jit else apply)(x=x, mask=mask)
    assert np.max(np.abs(np.asarray(y, np.float64) - exact.y)) <= 2e-6


def test_float32_output_is_exact_channels_first():
    x, exact = data(4096)
    first = np.moveaxis(x.reshape(16, 16, 16, len(RATIOS)), -1, 1)
    y, _ = jaxbn.bn_apply(*jaxbn.bn_init(len(RATIOS)), first, True, axis=1)
    assert np.max(np.abs(np.moveaxis(np.asarray(y, np.float64), 1, -1).reshape(x.shape) - exact.y)) <= 2e-6


@pytest.mark.parametrize("rows", [64, 4096, 65536])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_float32_gradients_are_exact_at_a_mean_of_100(jit, rows):
    rng = np.random.default_rng(7)
    x = (rng.normal(size=(rows, 3)) + 100).astype(np.float32)
    # A cotangent with a mean, so that dbias and dscale are sums of some size and not of pure rounding.
    dy = (rng.normal(size=x.shape) + 0.5 + 0.1 * x - 10).astype(np.float32)
    params, state = jaxbn.bn_init(3, scale=np.array([0.5, 1.0, 2.0]), bias=0.1)

    def pulled(params, x, dy):
        _, pull, _ = jax.vjp(lambda p, x: jaxbn.bn_apply(p, state, x, True), params, x, has_aux=True)
        return pull(dy)

    (ours, dx) = (jax.jit(pulled) if jit else pulled)(params, x, dy)
    exact = oracle.gradients(x, dy, params.scale)
    for name, got, want in zip(("dx", "dscale", "dbias"), (dx, ours.scale, ours.bias), exact, strict=True):
        error = np.max(np.abs(np.asarray(got, np.float64) - want)) / np.max(np.abs(want))
        assert error <= 5e-6, (name, error)


@pairs(
    "dtype, train, jit",
    named(jnp.bfloat16, jnp.float16, jnp.float32),
    named(True, False, "traced"),
    {"eager": False, "jit": True},
)
def test_dtypes(dtype, jit, train):
    x = jnp.asarray(np.random.default_rng(2).normal(3, 2, (128, 3)), dtype)
    params, state = jaxbn.bn_init(3, dtype=dtype, scale=1.5, bias=-0.25)
    assert params.scale is not None
    assert (params.scale.dtype, state.mean.dtype) == (dtype, jnp.float32)
    flag = jnp.array(False) if train == "traced" else train

    def apply(params, state, x):
        return jaxbn.bn_apply(params, state, x, flag, momentum=0.5)

    y, new = (jax.jit(apply) if jit else apply)(params, state, x)
    assert (y.dtype, new.mean.dtype, new.var.dtype, new.count.dtype) == (dtype, jnp.float32, jnp.float32, jnp.int32)
    batch = oracle.training(x, params.scale, params.bias)
    exact = batch.y if train is True else oracle.evaluation(x, state.mean, state.var, params.scale, params.bias)
    # Everything before the last rounding is float32: the output is the nearest of its dtype, or its neighbour.
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=float(jnp.finfo(dtype).eps), atol=2e-6)
    if train is True:
        np.testing.assert_allclose(new.mean, 0.5 * batch.mean, rtol=1e-6)
        np.testing.assert_allclose(new.var, 0.5 + 0.5 * batch.var, rtol=1e-6)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        x = np.random.default_rng(3).normal(1e6, 1, (64, 3))
        params, state = jaxbn.bn_init(3, dtype=jnp.float64)
        y, new = jaxbn.bn_apply(params, state, x, True)
        exact = oracle.training(x)
        assert {a.dtype for a in (y, params.scale, params.bias, new.mean, new.var)} == {np.dtype(np.float64)}
        np.testing.assert_allclose(y, exact.y, atol=1e-9)
        np.testing.assert_allclose(new.mean, 0.01 * exact.mean, rtol=1e-14)
        # A float32 state of a float64 input stays float32, for its shape and dtype must not change.
        _, new = jaxbn.bn_apply(params, jaxbn.bn_init(3)[1], x, True)
        assert new.mean.dtype == new.var.dtype == np.float32


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_statistics_beyond_float16_survive_evaluation(jit):
    # Squares of deviations of 300 exceed the largest float16, 65504; a mean of 1e4 leaves float16 steps of 8.
    rng = np.random.default_rng(4)
    x = jnp.asarray(np.stack([rng.normal(1e4, 64, 512), rng.normal(0, 300, 512)], axis=1), jnp.float16)
    exact = oracle.training(x)
    assert exact.var[1] > np.finfo(np.float16).max

    def apply(state, x, train):
        return jaxbn.bn_apply(jaxbn.bn_init(2)[0], state, x, train, momentum=0.0)

    apply = jax.jit(apply, static_argnums=2) if jit else apply
    y, state = apply(jaxbn.bn_init(2)[1], x, True)
    evaluated, _ = apply(state, x, False)
    for got in (y, evaluated):
        assert got.dtype == jnp.float16
        np.testing.assert_allclose(np.asarray(got, np.float64), exact.y, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(state.mean, exact.mean, rtol=1e-6, atol=1e-4)
    np.testing.assert_allclose(state.var, exact.var, rtol=1e-6)


def test_jitted_and_eager_agree_to_the_last_bit():
    """The sums are the same program; after them a compiler may fuse a product and a sum into one rounding."""
    x, _ = data(4096)
    (y, state), (jitted, jitted_state) = train_plainly(x), jax.jit(train_plainly)(x)
    np.testing.assert_allclose(y, jitted, rtol=2.5e-7, atol=2.5e-7)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2.5e-7), state, jitted_state)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    mean=st.floats(-1e6, 1e6),
    std=st.floats(1e-3, 1e3),
    scale=st.floats(-4, 4, width=32),
    train=st.booleans(),
)
def test_any_data_is_normalized_to_rounding(seed, mean, std, scale, train):
    """One shape, so that one program serves all examples."""
    x = np.random.default_rng(seed).normal(mean, std, (32, 2)).astype(np.float32)
    exact = oracle.training(x)
    params = BatchNormParams(jnp.full(2, scale, jnp.float32), jnp.full(2, 0.5, jnp.float32))
    state = BatchNormState(
        jnp.asarray(exact.mean, jnp.float32), jnp.asarray(exact.var, jnp.float32), jnp.zeros((), jnp.int32)
    )
    y, _ = jaxbn.bn_apply(params, state, x, train)
    if train:
        want = oracle.training(x, params.scale, params.bias).y
    else:
        want = oracle.evaluation(x, state.mean, state.var, params.scale, params.bias)
    # |x_hat| of 32 values is below sqrt(31); a handful of roundings of it, times the gain.
    np.testing.assert_allclose(np.asarray(y, np.float64), want, rtol=0, atol=2e-6 * max(1.0, abs(scale)))


@pytest.mark.parametrize("axis", [(1, 3), (3, 1), (-1, 1), (2, 0, 3), (0,), 2, ()])
def test_feature_axes_in_any_order(axis):
    """Parameters and state have one axis for each of `axis`, in its order; `()` is one for the whole array."""
    x = np.random.default_rng(5).normal(2, 3, (4, 3, 2, 5)).astype(np.float32)
    shape = oracle.feature_shape(x, axis)
    rng = np.random.default_rng(6)
    scale, bias = rng.normal(1, 0.3, (2, *shape)).astype(np.float32)
    params, state = jaxbn.bn_init(shape, scale=scale, bias=bias)
    apply = jax.jit(partial(jaxbn.bn_apply, axis=axis, momentum=0.0), static_argnums=3)
    y, new = apply(params, state, x, True)
    exact = oracle.training(x, scale, bias, axis=axis)
    np.testing.assert_allclose(y, exact.y, atol=4e-6)
    np.testing.assert_allclose(new.mean, exact.mean, rtol=1e-5, atol=1e-6)
    evaluated, _ = apply(params, new, x, False)
    np.testing.assert_allclose(evaluated, exact.y, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (6, 1, 1), (1, 4, 1), (1, 1, 3), (6, 1, 3), (4, 3), (6, 4, 3)])
def test_mask_of_every_broadcastable_shape(shape):
    """Also one that differs between features, or that hides one altogether."""
    x = np.random.default_rng(7).normal(2, 3, (6, 4, 3)).astype(np.float32)
    mask = np.random.default_rng(8).random(shape) < 0.6 if np.prod(shape) > 1 else np.ones(shape, bool)
    exact = oracle.training(x, mask=mask)
    y, new = jax.jit(lambda x: jaxbn.bn_apply(*jaxbn.bn_init(3), x, True, mask=mask, momentum=0.0))(x)
    present = exact.count > 0
    np.testing.assert_allclose(y[..., present], exact.y[..., present], atol=4e-6)
    np.testing.assert_allclose(new.mean, np.where(present, exact.mean, 0), rtol=1e-5)
    np.testing.assert_allclose(new.var, np.where(present, exact.var, 1), rtol=1e-5)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize(
    ("momentum", "keep"),
    [
        (0.9, lambda t: 0.9),
        (jaxbn.cumulative_average, lambda t: t / (t + 1)),
        (jaxbn.zero_debiased(0.9), lambda t: 0.9 * (1 - 0.9**t) / (1 - 0.9 ** (t + 1))),
        (lambda count: 1 / (count.astype(float) + 2), lambda t: 1 / (t + 2)),
    ],
    ids=["constant", "cumulative", "debiased", "own"],
)
def test_running_statistics(momentum, keep, unbiased):
    """Over batches of several sizes, from initial values that are not the default ones."""
    start = np.array([3.0, -1.0], np.float32)
    params, state = jaxbn.bn_init(2, mean=start, var=start**2)
    batches = [np.random.default_rng(t).normal(t, 1 + t, (4 + t % 2, 2)).astype(np.float32) for t in range(5)]
    for x in batches:
        _, state = jaxbn.bn_apply(params, state, x, True, momentum=momentum, unbiased_running_var=unbiased)
    exact = [oracle.training(x) for x in batches]
    kept = [keep(t) for t in range(len(batches))]
    assert state.count == len(batches)
    np.testing.assert_allclose(state.mean, oracle.running(start, [b.mean for b in exact], kept), rtol=1e-5)
    var = [b.var * (b.count / (b.count - 1) if unbiased else 1) for b in exact]
    np.testing.assert_allclose(state.var, oracle.running(start**2, var, kept), rtol=1e-5)
