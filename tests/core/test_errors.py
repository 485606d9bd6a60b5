"""Bad input is refused at once, by an error of ours that states the rule, what came and the fix."""

import traceback
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn

X = np.ones((8, 4), np.float32)
PARAMS, STATE = jaxbn.bn_init(4)


def apply(x=X, train=True, params=PARAMS, state=STATE, **options):
    return jaxbn.bn_apply(params, state, x, train, **options)


def mapped(**options):
    """Call `bn_apply` under a named axis of two members."""
    return jax.vmap(lambda x: apply(x, axis_name="data", **options)[0], axis_name="data")(X.reshape(2, 4, 4))


# What is called, the error, and words that its message must hold: the argument, the rule, what came, the fix.
CASES = {
    "feature mismatch": (
        partial(apply, np.ones((8, 3), np.float32)),
        ValueError,
        ["params.scale", "(3,)", "(4,)", "bn_init(3)"],
    ),
    "state mismatch": (partial(apply, state=jaxbn.bn_init(3)[1]), ValueError, ["state.mean", "(4,)", "(3,)"]),
    "count not scalar": (
        partial(apply, state=STATE._replace(count=jnp.zeros(4, jnp.int32))),
        ValueError,
        ["state.count", "()", "(4,)"],
    ),
    "params and state swapped": (partial(apply, params=STATE, state=PARAMS), TypeError, ["params", "bn_init"]),
    "integer input": (partial(apply, np.ones((8, 4), np.int32)), TypeError, ["`x`", "floating", "int32", "astype"]),
    "bool input": (partial(apply, np.ones((8, 4), bool)), TypeError, ["`x`", "floating", "bool"]),
    "ragged input": (partial(apply, [[1.0], [1.0, 2.0]]), TypeError, ["`x`", "floating", "list"]),
    "text input": (partial(apply, "x"), TypeError, ["`x`", "floating"]),
    "complex input, real state": (
        partial(apply, X.astype(np.complex64)),
        TypeError,
        ["state.mean", "complex", "bn_init"],
    ),
    "train None": (partial(apply, train=None), TypeError, ["`train`", "None", "bool"]),
    "train a number": (partial(apply, train=1), TypeError, ["`train`", "1", "bool"]),
    "train an array": (partial(apply, train=jnp.ones(8, bool)), TypeError, ["`train`", "scalar", "[8]"]),
    "update None": (partial(apply, update=None), TypeError, ["`update`", "None"]),
    "axis out of range": (partial(apply, axis=2), ValueError, ["`axis`", "[-2, 2)", "2"]),
    "axis too negative": (partial(apply, axis=-3), ValueError, ["`axis`", "-3"]),
    "axis repeated": (partial(apply, axis=(1, -1)), ValueError, ["`axis`", "twice", "(1, -1)"]),
    "axis a float": (partial(apply, axis=1.0), TypeError, ["`axis`", "int", "1.0"]),
    "momentum above 1": (partial(apply, momentum=1.5), ValueError, ["`momentum`", "[0, 1]", "1.5"]),
    "momentum below 0": (partial(apply, momentum=-0.1), ValueError, ["`momentum`", "[0, 1]", "-0.1"]),
    "momentum nan": (partial(apply, momentum=float("nan")), ValueError, ["`momentum`", "nan"]),
    "momentum None": (partial(apply, momentum=None), TypeError, ["`momentum`", "None", "cumulative_average"]),
    "schedule out of range": (partial(apply, momentum=lambda count: 2.0), ValueError, ["`momentum`", "2.0"]),
    "schedule not scalar": (
        partial(apply, momentum=lambda count: jnp.ones(4)),
        ValueError,
        ["`momentum`", "scalar", "(4,)"],
    ),
    "epsilon zero": (partial(apply, epsilon=0.0), ValueError, ["`epsilon`", "positive", "0.0"]),
    "epsilon nan": (partial(apply, epsilon=float("nan")), ValueError, ["`epsilon`", "nan"]),
    "epsilon an array": (partial(apply, epsilon=jnp.ones(4)), TypeError, ["`epsilon`", "float"]),
    "groups without a name": (
        partial(apply, axis_index_groups=[[0], [1]]),
        ValueError,
        ["axis_index_groups", "axis_name"],
    ),
    "groups incomplete": (
        partial(mapped, axis_index_groups=[[0]]),
        ValueError,
        ["axis_index_groups", "0 to 1", "[[0]]"],
    ),
    "groups overlap": (partial(mapped, axis_index_groups=[[0, 1], [1]]), ValueError, ["axis_index_groups", "once"]),
    "groups not lists": (partial(mapped, axis_index_groups=[0, 1]), TypeError, ["axis_index_groups", "lists"]),
    "unbound axis name": (partial(apply, axis_name="nowhere"), ValueError, ["`axis_name`", "nowhere", "shard_map"]),
    "axis name twice": (
        partial(lambda: jax.vmap(lambda x: apply(x, axis_name=("data", "data"))[0], axis_name="data")(X[:, None])),
        ValueError,
        ["`axis_name`", "twice"],
    ),
    "mask of another shape": (
        partial(apply, mask=np.ones(8, bool)),
        ValueError,
        ["`mask`", "(8,)", "(8, 4)", "[batch, 1]"],
    ),
    "additive mask": (
        partial(apply, mask=np.where(X[:, :1] > 0, 0, -np.inf)),
        TypeError,
        ["`mask`", "bools", "float", "mask > 0.5", "astype(bool)"],
    ),
    "mask larger than x": (partial(apply, mask=np.ones((2, 8, 4), bool)), ValueError, ["`mask`", "(2, 8, 4)"]),
    "residual of another shape": (partial(apply, residual=X[:4]), ValueError, ["`residual`", "(8, 4)", "(4, 4)"]),
    "residual of integers": (partial(apply, residual=np.ones((8, 4), int)), TypeError, ["`residual`", "floating"]),
    "activation not callable": (
        partial(apply, activation="relu"),
        TypeError,
        ["`activation`", "jax.nn.relu", "'relu'"],
    ),
    "activation not elementwise": (
        partial(apply, activation=jnp.sum),
        ValueError,
        ["`activation`", "elementwise", "(8, 4)"],
    ),
    "activation of two results": (
        partial(apply, activation=lambda y: (y, y)),
        ValueError,
        ["`activation`", "one array"],
    ),
    "num_features a float": (partial(jaxbn.bn_init, 4.0), TypeError, ["num_features", "4.0"]),
    "num_features negative": (partial(jaxbn.bn_init, -4), ValueError, ["num_features", "-4"]),
    "integer parameters": (partial(jaxbn.bn_init, 4, dtype=jnp.int32), TypeError, ["`dtype`", "int32"]),
    "scale of another shape": (partial(jaxbn.bn_init, 4, scale=np.ones(3)), ValueError, ["`scale`", "(4,)", "(3,)"]),
    "mean of another shape": (
        partial(jaxbn.bn_init, 4, mean=np.ones((2, 4))),
        ValueError,
        ["`mean`", "(4,)", "(2, 4)"],
    ),
    "decay of 1": (partial(jaxbn.zero_debiased, 1.0), ValueError, ["`decay`", "[0, 1)", "cumulative_average"]),
    "moments of integers": (partial(jaxbn.moments, np.ones((8, 4), int)), TypeError, ["`x`", "floating"]),
    "moments along no axis": (partial(jaxbn.moments, X, axis=5), ValueError, ["`axis`", "5"]),
    "pool along no axis": (lambda: jaxbn.pool(jaxbn.moments(X), axis=3), ValueError, ["`axis`", "3"]),
    "pool over nothing": (
        lambda: jaxbn.pool_named(jaxbn.moments(X), "nowhere"),
        ValueError,
        ["`axis_name`", "nowhere"],
    ),
    "weights of another length": (
        lambda: jaxbn.pool_updates(jax.tree.map(lambda v: v[None], STATE), weights=np.ones(2, np.float32)),
        ValueError,
        ["`weights`", "[1]", "(2,)"],
    ),
    "updates that kept all": (
        lambda: jaxbn.pool_updates(jax.tree.map(lambda v: v[None], STATE), 1.0),
        ValueError,
        ["`momentum`", "[0, 1)", "1.0"],
    ),
    "schedule above 1": (
        lambda: jaxbn.pool_updates(jax.tree.map(lambda v: v[None], STATE), lambda count: 2.0),
        ValueError,
        ["`momentum`", "[0, 1)", "2.0"],
    ),
    "schedule of nothing": (
        lambda: jaxbn.pool_updates(jax.tree.map(lambda v: v[None], STATE), lambda count: None),
        TypeError,
        ["`momentum`", "None"],
    ),
    "schedule of many": (
        lambda: jaxbn.pool_updates(jax.tree.map(lambda v: v[None], STATE), lambda count: np.zeros(5, np.float32)),
        ValueError,
        ["`momentum`", "one number", "(5,)"],
    ),
    "weights of NaN": (
        lambda: jaxbn.pool_updates(jax.tree.map(lambda v: v[None], STATE), weights=[np.nan]),
        ValueError,
        ["`weights`", "finite"],
    ),
    "negative weights": (
        lambda: jaxbn.pool_updates(jax.tree.map(lambda v: v[None], STATE), weights=[-1]),
        ValueError,
        ["`weights`", "at least 0", "-1"],
    ),
    "updates not stacked": (lambda: jaxbn.pool_updates(STATE), ValueError, ["`states`", "stacked"]),
    "updates in a list": (
        lambda: jaxbn.pool_updates([{"mean": np.ones(2, np.float32), "var": np.ones(2, np.float32)}] * 2),
        ValueError,
        ["`states`", "Stack them first", "(2,)"],
    ),
    "updates of no microbatch": (
        lambda: jaxbn.pool_updates(jax.tree.map(lambda v: jnp.zeros((0, *v.shape), v.dtype), STATE)),
        ValueError,
        ["`states`", "at least one", "(0, 4)"],
    ),
    "updates that do not fit": (
        lambda: jaxbn.pool_updates({"mean": np.ones((2, 3), np.float32), "var": np.ones((2, 4), np.float32)}),
        ValueError,
        ["`states`", "one shape", "(2, 3)", "(2, 4)"],
    ),
    "updates of other counts": (
        lambda: jaxbn.pool_updates(
            {k: np.ones((2, n), np.int32) for k, n in {"mean": 3, "var": 3, "count": 5}.items()}
        ),
        ValueError,
        ["`states`", "count", "(2, 3)", "(2, 5)"],
    ),
    "updates of something else": (
        lambda: jaxbn.pool_updates({"kernel": np.ones((2, 3), np.float32)}),
        ValueError,
        ["`states`", "kernel"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_refused(name):
    call, kind, words = CASES[name]
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    for word in words:
        assert word in str(caught.value)
    assert "/jaxbn/" in traceback.extract_tb(caught.value.__traceback__)[-1].filename, "raised by jaxbn, not below it"
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("name", ["feature mismatch", "axis repeated", "unbound axis name", "train None"])
def test_refused_under_jit(name):
    """While the program is traced the same errors come, as themselves."""
    call, kind, words = CASES[name]
    with pytest.raises(kind, match=words[0].strip("`")):
        jax.jit(lambda: call())()


def test_evaluation_needs_no_bound_axis():
    """A model with an axis name evaluates anywhere, as in flax."""
    y, state = apply(train=False, axis_name="nowhere")
    assert y.shape == X.shape
    assert state.count == 0


def test_a_traced_momentum_is_taken():
    """Hyperparameters may be mapped over; only what can be seen is checked."""
    means = jax.vmap(lambda m: apply(momentum=m)[1].mean)(jnp.array([0.0, 0.5]))
    np.testing.assert_allclose(means, np.array([[1.0] * 4, [0.5] * 4]), rtol=1e-6)
