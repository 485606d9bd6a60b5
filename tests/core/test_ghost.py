"""Ghost batches: parts of a batch that are normalized by themselves, and one update of the state."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ways import AXIS, MEMBERS, assert_close, each_way, mesh_of, shard_map_way

import jaxbn
from experiments.compiled.counting import count_collectives

GROUPS, ROWS, FEATURES = 4, 32, 3
rng = np.random.default_rng(0)
X = (rng.standard_normal((ROWS, 2, FEATURES)) * 2 + np.arange(ROWS)[:, None, None] / 4).astype(np.float32)
MASK = rng.random((ROWS, 2, 1)) < 0.6
G = rng.standard_normal(X.shape).astype(np.float32)
PARAMS, STATE = jaxbn.bn_init(FEATURES)
PARAMS = jaxbn.BatchNormParams(jnp.array([1.0, -2.0, 0.5]), jnp.array([0.0, 1.0, 2.0]))


def ghosts(x, mask=None, groups=GROUPS, params=PARAMS, **options):
    return jaxbn.bn_apply(params, STATE, x, True, mask=mask, ghost_batches=groups, momentum=0.9, **options)


@pytest.mark.parametrize("masked", [False, True])
def test_each_part_is_a_batch_of_its_own(masked):
    """Outputs and gradients are those of the parts; the state is that of the whole."""
    mask = MASK if masked else None
    x = np.where(MASK, X, np.nan).astype(np.float32) if masked else X

    def value(params, x):
        y, new = ghosts(x, mask, params=params)
        return jnp.sum(jnp.where(MASK, y * G, 0) if masked else y * G), (y, new)

    (d_params, dx), (y, new) = jax.jit(jax.grad(value, argnums=(0, 1), has_aux=True))(PARAMS, x)
    scale, bias = (np.asarray(v, np.float64) for v in PARAMS)
    wanted = [np.zeros(X.shape), np.zeros(X.shape), np.zeros(FEATURES), np.zeros(FEATURES)]
    for part in range(GROUPS):
        rows = slice(part * ROWS // GROUPS, (part + 1) * ROWS // GROUPS)
        own = None if mask is None else mask[rows]
        dy = np.where(MASK[rows], G[rows], 0) if masked else G[rows]
        wanted[0][rows] = oracle.training(np.nan_to_num(x[rows]), scale, bias, mask=own).y
        pieces = oracle.gradients(np.nan_to_num(x[rows]), dy, scale, mask=own)
        wanted[1][rows] = pieces[0]
        wanted[2] += pieces[1]
        wanted[3] += pieces[2]
    at = np.broadcast_to(MASK if masked else True, X.shape)
    # Some tens of values of size 1 to 10 and their sums, in float32.
    np.testing.assert_allclose(np.where(at, y, 0), np.where(at, wanted[0], 0), atol=2e-5)
    np.testing.assert_allclose(dx, np.where(at, wanted[1], 0), atol=2e-5)
    np.testing.assert_allclose(d_params.scale, wanted[2], atol=1e-4)
    np.testing.assert_allclose(d_params.bias, wanted[3], atol=1e-4)
    _, whole = jaxbn.bn_apply(PARAMS, STATE, x, True, mask=mask, momentum=0.9)
    assert_close(new, whole, atol=2e-6)


def test_one_part_is_plain():
    chex.assert_trees_all_equal(ghosts(X, groups=1), jaxbn.bn_apply(PARAMS, STATE, X, True, momentum=0.9))


@pytest.mark.parametrize("train", [False, "traced"])
def test_evaluation_knows_no_parts(train):
    """Nor need they divide its batch."""
    jaxbn.bn_apply(PARAMS, STATE, X[:5], False, ghost_batches=GROUPS)
    flag = jnp.array(False) if train == "traced" else False
    y, state = jaxbn.bn_apply(PARAMS, STATE, X, flag, ghost_batches=GROUPS)
    assert_close((y, state), jaxbn.bn_apply(PARAMS, STATE, X, False), atol=1e-6)


def test_a_traced_flag_is_training_too():
    assert_close(
        jaxbn.bn_apply(PARAMS, STATE, X, jnp.array(True), ghost_batches=GROUPS),
        jaxbn.bn_apply(PARAMS, STATE, X, True, ghost_batches=GROUPS),
        atol=2e-6,
    )


@each_way
def test_on_many_devices_parts_are_local_and_the_state_is_shared(way):
    """Sixteen parts, two a device, in each way of running. Masks differ, NaN under them."""
    x = rng.standard_normal((ROWS, FEATURES)).astype(np.float32) + np.arange(ROWS)[:, None].astype(np.float32)
    mask = np.ones((ROWS, 1), bool)
    mask[3], mask[8:10], mask[31] = False, False, False
    x = np.where(mask, x, np.nan).astype(np.float32)

    def member(whole, pieces, name=way.axis_name):
        def loss(params, x):
            y, new = jaxbn.bn_apply(params, STATE, x, True, mask=pieces["mask"], axis_name=name, ghost_batches=16)
            return jnp.sum(jnp.where(pieces["mask"], jnp.sin(y), 0)), (y, new)

        gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
        (d_params, dx), (y, new) = gradient(whole["params"], pieces["x"])
        return {"y": y, "dx": dx}, (new, way.total(d_params) if name else d_params)

    got = way.run(member, {"params": PARAMS}, {"x": x, "mask": mask})
    wanted = jax.jit(lambda w, p: member(w, p, None))({"params": PARAMS}, {"x": x, "mask": mask})
    assert_close(got, wanted)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_parts_of_several_devices(parts):
    """The same number means the same parts where a part is larger than what a device holds."""
    way = shard_map_way(True)
    x = np.where(MASK, X, np.nan).astype(np.float32)

    def member(whole, pieces, name=AXIS):
        def loss(params, x):
            y, new = ghosts(x, pieces["mask"], parts, params, axis_name=name)
            return jnp.sum(jnp.where(pieces["mask"], jnp.sin(y), 0)), (y, new)

        (d_params, dx), (y, new) = jax.grad(loss, argnums=(0, 1), has_aux=True)(whole["params"], pieces["x"])
        return {"y": y, "dx": dx}, (new, d_params)

    got = way.run(member, {"params": PARAMS}, {"x": x, "mask": MASK})
    wanted = jax.jit(lambda w, p: member(w, p, None))({"params": PARAMS}, {"x": x, "mask": MASK})
    assert_close(got, wanted)


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_groups_of_devices_divide_their_batch(parts):
    """`axis_index_groups` of equal sizes: each group is a batch, of `ghost_batches` parts."""
    groups, way = [[3, 6, 1, 0], [7, 2, 5, 4]], shard_map_way(True)

    def member(whole, pieces):
        y, new = ghosts(pieces["x"], None, parts, axis_name=way.axis_name, axis_index_groups=groups)
        return {"y": y, "new": jax.tree.map(lambda v: v[None], new)}, ()

    got, _ = way.run(member, {"none": np.zeros(1)}, {"x": X})
    shards, alone = X.reshape(MEMBERS, ROWS // MEMBERS, *X.shape[1:]), jax.jit(partial(ghosts, groups=parts))
    for group in groups:
        y, new = alone(shards[np.array(group)].reshape(-1, *X.shape[1:]))
        for place, i in enumerate(group):
            assert_close(got["y"].reshape(shards.shape)[i], y.reshape(len(group), *shards.shape[1:])[place])
            assert_close(jax.tree.map(lambda v, i=i: v[i], got["new"]), new, atol=2e-6)


@pytest.mark.parametrize(("parts", "groups"), [(3, None), (6, None), (2, [[3], [6, 1], [0, 7, 2, 5, 4]]), (24, None)])
def test_parts_that_do_not_fit_the_devices_are_refused(parts, groups):
    with pytest.raises(ValueError, match="ghost_batches"):
        jax.vmap(lambda x: ghosts(x, None, parts, axis_name=AXIS, axis_index_groups=groups), axis_name=AXIS)(
            X.reshape(MEMBERS, ROWS // MEMBERS, *X.shape[1:])
        )


@pytest.mark.compiler
@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit], ids=["auto", "explicit"])
def test_parts_that_follow_the_shards_need_no_collective(kind):
    """Sharded `jit` takes none for the output and its gradient, and two for the state, of the mean and about it."""
    mesh = mesh_of(kind)

    def state(x):
        return ghosts(x, groups=MEMBERS)[1]

    def output(x):
        return ghosts(x, groups=MEMBERS)[0]

    def gradient(x):
        return jax.vjp(output, x)[1](x)[0]

    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P("members")))
        texts = [jax.jit(f).lower(x).compile().as_text() for f in (output, gradient, state)]
        counts = [sum(sent.number for sent in count_collectives(text).values()) for text in texts]
    assert counts == [0, 0, 2]


def test_activation_and_residual_see_x_as_it_is():
    """A residual, arrays in an activation, and channels first; an array that only fits the whole is refused."""
    weights = rng.standard_normal((1, *X.shape[1:])).astype(np.float32)
    y, _ = ghosts(X, activation=lambda y: y * weights, residual=X)
    plain, _ = ghosts(X)
    np.testing.assert_allclose(y, (plain + X) * weights, rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="one part"):
        ghosts(X, activation=lambda y: y * X)
    first, state = ghosts(np.moveaxis(X, -1, 0), axis=0)
    np.testing.assert_allclose(np.moveaxis(first, 0, -1), plain, rtol=1e-6, atol=1e-6)
    assert_close(state, ghosts(X)[1], atol=1e-6)


def test_more_parts_than_rows_of_a_collective():
    x = rng.standard_normal((256, FEATURES)).astype(np.float32)
    assert_close(ghosts(x, groups=128)[1], jaxbn.bn_apply(PARAMS, STATE, x, True, momentum=0.9)[1], atol=2e-6)


def test_second_derivatives_are_those_of_the_parts():
    def split(x):
        parts = [jaxbn.bn_apply(PARAMS, STATE, part, True)[0] for part in jnp.split(x, GROUPS)]
        return jnp.sum(jnp.concatenate(parts) ** 3 * G)

    def once(x):
        return jnp.sum(ghosts(x)[0] ** 3 * G)

    found = [jax.jit(jax.jvp, static_argnums=0)(jax.grad(f), (X,), (G,))[1] for f in (once, split)]
    # Sums of tens of terms of size 100.
    np.testing.assert_allclose(found[0], found[1], atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("value", "kind"), [(0, ValueError), (5, ValueError), (-1, ValueError), (2.0, TypeError), (True, ValueError)]
)
def test_refused(value, kind):
    with pytest.raises(kind, match="ghost_batches"):
        ghosts(X, groups=value)


def test_a_row_without_a_batch_is_refused():
    """All axes are features: there is nothing to divide."""
    params, state = jaxbn.bn_init(FEATURES)
    with pytest.raises(ValueError, match="ghost_batches"):
        jaxbn.bn_apply(params, state, X[0, 0], True, axis=0, ghost_batches=2)


def test_an_empty_batch_keeps_the_state():
    y, state = ghosts(X[:0])
    assert y.shape == X[:0].shape
    chex.assert_trees_all_equal(state, STATE)


def test_complex_input_is_refused():
    params, state = jaxbn.bn_init(FEATURES, dtype=jnp.complex64)
    with pytest.raises(TypeError, match="complex64"):
        jaxbn.bn_apply(params, state, X.astype(np.complex64), True, ghost_batches=2)
