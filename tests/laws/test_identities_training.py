"""Exact laws of training a normalized layer: the scale of the weights, the learning rate and the decay act as one."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from law_cases import LAWS, SEEDS, VANISHING, all_near, compiled, fresh, near

import jaxbn
from jaxbn import BatchNormParams

pytestmark = pytest.mark.usefixtures("float64")

STEPS, RATE, EPSILON, UNITS = 30, 0.1, 1e-2, 3


class Net(NamedTuple):
    weight: jax.Array
    scale: jax.Array
    bias: jax.Array
    head: jax.Array


@compiled("epsilon", "adam")
def trained(net, state, data, rates, decay=0.0, momentum=0.0, epsilon=EPSILON, adam=False):
    """Train a dense layer, batch normalization, ReLU and a dense head by gradient descent.

    `rates` `[steps, units]` are those of each unit's weights; all else learns at `RATE`. Returns the last state, and
    per step the network before it and its gradient.
    """
    inputs, targets = data

    def loss(net, state):
        y, new = hidden(net, state, inputs, True, epsilon)
        return jnp.mean((y @ net.head - targets) ** 2), new

    def step(carry, rate):
        net, state, first, second, t = carry
        gradient, state = jax.grad(loss, has_aux=True)(net, state)
        g = gradient._replace(weight=gradient.weight + decay * net.weight)
        if adam:  # no epsilon of its own: where all gradients so far are 0, the step is
            first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, g)
            second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, g)
            wide = jax.tree.map(lambda v: jnp.sqrt(v / (1 - 0.999**t)) + VANISHING, second)
            direction = jax.tree.map(lambda m, w: m / (1 - 0.9**t) / w, first, wide)
        else:
            first = direction = jax.tree.map(lambda v, g: momentum * v + g, first, g)
        moved = jax.tree.map(lambda v, d: v - RATE * d, net, direction)
        moved = moved._replace(weight=net.weight - rate[None] * direction.weight)
        return (moved, state, first, second, t + 1), (net, gradient)

    zero = jax.tree.map(jnp.zeros_like, net)
    (_, state, *_), (nets, gradients) = lax.scan(step, (net, state, zero, zero, jnp.ones(())), rates)
    return state, nets, gradients


def hidden(net, state, inputs, train, epsilon):
    """Return the layer's output and state, after the dense layer and before the ReLU."""
    params, options = BatchNormParams(net.scale, net.bias), {"epsilon": epsilon, "activation": jax.nn.relu}
    return jaxbn.bn_apply(params, state, inputs @ net.weight, train, momentum=0.9, **options)


def start(seed):
    """Return a network and its data."""
    rng = np.random.default_rng(seed)
    net = Net(rng.normal(size=(4, UNITS)), np.ones(UNITS), rng.uniform(0, 1, UNITS), rng.normal(size=(UNITS, 2)))
    return net, (rng.normal(size=(12, 4)), rng.normal(size=(12, 2)))


def scaled_start(net, a):
    """Return the same function with weights times `a`; a negative `a` takes a scale of the other sign."""
    return net._replace(weight=a * net.weight, scale=np.sign(a) * net.scale), fresh(UNITS, var=a * a)


def constant(rate):
    """Return the same learning rate at all steps, of all units or of each its own."""
    return np.broadcast_to(np.asarray(rate), (STEPS, UNITS))


@pytest.mark.parametrize(("a", "momentum"), [(0.1, 0.0), (-3.0, 0.9)])
def test_scaled_training_is_the_same(a, momentum):
    """From a W, with rate a^2, a^2 epsilon and decay / a^2: a W at every step, and the same function in both modes."""
    net, data = start(0)
    rate, decay = 0.2 * (1 - momentum), 0.05
    state, nets, _ = trained(net, fresh(UNITS), data, constant(rate), decay, momentum)
    wide, large = scaled_start(net, a)
    options = {"decay": decay / a**2, "momentum": momentum, "epsilon": a * a * EPSILON}
    other_state, others, _ = trained(wide, large, data, constant(rate * a * a), **options)
    assert np.abs(nets.weight[-1] - net.weight).max() > 0.1, "it has moved"
    sign = np.sign(a)
    # 30 steps, each of which passes on the roundings of those before it.
    all_near(others, Net(a * nets.weight, sign * nets.scale, nets.bias, nets.head), max(1, abs(a)), digits=11)
    near(other_state.mean, a * state.mean, max(1, abs(a)), digits=11)
    near(other_state.var, a * a * state.var, a * a, digits=11)
    last, other_last = (jax.tree.map(lambda v: v[-1], v) for v in (nets, others))
    seen = np.random.default_rng(1).normal(size=(5, 4))
    for train in (True, False):
        wanted = hidden(last, state, seen, train, EPSILON)[0]
        near(hidden(other_last, other_state, seen, train, a * a * EPSILON)[0], wanted, digits=10)
    unscaled = trained(wide, large, data, constant(rate), **options)[1]
    assert np.abs(unscaled.weight / a - nets.weight).max() > 0.01, "another rate is another path"


