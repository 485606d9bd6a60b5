"""Faults that were found from outside, each with its whole kind, in the functions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from params import named, pairs
from programs import count_collectives
from ways import AXIS, mesh_of

import jaxbn

PARAMS, STATE = jaxbn.bn_init(3)
RNG = np.random.default_rng(0)
X = RNG.normal(2, 3, (16, 3)).astype(np.float32)
MASK = np.arange(16)[:, None] % 3 > 0
HIDDEN = np.where(MASK, X, np.nan).astype(np.float32)


def in_half(state):
    return jax.tree.map(lambda v: v.astype(jnp.float16) if jnp.issubdtype(v.dtype, jnp.floating) else v, state)


def plain(state, x):
    return jaxbn.bn_apply(PARAMS, state, x, True, momentum=0.0)[1]


def by_domain(state, x):
    params, states = (jax.tree.map(lambda v: v[None], tree) for tree in (PARAMS, state))
    new = jaxbn.domains.domain_apply(params, states, x, True, 0, momentum=0.0)[1]
    return jax.tree.map(lambda v: v[0], new)


def in_parts(state, x):
    return jaxbn.bn_apply(PARAMS, state, x, True, momentum=0.0, ghost_batches=2)[1]


@pytest.mark.parametrize("layer", [plain, by_domain, in_parts])
@pytest.mark.parametrize("size", [1e3, 1e5])
def test_moments_beyond_the_state_dtype_are_not_stored(layer, size):
    """Finite moments, of which the variance, or the mean too, overflows in the dtype of the state."""
    x = X * np.array([1, 1, size], np.float32)
    state, new = in_half(STATE), layer(in_half(STATE), x)
    assert np.isfinite(np.asarray(jnp.stack(new[:2]))).all()
    assert new.mean[2] == state.mean[2]
    assert new.var[2] == state.var[2]
    np.testing.assert_allclose(new.mean[:2], x.mean(0)[:2], rtol=2e-3)


def test_whitening_stores_no_moments_beyond_the_state_dtype():
    params, state = jaxbn.whitening.whiten_init(3)
    new = jaxbn.whitening.whiten_apply(params, in_half(state), X * np.float32(1e3), True, momentum=0.0)[1]
    jax.tree.map(np.testing.assert_array_equal, new, in_half(state))


@jax.jit
def derive_complex(z, dy):
    y, pull = jax.vjp(lambda z: jaxbn.bn_apply(*jaxbn.bn_init(2, dtype=jnp.complex64), z, True)[0], z)
    return y, pull(dy)[0]


@pairs("ratio, std", named(0.0, 1e2, 1e6), named(1.0, 1e6, 1e13))
def test_complex_derivatives_are_exact(std, ratio):
    parts = RNG.normal(size=(2, 64, 2)) + ratio
    z = ((parts[0] + 1j * parts[1]) * std).astype(np.complex64)
    dy = (RNG.normal(size=z.shape) + 1j * RNG.normal(size=z.shape)).astype(np.complex64)
    y, dz = derive_complex(z, dy)
    # In pairs of real numbers: one variance of both, a mean each.
    wide, g = z.astype(np.complex128), dy.astype(np.complex128)
    d = wide - wide.mean(0)
    s = np.sqrt((np.abs(d) ** 2).mean(0) + 1e-5)
    np.testing.assert_allclose(y, d / s, atol=2e-6)
    # JAX's cotangent of a complex number is the conjugate of the pair's.
    g = g.conj()
    wanted = (g - g.mean(0) - d / s * (g * (d / s).conj()).real.mean(0)) / s
    got = np.asarray(dz).conj()
    assert np.max(np.abs(got - wanted)) <= 5e-6 * np.max(np.abs(wanted))


def test_complex_padding_is_the_mean():
    """Also where the mean is known to more digits than its dtype has."""
    params, state = jaxbn.bn_init(1, dtype=jnp.complex64)
    z = np.array([1e6 + 1, 1e6 + 2, np.nan, 1e6 + 4], np.complex64)[:, None]
    mask = np.array([True, True, False, True])[:, None]
    y, _ = jaxbn.bn_apply(params, state, z, True, mask=mask)
    assert y[2, 0] == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
@pytest.mark.parametrize("train", [False, "traced"])
def test_infinity_in_evaluation_stays_where_it_is(dtype, train):
    params, state = jaxbn.bn_init(3, dtype=dtype)
    x = jnp.asarray(X, dtype).at[2, 1].set(np.inf)
    flag = jnp.array(False) if train == "traced" else False

    @jax.jit
    def loss(x):
        y = jaxbn.bn_apply(params, state, x, flag)[0]
        return jnp.sum(jnp.abs(jnp.delete(y, 2, 0)))

    finite = np.isfinite(np.asarray(jax.grad(loss)(x)))
    finite[2, 1] = True
    assert finite.all()


LARGE = [((2, 2, 2, 32), (1, 2, 3, 4), jnp.float32), ((2, 2, 32), (1, 2, 3), jnp.complex64)]


@pytest.mark.parametrize(("features", "axis", "dtype"), LARGE)
def test_groups_of_many_feature_axes(features, axis, dtype):
    """Which crashed the process with JAX 0.10."""
    params, state = jaxbn.bn_init(features, dtype=dtype)
    x = jnp.asarray(RNG.normal(size=(5, 1, *features)), dtype)

    def layer(x):
        groups = [[0], [1, 2, 3, 4]]
        return jaxbn.bn_apply(params, state, x, True, axis=axis, axis_name="d", axis_index_groups=groups)[0]

    y = jax.vmap(layer, axis_name="d")(x)
    wanted = jaxbn.bn_apply(params, state, x[1:, 0], True, axis=axis)[0]
    np.testing.assert_allclose(y[1:, 0], wanted, atol=2e-6)
    np.testing.assert_array_equal(y[0], 0)


def test_moments_of_many_axes_in_groups():
    m = jaxbn.moments(RNG.normal(size=(5, 2, 2, 2, 2, 32)).astype(np.float32), axis=(0, 1, 2, 3, 4, 5))
    pooled = jax.vmap(lambda m: jaxbn.pool_named(m, "d", [[0], [1, 2, 3, 4]]), axis_name="d")(m)
    np.testing.assert_allclose(pooled.mean[1], np.mean(m.mean[1:], 0), rtol=1e-5, atol=1e-6)


def test_a_variance_beyond_the_dtype_is_shown():
    """100 values of std 5e18: each square is finite, their sum is not. NaN, and not 0; the state stays."""
    x = (RNG.normal(size=(100, 3)) * np.array([1, 5e18, 1])).astype(np.float32)
    y, new = jaxbn.bn_apply(PARAMS, STATE, x, True)
    assert np.isnan(y[:, 1]).all()
    assert np.isfinite(np.asarray(y)[:, [0, 2]]).all()
    assert (new.mean[1], new.var[1]) == (STATE.mean[1], STATE.var[1])
    below = (x / np.array([1, 10, 1])).astype(np.float32)
    np.testing.assert_allclose(jaxbn.bn_apply(PARAMS, STATE, below, True)[0], oracle.training(below).y, atol=2e-6)


@pytest.mark.parametrize("train", [True, False])
def test_masked_nan_passes_checks_for_nan(train):
    def loss(x):
        y = jaxbn.bn_apply(PARAMS, STATE, x, train, mask=MASK)[0]
        return jnp.sum(jnp.where(MASK, y**3, 0))

    hidden = jnp.asarray(HIDDEN)
    with jax.debug_nans(True):
        assert np.isfinite(jax.grad(loss)(hidden)).all()
        assert np.isfinite(jax.jit(jax.grad(loss))(hidden)).all()
    error, _ = checkify.checkify(jax.jit(loss), errors=checkify.float_checks)(HIDDEN)
    assert error.get() is None


def test_one_value_passes_checks_for_nan():
    layer = partial(jaxbn.bn_apply, PARAMS, STATE, train=True, unbiased_running_var=True)
    error, _ = checkify.checkify(layer, errors=checkify.float_checks)(x=X[:1])
    assert error.get() is None


@pytest.mark.parametrize("mean", [1e25, -1e30])
def test_running_means_whose_square_overflows_pass_checks_for_nan(mean):
    """The pass about such a mean is repeated; its infinities are no fault."""
    state = STATE._replace(mean=jnp.full(3, mean))
    layer = partial(jaxbn.bn_apply, PARAMS, state, train=True)
    error, (y, _) = checkify.checkify(layer, errors=checkify.float_checks)(x=X)
    assert error.get() is None
    np.testing.assert_allclose(y, oracle.training(X).y, atol=2e-6)


def test_an_axis_of_vmap_inside_shard_map_is_refused():
    def inner(x):
        return jax.vmap(lambda x: jaxbn.bn_apply(PARAMS, STATE, x, True, axis_name="v")[0], axis_name="v")(x)

    mapped = partial(jax.shard_map, inner, mesh=mesh_of(AxisType.Auto), in_specs=P(AXIS), out_specs=P(AXIS))
    with pytest.raises(ValueError, match="check_vma=False"):
        jax.jit(mapped(check_vma=True))(X.reshape(8, 2, 3))
    y = jax.jit(mapped(check_vma=False))(X.reshape(8, 2, 3))
    wanted = jnp.stack([jaxbn.bn_apply(PARAMS, STATE, x[:, None], True)[0][:, 0] for x in X.reshape(8, 2, 3)])
    assert y.shape == wanted.shape


def over_two_meshes(f, check_vma):
    """Map `f`, which runs on four devices, over two groups of devices."""
    mesh = mesh_of(AxisType.Auto, (2, 4), ("groups", AXIS))
    members = jax.shard_map(f, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=check_vma)
    return jax.jit(jax.vmap(members, spmd_axis_name="groups"))


def test_shard_map_runs_under_vmap_with_an_axis_of_the_mesh():
    def gradient(x):
        return jax.grad(lambda x: jnp.sum(jaxbn.bn_apply(PARAMS, STATE, x, True, axis_name=AXIS)[0] ** 3))(x)

    dx = over_two_meshes(gradient, check_vma=False)(X.reshape(2, 8, 3))
    for found, x in zip(dx, X.reshape(2, 8, 3), strict=True):
        y = oracle.training(x).y
        np.testing.assert_allclose(found, oracle.gradients(x, 3 * y**2)[0], atol=1e-5)


def test_jax_does_not_type_a_choice_by_platform_under_such_a_vmap():
    """The limit in `docs/devices.md`: no layer of ours, nor a constant; JAX alone."""

    def alone(x):
        return jax.lax.platform_dependent(x, default=lambda x: x + jnp.mean(x, 0, keepdims=True))

    assert over_two_meshes(alone, check_vma=False)(X.reshape(2, 8, 3)).shape == (2, 8, 3)
    with pytest.raises(ValueError, match="requires varying manual axes to match"):
        over_two_meshes(alone, check_vma=True)(X.reshape(2, 8, 3))


@pytest.mark.parametrize("activation", [np.tanh, jax.nn.glu, lambda y: y @ jnp.ones((7, 7)), lambda y: y.nothing])
def test_functions_that_are_no_activation_are_refused(activation):
    with pytest.raises((TypeError, ValueError), match="`activation` must be an elementwise function"):
        jaxbn.bn_apply(PARAMS, STATE, X, True, activation=activation)


@pytest.mark.parametrize("owner", ["params", "state"])
def test_a_restored_dict_is_named(owner):
    given = {"params": PARAMS, "state": STATE}
    given[owner] = given[owner]._asdict()
    with pytest.raises(TypeError, match=rf"\*\*{owner}"):
        jaxbn.bn_apply(given["params"], given["state"], X, True)


@pytest.mark.parametrize("shape", [(4,), (4, 4)])
def test_an_ambiguous_mask_is_refused(shape):
    params, state = jaxbn.bn_init(4)
    with pytest.raises(ValueError, match="`mask`"):
        jaxbn.bn_apply(params, state, np.ones((4, 4, 4), np.float32), True, mask=np.ones(shape, bool))


@pytest.mark.compiler
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_accumulation_over_a_sharded_batch_moves_nothing(kind):
    mesh = mesh_of(kind)
    x = RNG.normal(1, 2, (64, 3)).astype(np.float32)

    @jax.jit
    def accumulated(x):
        placed = {"out_sharding": P(AXIS)} if kind == AxisType.Explicit else {}
        micro = jnp.swapaxes(jnp.reshape(x, (16, 4, 3), **placed), 0, 1)
        states = jax.lax.map(lambda part: jaxbn.bn_apply(PARAMS, STATE, part, True)[1], micro)
        return jaxbn.pool_updates(states)

    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, jax.NamedSharding(mesh, P(AXIS)))
        assert set(count_collectives(accumulated.lower(sharded).compile().as_text())) == {"all-reduce"}
        got = accumulated(sharded)
    wanted = jaxbn.bn_apply(PARAMS, STATE, x, True)[1]
    np.testing.assert_allclose(got.mean, wanted.mean, atol=1e-6)
    np.testing.assert_allclose(got.var, wanted.var, rtol=1e-5)


def test_a_state_averaged_by_optax_goes_on():
    """`optax.incremental_update` makes the count a fraction: it counts on from there, in a scan too."""
    params, state = jaxbn.bn_init(3)
    x = np.arange(12.0, dtype=np.float32).reshape(4, 3)
    _, once = jaxbn.bn_apply(params, state, x, True)
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies the count by a float
        averaged = optax.incremental_update(once, state, 0.5)

    def step(state, _):
        return jaxbn.bn_apply(params, state, x, True, momentum=jaxbn.cumulative_average)[1], None

    last = jax.lax.scan(step, averaged, None, length=2)[0]
    np.testing.assert_allclose(last.count, 2.5)
    # count / (count + 1) of the old mean is kept: at 0.5, then at 1.5.
    kept = (0.5 / 1.5) * (1.5 / 2.5)
    np.testing.assert_allclose(last.mean, kept * averaged.mean + (1 - kept) * x.mean(0), rtol=1e-6)
