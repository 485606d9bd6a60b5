"""Test each unusual input that once broke the layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn
import jaxbn.linen
import jaxbn.nnx

X = np.random.default_rng(0).normal(1, 2, (8, 3)).astype(np.float32)
PARAMS, STATE = jaxbn.bn_init(3, scale=np.array([1.0, -2.0, 0.5], np.float32), bias=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False])
def test_padding_that_is_read_as_the_mean_has_that_derivative(train):
    """Its output is the bias for any other values, also for a loss that looks at it."""
    with jax.enable_x64(True):
        params, state = jax.tree.map(lambda v: v.astype(jnp.float64), (PARAMS, STATE._replace(count=jnp.zeros(()))))
        state = state._replace(count=jnp.zeros((), jnp.int32))
        mask = jnp.arange(8)[:, None] < 6
        x = jnp.where(mask, jnp.asarray(X, jnp.float64), jnp.nan)

        def ours(params, mean, x):
            return jnp.sum(jaxbn.bn_apply(params, state._replace(mean=mean), x, train, mask=mask)[0] ** 3)

        def plain(params, mean, x):
            x = jnp.where(mask, x, 0)
            m = jnp.sum(x, 0, keepdims=True) / 6 if train else mean[None]
            v = jnp.sum(jnp.where(mask, (x - m) ** 2, 0), 0, keepdims=True) / 6 if train else state.var[None]
            y = params.scale[None] * (x - m) / jnp.sqrt(v + 1e-5) + params.bias[None]
            return jnp.sum(jnp.where(mask, y, params.bias[None]) ** 3)

        arguments = params, state.mean + 0.3, x
        wanted = jax.grad(plain, (0, 1, 2))(*arguments)
        got = jax.grad(ours, (0, 1, 2))(*arguments)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-9)
        second = jax.jacfwd(jax.grad(ours, 2), 2)(*arguments)
        np.testing.assert_allclose(second, jax.jacfwd(jax.grad(plain, 2), 2)(*arguments), atol=1e-8)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_activations_that_close_over_arrays_on_many_devices(kind):
    """A traced slope and a constant, where arrays have a replication or a sharding in their type."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    constant = jnp.array([1.0, 2.0, 3.0])
    x = np.tile(X, (4, 1))

    def f(x, slope, name=None):
        return jaxbn.bn_apply(
            PARAMS, STATE, x, True, axis_name=name, activation=lambda y: jnp.where(y > 0, y, slope * y) * constant[None]
        )[0]

    wanted = f(x, 0.3)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, jax.NamedSharding(mesh, P("d")))
        np.testing.assert_allclose(jax.jit(f)(sharded, 0.3), wanted, atol=1e-5)
        spread = jax.shard_map(lambda x, a: f(x, a, "d"), mesh=mesh, in_specs=(P("d"), P()), out_specs=P("d"))
        np.testing.assert_allclose(jax.jit(spread)(sharded, 0.3), wanted, atol=1e-5)
        d_slope = jax.jit(jax.grad(lambda a, x: jnp.sum(spread(x, a))))(0.3, sharded)
    np.testing.assert_allclose(d_slope, jax.grad(lambda a: jnp.sum(f(x, a)))(0.3), rtol=1e-4)


def test_an_activation_that_reads_a_changing_number_is_seen():
    class Scaled:
        by = 1.0

        def __call__(self, y):
            return y * self.by

    scaled = Scaled()
    one = jaxbn.bn_apply(PARAMS, STATE, X, True, activation=scaled)[0]
    scaled.by = 2.0
    np.testing.assert_allclose(jaxbn.bn_apply(PARAMS, STATE, X, True, activation=scaled)[0], 2 * one, rtol=1e-6)
    f = jax.jit(lambda x: jaxbn.bn_apply(PARAMS, STATE, x, True, activation=scaled)[0])
    np.testing.assert_allclose(f(X), 2 * one, rtol=1e-6)


@pytest.mark.slow
def test_second_derivatives_at_zero_variance():
    with jax.enable_x64(True):
        x = jnp.ones((4, 1))
        ours = jax.hessian(lambda x: jaxbn.moments(x).var[0])(x)
        np.testing.assert_allclose(ours, jax.hessian(lambda x: jnp.var(x))(x), atol=1e-12)


