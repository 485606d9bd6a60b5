"""Inputs that once broke the variants, and meshes of some of the devices: a test for each, so that it stays mended."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from experiments.benchmark import collectives
from experiments.compiled.counting import count_collectives

PARAMS, STATE = jaxbn.bn_init(3)
FAR = (np.random.default_rng(0).standard_normal((12, 3)) + 1).astype(np.float32)


def some_devices(count, kind):
    return jax.sharding.Mesh(np.array(jax.devices()[:count]), ("d",), axis_types=(kind,))


@pytest.mark.compiler
@pytest.mark.parametrize("count", [3, pytest.param(4, marks=pytest.mark.slow), 6])
@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("set_mesh", [True, False], ids=["set_mesh", "arrays alone"])
def test_a_mesh_of_some_of_the_devices(count, kind, set_mesh):
    """The parts follow the mesh, not all devices: two collectives, and none that moves x."""
    mesh = some_devices(count, kind)
    with jax.set_mesh(mesh) if set_mesh else contextlib.nullcontext():
        x = jax.device_put(FAR, jax.NamedSharding(mesh, jax.P("d")))

        compiled = jax.jit(lambda x: jax.grad(lambda x: jnp.sum(jnp.sin(jaxbn.bn_apply(PARAMS, STATE, x, True)[0])))(x))
        text = compiled.lower(x).compile().as_text()
        assert set(count_collectives(text)) == {"all-reduce"}
        assert collectives.count(text) == 2
        y, new = jax.jit(lambda x: jaxbn.bn_apply(PARAMS, STATE, x, True))(x)
    wanted, state = jaxbn.bn_apply(PARAMS, STATE, FAR, True)
    np.testing.assert_allclose(y, wanted, atol=2e-6)
    np.testing.assert_allclose(new.mean, state.mean, atol=1e-6)


def test_parts_that_do_not_follow_an_explicit_mesh_are_refused():
    mesh = some_devices(6, jax.sharding.AxisType.Explicit)
    with jax.set_mesh(mesh):
        x = jax.device_put(FAR, jax.NamedSharding(mesh, jax.P("d")))
        with pytest.raises(ValueError, match=r"ghost_batches.*6 devices"):
            jaxbn.bn_apply(PARAMS, STATE, x, True, ghost_batches=2)
        assert jaxbn.bn_apply(PARAMS, STATE, x, True, ghost_batches=6)[0].shape == x.shape


def test_features_spread_over_an_axis_that_is_not_manual():
    """`shard_map` over one axis of an explicit mesh, with the features along the other."""
    explicit = jax.sharding.AxisType.Explicit
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(explicit, explicit))
    params, state = jaxbn.bn_init(4)
    x = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    with jax.set_mesh(mesh):
        spread = jax.device_put(x, jax.NamedSharding(mesh, jax.P("d", "m")))
        layer = jax.shard_map(
            lambda x: jaxbn.bn_apply(params, state, x, True, axis_name="d")[0],
            in_specs=jax.P("d"),
            out_specs=jax.P("d"),
            axis_names={"d"},
        )
        y = jax.jit(layer)(spread)
    np.testing.assert_allclose(y, jaxbn.bn_apply(params, state, x, True)[0], atol=2e-6)


@pytest.mark.slow
def test_without_jit():
    with jax.disable_jit():
        y, state = jaxbn.bn_apply(PARAMS, STATE, FAR, True)
    wanted, after = jaxbn.bn_apply(PARAMS, STATE, FAR, True)
    np.testing.assert_allclose(y, wanted, atol=2e-6)
    np.testing.assert_allclose(state.var, after.var, rtol=1e-6)


def test_a_member_with_nothing_but_masked_entries():
    """They are normalized by the others' statistics, exactly, a million standard deviations from 0 too."""
    x = (np.array([[3.0], [7.0], [1.0], [5.0]]) + 1e6).astype(np.float32)
    mask = np.array([[True], [False], [True], [True]])
    params, state = jaxbn.bn_init(1)
    apply = lambda x, m, name: jaxbn.bn_apply(params, state, x, True, mask=m, axis_name=name)[0]  # noqa: E731
    y = jax.vmap(lambda x, m: apply(x, m, "i"), axis_name="i")(x[:, None], mask[:, None])
    np.testing.assert_allclose(y[:, 0], apply(x, mask, None), atol=1e-6)


