"""Running statistics, by every kind of momentum, after a bad batch, and averaged from outside."""

from collections import namedtuple
from functools import partial
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import jaxbn
from jaxbn.statistics import apply_with_example_weight


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
    """Average over batches of several sizes, from initial values that are not the default ones."""
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


def test_a_record_of_the_users_own_is_updated():
    """It has the fields of the state, and is no tree of JAX."""
    state, m = jaxbn.bn_init(2)[1], jaxbn.moments(np.array([[1, 2], [3, 5]], np.float32))
    got, wanted = (jaxbn.update_state(own, m) for own in (SimpleNamespace(**state._asdict()), state))
    for name, value in wanted._asdict().items():
        np.testing.assert_array_equal(getattr(got, name), value, name)


@pytest.mark.parametrize("train", [True, False])
def test_a_record_of_the_users_own_is_read_by_its_names(train):
    """Another order of the fields, or a record that is no tuple, gives what the library's own gives."""
    params = jaxbn.BatchNormParams(jnp.array([2.0, 3.0]), jnp.array([10.0, -10.0]))
    state = jaxbn.BatchNormState(jnp.array([1.0, 2.0]), jnp.array([4.0, 9.0]), jnp.array(3))
    mirrored = namedtuple("Mirrored", "bias scale")(params.bias, params.scale)
    turned = namedtuple("Turned", "var mean count")(state.var, state.mean, state.count)
    x = jnp.array([[1.0, 5.0], [3.0, -5.0]])
    wanted = jaxbn.bn_apply(params, state, x, train)
    for own in (turned, SimpleNamespace(**state._asdict())):
        got = jaxbn.bn_apply(mirrored, own, x, train)
        chex.assert_trees_all_equal(got, wanted)
        chex.assert_trees_all_equal(jaxbn.normalize(mirrored, own, x), jaxbn.normalize(params, state, x))
        mixed = (apply_with_example_weight(p, s, x, 0.3) for p, s in ((mirrored, own), (params, state)))
        chex.assert_trees_all_equal(*mixed)