def test_momentum_zero_replaces_statistics_that_are_not_finite():
    """momentum 0 and the first update of a debiased average copy the batch, over NaN too."""
    broken = STATE._replace(mean=jnp.full(3, jnp.nan), var=jnp.full(3, jnp.inf))
    for momentum in (0.0, jaxbn.zero_debiased(0.9), jaxbn.cumulative_average):
        new = jaxbn.bn_apply(PARAMS, broken, X, True, momentum=momentum)[1]
        np.testing.assert_allclose(new.mean, X.mean(0), rtol=1e-5)
        np.testing.assert_allclose(new.var, X.var(0), rtol=1e-5)


def test_export_with_a_symbolic_batch_and_a_mask():
    shape = jax.export.symbolic_shape("b, 3")
    x, mask = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct((shape[0], 1), bool)
    for train in (True, False):
        f = jax.jit(lambda x, m, t=train: jaxbn.bn_apply(PARAMS, STATE, x, t, mask=m)[0])
        half = np.arange(8)[:, None] < 4
        np.testing.assert_allclose(jax.export.export(f)(x, mask).call(X, half), f(X, half), atol=1e-5)


def micro(states):
    return jax.tree.map(lambda *v: jnp.stack(v), *states)


@pytest.mark.parametrize("momentum", [0.9, jaxbn.zero_debiased(0.9)])
def test_pool_updates_of_stacked_layers(momentum):
    """States `[microbatches, layers, features]` with a count for each layer, as `nn.scan` and `vmap` make them."""
    layers = jax.tree.map(lambda v: jnp.stack([v, v]), STATE)
    data = np.stack([X, 3 * X + 1])

    @jax.jit
    def update(x):
        return jax.vmap(lambda s, x: jaxbn.bn_apply(PARAMS, s, x, True, momentum=momentum)[1])(layers, x)

    pooled = jaxbn.pool_updates(micro([update(data[:, :4]), update(data[:, 4:])]), momentum)
    for got, wanted in zip(pooled, update(data), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-5)


@pytest.mark.slow
def test_pool_updates_of_complex_and_of_wide_states():
    z = (X + 1j * X[::-1]).astype(np.complex64)
    params, state = jaxbn.bn_init(3, dtype=jnp.complex64)
    states = micro([jaxbn.bn_apply(params, state, part, True)[1] for part in (z[:4], z[4:])])
    whole = jaxbn.bn_apply(params, state, z, True)[1]
    pooled = jaxbn.pool_updates(states)
    assert pooled.var.dtype == jnp.float32
    np.testing.assert_allclose(pooled.var, whole.var, rtol=1e-5)
    with jax.enable_x64(True):
        params, state = jaxbn.bn_init(3, dtype=jnp.float64)
        x = np.tile(X, (3, 1)).astype(np.float64)[:21]
        states = micro([jaxbn.bn_apply(params, state, part, True)[1] for part in np.split(x, 3)])
        whole = jaxbn.bn_apply(params, state, x, True)[1]
        np.testing.assert_allclose(jaxbn.pool_updates(states).var, whole.var, rtol=1e-12)


@pytest.mark.parametrize("one", [1, 1.0, np.float32(1), jnp.float32(1)])
def test_pool_updates_refuses_to_keep_all(one):
    with pytest.raises(ValueError, match=r"`momentum` must lie in \[0, 1\)"):
        jaxbn.pool_updates(micro([STATE, STATE]), one)


def test_pool_updates_takes_numbers_of_values_as_weights():
    states = micro([jaxbn.bn_apply(PARAMS, STATE, part, True)[1] for part in (X[:6], X[6:])])
    pooled = jaxbn.pool_updates(states, weights=[6, len(X) - 6])
    for got, wanted in zip(pooled, jaxbn.bn_apply(PARAMS, STATE, X, True)[1], strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-5)


def test_pool_updates_of_nothing_at_all_keeps_the_state():
    states = micro([STATE, STATE])
    for got, kept in zip(jaxbn.pool_updates(states, weights=np.zeros(2, np.float32)), STATE, strict=True):
        np.testing.assert_array_equal(got, kept)


def test_linen_counts_of_stacked_layers():
    stacked = {"batch_stats": {"bn": {"mean": np.zeros((2, 3)), "var": np.ones((2, 3))}}}
    counts = jaxbn.linen.convert(stacked, count=[5, 5])["batch_stats"]["bn"]["count"]  # type: ignore[arg-type]
    np.testing.assert_array_equal(counts, [5, 5])


def test_nnx_takes_numpy_bools_and_refuses_a_schedule_without_a_count():
    layer = jaxbn.nnx.BatchNorm(np.int64(3), rngs=nnx.Rngs(0))
    y = jax.jit(lambda x: layer(x, use_running_average=np.True_))(X)
    np.testing.assert_allclose(y, X, rtol=1e-4)
    layer.momentum = jaxbn.zero_debiased(0.9)
    with pytest.raises(ValueError, match=r"count of its updates.*convert"):
        layer(X)