def test_adam_does_not_train_the_same():
    """Its steps do not know the size of the gradient: rate a^2 is too much for them, and |a| is right."""
    net, data = start(0)
    a, rate = -3.0, 0.02
    wide, large = scaled_start(net, a)
    _, nets, _ = trained(net, fresh(UNITS), data, constant(rate), adam=True)
    train = partial(trained, wide, large, data, epsilon=a * a * EPSILON, adam=True)
    moved = np.abs(nets.weight[-1] - net.weight).max()
    assert np.abs(train(constant(rate * a * a))[1].weight[-1] / a - nets.weight[-1]).max() > 0.3 * moved
    # Quotients of gradients: where one changes its sign, roundings are large beside it.
    near(train(constant(rate * abs(a)))[1].weight / a, nets.weight, digits=8)


@settings(LAWS, max_examples=8)
@given(SEEDS, st.lists(st.floats(0.01, 1), min_size=UNITS, max_size=UNITS))
def test_weights_grow_at_right_angles(seed, rates):
    """|w'|^2 = |w|^2 + rate^2 |g|^2; and w turns by the tangent `rate / |w|^2` times the gradient at w / |w|."""
    net, data = start(seed)
    _, nets, gradients = trained(net, fresh(UNITS), data, constant(rates), epsilon=VANISHING)
    weight, g = nets.weight, gradients.weight
    square = (weight**2).sum(1)
    near(square[1:], (square + np.array(rates) ** 2 * (g**2).sum(1))[:-1], square[1:])
    cosine = (weight[1:] * weight[:-1]).sum(1) / np.sqrt(square[1:] * square[:-1])
    there = Net(weight[0] / np.sqrt(square[0]), *net[1:])
    unit = trained(there, fresh(UNITS), data, constant(0.0), epsilon=VANISHING)[2].weight[0]
    tangent = np.array(rates) / square[0] * np.linalg.norm(unit, axis=0)
    near(cosine[0], 1 / np.sqrt(1 + tangent**2))
    g = trained(net, fresh(UNITS), data, constant(0.0))[2].weight[0]
    assert np.abs((net.weight * g).sum(0)).max() > 1e-6, "not so with an epsilon"


@settings(LAWS, max_examples=8)
@given(SEEDS, st.lists(st.floats(-3, 3).filter(bool), min_size=UNITS, max_size=UNITS))
def test_effective_rate(seed, decades):
    """Only rate / |w|^2 counts, for each unit by itself: weights c w at rate c^2 stay c times those at rate 1."""
    net, data = start(seed)
    c = 10.0 ** np.array(decades)
    _, nets, _ = trained(net, fresh(UNITS), data, constant(0.2), epsilon=VANISHING)
    wide = net._replace(weight=net.weight * c)
    _, others, _ = trained(wide, fresh(UNITS), data, constant(0.2 * c**2), epsilon=VANISHING)
    all_near(others._replace(weight=others.weight / c), nets, 10, digits=9)


@settings(LAWS, max_examples=8)
@given(SEEDS, st.floats(0.01, 0.5), st.floats(0.01, 0.4))
def test_decay_is_a_growing_rate(seed, rate, decay):
    """Rate and decay are no decay with rate rho^(-2 t - 1), rho = 1 - rate decay: w_t = rho^t w~_t."""
    net, data = start(seed)
    rho, t = 1 - rate * decay, np.arange(STEPS)[:, None]
    _, nets, _ = trained(net, fresh(UNITS), data, constant(rate), decay, epsilon=VANISHING)
    _, others, _ = trained(net, fresh(UNITS), data, constant(rate * rho ** (-2.0 * t - 1)), epsilon=VANISHING)
    all_near(others._replace(weight=others.weight * rho ** t[..., None]), nets, 10, digits=9)