def test_values_whose_squares_overflow():
    """Their feature's output shows it and its statistics stay; the others are not touched."""
    x = np.random.default_rng(0).standard_normal((4096, 2)).astype(np.float32)
    x[:64, 0] += 1e30
    y, state = jaxbn.bn_apply(*jaxbn.bn_init(2), x, True)
    assert np.all(np.isnan(y[:, 0]))
    assert np.all(np.isfinite(y[:, 1]))
    assert state.mean[0] == 0 != state.mean[1]


@pytest.mark.parametrize("index", [np.int8(100), np.uint8(200), np.int64(299), jnp.array(5, jnp.int8)])
def test_the_domain_is_the_one_that_was_named(index):
    params, state = jaxbn.domains.domain_init(300, 3)
    _, new = jaxbn.domains.domain_apply(params, state, FAR, True, index)
    assert np.flatnonzero(new.count).tolist() == [int(index)]


def test_statistics_that_were_never_counted_serve_evaluation():
    """A checkpoint from before a schedule was set."""
    layer = jaxbn.linen.BatchNorm(use_running_average=True, renorm=jaxbn.renorm_warmup())
    variables = jaxbn.linen.BatchNorm().init(jax.random.key(0), FAR, use_running_average=True)
    assert layer.apply(variables, FAR).shape == FAR.shape


def test_limits_that_are_arrays_in_nnx():
    one = jaxbn.nnx.BatchNorm(3, renorm=jaxbn.Renorm(jnp.float32(3), 5.0), rngs=nnx.Rngs(0))
    other = jaxbn.nnx.BatchNorm(3, renorm=jaxbn.Renorm(3.0, 5.0), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(one(FAR), other(FAR))


def nnx_layer(**options):
    return jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0), **options)


def linen_init(**options):
    return jaxbn.linen.BatchNorm(use_running_average=False, **options).init(jax.random.key(0), FAR)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (
            lambda: nnx_layer(num_domains=2, use_scale=False)(FAR[:2], scale=FAR[:2], domain=1),
            ValueError,
            "several domains",
        ),
        (lambda: jaxbn.nnx.convert(nnx_layer(), num_domains=2), TypeError, "num_domains"),
        (lambda: nnx_layer(num_domains=2.0), TypeError, "num_domains"),
        (lambda: nnx_layer(num_domains=0), ValueError, "num_domains"),
        (lambda: linen_init(num_domains="2"), TypeError, "num_domains"),
        (lambda: linen_init(num_domains=True), ValueError, "num_domains"),
        (lambda: jaxbn.domains.domain_init(True, 3), ValueError, "num_domains"),
        (lambda: jaxbn.domains.domain_init(None, 3), TypeError, "num_domains"),
        (lambda: nnx_layer(use_scale=False)(FAR, scale="a"), TypeError, "`scale`"),
        (lambda: nnx_layer(use_bias=False)(FAR, bias=[[1.0], [1.0, 2.0]]), TypeError, "`bias`"),
        (lambda: nnx_layer(num_domains=2)(FAR, domain=[[0], [0, 1]]), TypeError, "domain"),
        (lambda: nnx_layer(renorm=(3.0, 5.0))(FAR), TypeError, "jaxbn.Renorm"),
        (lambda: jaxbn.renorm_warmup(r_end="9"), TypeError, "r_end"),
        (lambda: jaxbn.renorm_warmup(r_end=None), TypeError, "r_end"),
        (lambda: jaxbn.renorm_warmup(lambda n: 3.0), TypeError, "r_max"),
        (lambda: jaxbn.bn_apply(PARAMS, STATE, FAR, True, renorm=jaxbn.Renorm(2j)), TypeError, "r_max"),
        (lambda: jaxbn.bn_apply(PARAMS, STATE, FAR, True, renorm=jaxbn.Renorm(object())), TypeError, "r_max"),
        (
            lambda: jaxbn.bn_apply(PARAMS._replace(scale=np.ones((8, 1), np.float32)), STATE, FAR, True),
            ValueError,
            r"One for each example has shape \(12, 3\)",
        ),
    ],
)
def test_refused(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


def test_a_symbolic_batch_has_no_parts():
    (size,) = jax.export.symbolic_shape("2*b")
    x = jax.ShapeDtypeStruct((size, 3), jnp.float32)
    with pytest.raises(ValueError, match="symbolic"):
        jax.eval_shape(lambda x: jaxbn.bn_apply(PARAMS, STATE, x, True, ghost_batches=2), x)
