"""Misuse that only JAX or a restored object shows: each error is in the caller's terms, with what to do."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from device_cases import Case, X, arguments, step, train_step
from ways import AXIS, vmap_way

import jaxbn

PARAMS, STATE = jaxbn.bn_init(3)


def test_messages():
    """Errors say in the caller's terms what is wrong and what to do."""
    way, (whole, parts) = vmap_way(), arguments(Case(X))
    with pytest.raises(ValueError, match=r"`axis_name` must be bound.*'rows'.*shard_map.*leave `axis_name` out"):
        jax.jit(partial(train_step, "rows"))(whole["params"], whole["state"], X)
    for groups in ([[0, 1], [2, 3]], [[0, 1, 2, 3], [3, 4, 5, 6, 7]], [list(range(9))], [[-1, *range(7)]]):
        with pytest.raises(ValueError, match=r"each index 0 to 7 .* exactly once"):
            way.run(step(way, axis_index_groups=groups), whole, parts)
    with pytest.raises(TypeError, match="list of lists of ints"):
        way.run(step(way, axis_index_groups=[0, 1]), whole, parts)
    with pytest.raises(ValueError, match="needs `axis_name`"):
        jaxbn.bn_apply(whole["params"], whole["state"], X, True, axis_index_groups=[[0]])
    with pytest.raises(ValueError, match="must not name an axis twice"):
        jax.vmap(partial(train_step, (AXIS, AXIS)), in_axes=(None, None, 0), axis_name=AXIS)(
            whole["params"], whole["state"], X[:, None]
        )


def test_derivative_after_the_name_is_gone():
    """JAX forgets a mapped name inside an inner `jit`; the error says so in our words."""
    whole, _ = arguments(Case(X))
    apply = partial(jaxbn.bn_apply, whole["params"], whole["state"], train=True, axis_name=AXIS)
    inner = jax.jit(jax.vmap(lambda x: apply(x)[0], axis_name=AXIS))
    with pytest.raises(ValueError, match=r"differentiated.*`jax.jit` outermost"):
        jax.grad(lambda x: jnp.sum(inner(x)))(X[:, None])
    outer = jax.jit(jax.grad(lambda x: jnp.sum(jax.vmap(lambda x: apply(x)[0], axis_name=AXIS)(x))))
    assert outer(X[:, None]).shape == X[:, None].shape


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
