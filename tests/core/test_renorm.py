"""Batch renormalization: its two limits, the formula between them, and its gradients against float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ways import assert_close, each_way

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn import BatchNormParams, BatchNormState, Renorm

ROWS, FEATURES, EPSILON = 16, 3, 1e-5
rng = np.random.default_rng(0)
X = (rng.standard_normal((ROWS, FEATURES)) * [0.5, 2, 8] + [0, 3, -5]).astype(np.float32)
G = rng.standard_normal(X.shape).astype(np.float32)
PARAMS = BatchNormParams(jnp.array([1.0, -2.0, 0.5]), jnp.array([0.0, 1.0, 2.0]))
STATE = BatchNormState(jnp.array([0.3, 1.0, -4.0]), jnp.array([0.5, 4.0, 9.0]), jnp.array(7, jnp.int32))
FREE, CLOSED = Renorm(np.inf, np.inf), Renorm(1.0, 0.0)


def loss(params, x, renorm, **options):
    y, state = jaxbn.bn_apply(params, STATE, x, True, renorm=renorm, **options)
    return jnp.sum(y * G), (y, state)


GRADIENT = jax.grad(loss, argnums=(0, 1), has_aux=True)


def exact(x, r_max, d_max):
    """Output, r and d in float64, from the definition."""
    x = x.astype(np.float64)
    std, running = np.sqrt(x.var(0) + EPSILON), np.sqrt(np.asarray(STATE.var, np.float64) + EPSILON)
    r = np.clip(std / running, 1 / r_max, r_max)
    d = np.clip((x.mean(0) - np.asarray(STATE.mean, np.float64)) / running, -d_max, d_max)
    scale, bias = (np.asarray(v, np.float64) for v in PARAMS)
    return ((x - x.mean(0)) / std * r + d) * scale + bias, r, d


@pytest.mark.parametrize("bounds", [(1.0, 0.0), (1.2, 0.1), (3.0, 5.0), (np.inf, np.inf)])
def test_formula_and_gradient(bounds):
    """The gradient is that of the output with r and d held constant, by central differences in float64."""
    (d_params, dx), (y, _) = jax.jit(GRADIENT, static_argnums=2)(PARAMS, X, Renorm(*bounds))
    wanted, r, d = exact(X, *bounds)
    # Values of size 10, and sums of 16 of them.
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    scale = np.asarray(PARAMS.scale, np.float64)

    def held(x):
        unit = (x - x.mean(0)) / np.sqrt(x.var(0) + EPSILON)
        return np.sum((unit * r + d) * scale * G)

    wide = X.astype(np.float64)
    unit = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + EPSILON)
    np.testing.assert_allclose(d_params.scale, np.sum(G * (unit * r + d), 0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(d_params.bias, np.sum(G, 0), rtol=1e-5, atol=1e-5)
    for at in [(0, 0), (5, 1), (11, 2)]:
        step = np.zeros(X.shape)
        step[at] = 1e-5
        slope = (held(wide + step) - held(wide - step)) / 2e-5
        np.testing.assert_allclose(dx[at], slope, rtol=1e-4, atol=1e-5)


def test_closed_limits_are_batch_normalization():
    """Values and gradients agree; and the state is updated the same under any limits."""
    plain = GRADIENT(PARAMS, X, None)
    assert_close(GRADIENT(PARAMS, X, CLOSED), plain, atol=2e-5)
    assert_close(GRADIENT(PARAMS, X, FREE)[1][1], plain[1][1], atol=1e-6)


def test_open_limits_give_the_output_of_evaluation():
    (_, dx), (y, _) = GRADIENT(PARAMS, X, FREE)
    np.testing.assert_allclose(y, jaxbn.bn_apply(PARAMS, STATE, X, False)[0], rtol=1e-5, atol=1e-5)
    # But not its gradient: the same shift of all rows moves the batch's mean along, and nothing else.
    np.testing.assert_allclose(np.sum(dx, 0), 0, atol=1e-5)


def test_without_parameters():
    params = BatchNormParams(None, None)
    y, _ = jaxbn.bn_apply(params, STATE, X, True, renorm=FREE)
    np.testing.assert_allclose(y, jaxbn.bn_apply(params, STATE, X, False)[0], rtol=1e-5, atol=1e-5)


def test_evaluation_and_a_traced_flag():
    def apply(flag):
        return jaxbn.bn_apply(PARAMS, STATE, X, flag, renorm=Renorm())

    chex.assert_trees_all_equal(apply(False), jaxbn.bn_apply(PARAMS, STATE, X, False))
    both = jax.jit(chex.assert_max_traces(apply, n=1))
    for flag in (True, False):
        assert_close(both(jnp.array(flag)), apply(flag), atol=1e-5)


def test_schedules_of_the_count():
    warmup = jaxbn.renorm_warmup(3.0, 5.0, start=10, r_end=30, d_end=20)
    for count, wanted in ((0, (1, 0)), (10, (1, 0)), (15, (1.5, 2.5)), (20, (2, 5)), (30, (3, 5)), (10**6, (3, 5))):
        assert (float(warmup.r_max(count)), float(warmup.d_max(count))) == pytest.approx(wanted)
    closed = jaxbn.bn_apply(PARAMS, STATE._replace(count=jnp.array(3)), X, True, renorm=warmup)
    assert_close(closed[0], jaxbn.bn_apply(PARAMS, STATE, X, True)[0], atol=2e-5)
    opened = jaxbn.bn_apply(PARAMS, STATE._replace(count=jnp.array(50)), X, True, renorm=warmup)
    assert_close(opened[0], jaxbn.bn_apply(PARAMS, STATE, X, True, renorm=Renorm(3.0, 5.0))[0], atol=1e-6)
    step = jax.jit(chex.assert_max_traces(lambda s: jaxbn.bn_apply(PARAMS, s, X, True, renorm=warmup)[1], n=1))
    state = STATE
    for _ in range(3):
        state = step(state)
    assert state.count == STATE.count + 3


def test_the_default_schedule_is_the_published_one():
    """Ioffe 2017: batch normalization for 5,000 steps, then to r_max = 3 at 40,000 and d_max = 5 at 25,000."""
    warmup = jaxbn.renorm_warmup()
    published = {0: (1, 0), 5_000: (1, 0), 25_000: (1 + 2 * 20 / 35, 5), 40_000: (3, 5), 10**6: (3, 5)}
    for count, wanted in published.items():
        assert (float(warmup.r_max(count)), float(warmup.d_max(count))) == pytest.approx(wanted)
    for count in (5_350, 24_800, 39_650):  # not a step earlier, nor later
        assert 1 < warmup.r_max(count) < 3
        assert 0 < warmup.d_max(count) < 5 or count > 25_000
    assert Renorm() == (3.0, 5.0)


@each_way
def test_on_many_devices(way):
    """Unequal masks over NaN give the results of one device."""
    x = rng.standard_normal((32, FEATURES)).astype(np.float32) * 3
    mask = np.ones((32, 1), bool)
    mask[3:5], mask[31] = False, False
    x = np.where(mask, x, np.nan).astype(np.float32)

    def member(whole, pieces, name=way.axis_name):
        def value(params, x):
            y, new = jaxbn.bn_apply(
                params, STATE, x, True, mask=pieces["mask"], axis_name=name, renorm=Renorm(1.5, 0.5)
            )
            return jnp.sum(jnp.where(pieces["mask"], jnp.sin(y), 0)), (y, new)

        gradient = jax.grad(value, argnums=(0, 1), has_aux=True)
        (d_params, dx), (y, new) = gradient(whole["params"], pieces["x"])
        return {"y": y, "dx": dx}, (new, way.total(d_params) if name else d_params)

    got = way.run(member, {"params": PARAMS}, {"x": x, "mask": mask})
    wanted = jax.jit(lambda w, p: member(w, p, None))({"params": PARAMS}, {"x": x, "mask": mask})
    assert_close(got, wanted)
    chex.assert_tree_all_finite(got)


def test_with_ghost_batches_each_part_is_corrected():
    y, _ = jaxbn.bn_apply(PARAMS, STATE, X, True, renorm=FREE, ghost_batches=4)
    np.testing.assert_allclose(y, jaxbn.bn_apply(PARAMS, STATE, X, False)[0], rtol=1e-5, atol=1e-5)


def test_nothing_to_normalize():
    """All masked: finite, no update, and the output of a plain layer."""
    options = {"mask": np.zeros((ROWS, 1), bool)}
    (d_params, dx), (y, state) = GRADIENT(PARAMS, np.full_like(X, 3e38), Renorm(), **options)
    chex.assert_tree_all_finite((d_params, dx, y))
    chex.assert_trees_all_equal(state, STATE)
    np.testing.assert_array_equal(y, np.broadcast_to(PARAMS.bias, X.shape))


def test_both_modules():
    """A schedule gives them a count; training through them is training through the function."""
    warmup = jaxbn.renorm_warmup(start=1, r_end=3, d_end=2)
    layer = jaxbn.linen.BatchNorm(use_running_average=False, momentum=0.9, renorm=warmup)
    variables = layer.init(jax.random.key(0), X)
    stateful = jaxbn.nnx.BatchNorm(FEATURES, momentum=0.9, renorm=warmup, rngs=nnx.Rngs(0))
    params, state = jaxbn.bn_init(FEATURES)
    for i in range(4):
        x = X + np.float32(i)
        y, new = layer.apply(variables, x, mutable=["batch_stats"])
        variables = {**variables, **new}
        wanted, state = jaxbn.bn_apply(params, state, x, True, momentum=0.9, renorm=warmup)
        assert_close((y, stateful(x)), (wanted, wanted), atol=1e-6)
        assert int(variables["batch_stats"]["count"]) == int(stateful.count[...]) == int(state.count) == i + 1
    plain = jaxbn.linen.BatchNorm(use_running_average=False, renorm=Renorm()).init(jax.random.key(0), X)
    assert "count" not in plain["batch_stats"]
    with pytest.raises(ValueError, match="renorm"):
        jaxbn.nnx.convert(stateful, nnx.BatchNorm)


@pytest.mark.parametrize(
    ("renorm", "kind", "words"),
    [
        (Renorm(r_max=0.5), ValueError, "r_max.*at least 1"),
        (Renorm(d_max=-1.0), ValueError, "d_max.*at least 0"),
        (Renorm(r_max=np.nan), ValueError, "r_max"),
        (Renorm(r_max=jnp.ones(3)), TypeError, "r_max"),
        (Renorm(r_max=None), TypeError, "r_max"),
        ((3.0, 5.0), TypeError, "jaxbn.Renorm"),
        (True, TypeError, "jaxbn.Renorm"),
    ],
)
def test_refused(renorm, kind, words):
    with pytest.raises(kind, match=words):
        jaxbn.bn_apply(PARAMS, STATE, X, True, renorm=renorm)


@pytest.mark.parametrize("change", [{"r_max": 0.9}, {"d_max": -1}, {"start": 40000}, {"start": -1}, {"d_end": 10}])
def test_warmup_refuses(change):
    with pytest.raises(ValueError, match="must be"):
        jaxbn.renorm_warmup(**change)


def test_complex_input_is_refused():
    params, state = jaxbn.bn_init(FEATURES, dtype=jnp.complex64)
    with pytest.raises(TypeError, match="complex64"):
        jaxbn.bn_apply(params, state, X.astype(np.complex64), True, renorm=Renorm())