apply = jaxbn.bn_apply
MISTAKES = [
    (lambda: apply(PARAMS, STATE, X, True, mask="yes"), TypeError, "`mask` must be an array of bools"),
    (lambda: apply(PARAMS, STATE, X, True, mask=[[True], [True, False]]), TypeError, "`mask` must be"),
    (lambda: apply(PARAMS, STATE, X, True, axis_name=3), ValueError, "`axis_name` must be bound.*3"),
    (lambda: apply(PARAMS, STATE, X, True, momentum="0.9"), TypeError, "`momentum` must be a number"),
    (
        lambda: apply(PARAMS, STATE, X, True, momentum=jnp.ones((4, 1))),
        ValueError,
        "`momentum` must be a scalar",
    ),
    (lambda: apply(PARAMS, STATE, X, True, epsilon="1e-5"), TypeError, "`epsilon` must be a Python float"),
    (lambda: apply(PARAMS, STATE, X, True, epsilon=1e-50), ValueError, "`epsilon` must be positive, 1.2e-38 at least"),
    (lambda: apply(PARAMS, STATE, X, True, unbiased_running_var=jnp.array(True)), TypeError, "True or False"),
    (lambda: apply(PARAMS, STATE, X, True, activation=lambda y: jax.lax.complex(y, y)), TypeError, "must be real"),
    (lambda: apply(PARAMS, STATE, X, True, activation=lambda y: (y,)), ValueError, "one array"),
    (lambda: apply(PARAMS, STATE, jax.ShapeDtypeStruct((8, 3), jnp.float32), True), TypeError, "`x` must be"),
    (
        lambda: apply(PARAMS._replace(scale=[1.0] * 3), STATE, X, True),
        TypeError,
        "`params.scale` must be an array",
    ),
    (lambda: apply(PARAMS, STATE._replace(count=None), X, True), TypeError, "`state.count` must be an array"),
    (
        lambda: apply(PARAMS._replace(scale=jnp.ones(3, jnp.complex64)), STATE, X, True),
        TypeError,
        "must be real for real",
    ),
    (lambda: jaxbn.bn_init(3, mean=None), TypeError, "`mean` must be a number"),  # type: ignore[arg-type]
    (lambda: jaxbn.bn_init(3, scale="a"), TypeError, "`scale` must be a number"),  # type: ignore[arg-type]
    (lambda: jaxbn.bn_init(3, scale=1j), TypeError, "`scale` must be real"),
    (lambda: jaxbn.bn_init(3, var=-1.0), ValueError, "`var` must not be negative"),
    (lambda: jaxbn.bn_init(3, dtype="foo"), TypeError, "`dtype` must be"),
    (lambda: jaxbn.zero_debiased("0.9"), ValueError, "`decay` must be a number"),  # type: ignore[arg-type]
    (lambda: jaxbn.pool(jaxbn.Moments(jnp.ones(2), jnp.ones((4, 3)), jnp.ones((4, 3)))), ValueError, "must broadcast"),
    (lambda: jaxbn.nnx.BatchNorm(3.0, rngs=nnx.Rngs(0)), TypeError, "`num_features` must be an int"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "kind", "words"), MISTAKES)
def test_refused(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


def test_members_that_share_x_but_not_their_running_statistics():
    """The moments of members that evaluate different checkpoints are those of x, to the last bit."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    means = jnp.arange(24.0).reshape(8, 3) * 1e3

    def member(mean, x):
        state = STATE._replace(mean=mean[0])
        (y, new), back = jax.vjp(lambda x: jaxbn.bn_apply(PARAMS, state, x, True, momentum=0.0), x)
        return y[None], new.mean[None], back((y, jax.tree.map(jnp.zeros_like, new)))[0][None]

    f = jax.jit(jax.shard_map(member, mesh=mesh, in_specs=(P("d"), P()), out_specs=P("d")))
    y, mean, dx = f(means, X)
    wanted, back = jax.vjp(lambda x: jaxbn.bn_apply(PARAMS, STATE, x, True)[0], X)
    for i in range(8):
        np.testing.assert_array_equal(mean[i], mean[0])
        np.testing.assert_allclose(y[i], wanted, atol=2e-5)
        np.testing.assert_allclose(dx[i], back(y[i])[0], atol=2e-5)
