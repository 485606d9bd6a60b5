"""Every derivative, against float64 automatic differentiation of the plain formula, jitted and eager alike."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from derivative_cases import CASES, FEATURES, MASK, WEIGHTS, Case, Inputs, assert_same, inputs_of, loss, ours, plain
from jax import lax
from params import param

import jaxbn
from jaxbn import BatchNormState


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


# All options occur in the quick ones; the others have one or two at a time.
QUICK = ("train", "masked", "prelu", "everything", "evaluation, everything", "traced evaluation")

SECOND = ("reverse over forward", "reverse over reverse")


def derivatives(layer, case: Case, given: Inputs, direction: Inputs) -> dict[str, Any]:
    """First and second derivatives, in each order of the modes."""
    value = partial(loss, layer, case)
    reverse = jax.grad(value)
    found = {
        "value": value(given),
        "reverse": reverse(given),
        "forward": jax.jvp(partial(layer, case), (given,), (direction,))[1],
        "forward over reverse": jax.jvp(reverse, (given,), (direction,))[1],
    }
    if layer is plain:  # of a formula without rules of its own, all orders are one
        return found | dict.fromkeys(SECOND, found["forward over reverse"]) | {"rematerialized": found["reverse"]}

    def along(given):
        return jax.jvp(value, (given,), (direction,))[1]

    def against(given):
        return sum(
            jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(reverse(given)), jax.tree.leaves(direction), strict=True)
        )

    second = (jax.grad(along)(given), jax.grad(against)(given))
    return found | dict(zip(SECOND, second, strict=True)) | {"rematerialized": jax.grad(jax.checkpoint(value))(given)}


@pytest.mark.parametrize("name", [param(name, quick=name in QUICK, id=name) for name in CASES])
def test_derivatives(name):
    case = CASES[name]
    given, direction = inputs_of(case), inputs_of(case, seed=1)
    got, want = (jax.jit(partial(derivatives, f, case))(given, direction) for f in (ours, plain))
    assert_same(got, want)
    # No comparison of zeros with zeros: every input that the output depends on has a gradient.
    unused = {"mean", "var"} if case.train in (True, "traced on") else set()
    for kind in ("reverse", "forward over reverse"):
        nonzero = {k for k, v in got[kind].items() if np.max(np.abs(v)) > 1e-6}
        assert nonzero >= set(given) - unused, (kind, nonzero)
        assert not nonzero & unused


@pytest.mark.parametrize(
    "name", [param(name, quick=name == "prelu", id=name) for name in ("masked", "prelu", "evaluation")]
)
def test_eager_derivatives(name):
    case = CASES[name]
    given = inputs_of(case)
    assert_same(jax.grad(partial(loss, ours, case))(given), jax.jit(jax.grad(partial(loss, plain, case)))(given))
    tangent = jax.jvp(partial(ours, case), (given,), (given,))[1]
    assert_same(tangent, jax.jit(lambda g: jax.jvp(partial(plain, case), (g,), (g,))[1])(given))


def test_closed_form_gradients_are_those_of_the_plain_formula():
    """The two references agree, so that neither can be wrong alone."""
    case = CASES["masked"]
    given = inputs_of(case)
    _, pull = jax.vjp(partial(plain, case), given)
    got = pull(jnp.asarray(WEIGHTS))[0]
    want = oracle.gradients(given["x"], WEIGHTS, given["scale"], mask=MASK)
    for name, exact in zip(("x", "scale", "bias"), want, strict=True):
        np.testing.assert_allclose(got[name], exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "name", [param(name, quick=name == "masked", id=name) for name in ("masked", "traced training")]
)
def test_jacobians(name):
    case = CASES[name]
    given = inputs_of(case)

    def jacobians(layer):
        f = partial(layer, case)
        return jax.jit(lambda g: (jax.jacfwd(f)(g), jax.jacrev(f)(g)))(given)

    (forward, reverse), (want, _) = jacobians(ours), jacobians(plain)
    assert_same(forward, reverse)
    assert_same(forward, want)


def test_vmap():
    """Gradients of many batches, of many parameters (an ensemble on one batch), and of many of both."""
    case = CASES["activation"]
    members = [inputs_of(case, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *members)
    reference = jax.jit(jax.grad(partial(loss, plain, case)))
    for per_member in ({"x"}, {"scale", "bias"}, {"x", "scale", "bias"}):
        axes = {name: 0 if name in per_member else None for name in stacked}
        given = {name: stacked[name] if name in per_member else members[0][name] for name in stacked}
        got = jax.jit(jax.vmap(jax.grad(partial(loss, ours, case)), in_axes=(axes,)))(given)
        want = [reference({k: v[i] if k in per_member else v for k, v in given.items()}) for i in range(3)]
        assert_same(got, jax.tree.map(lambda *v: jnp.stack(v), *want))


def test_scan_over_layers():
    depth = 3
    case = Case(activation=lambda y, _: jnp.tanh(y))
    rng = np.random.default_rng(5)
    network = {
        "scale": jnp.asarray(rng.normal(1, 0.2, (depth, FEATURES))),
        "bias": jnp.asarray(rng.normal(0, 0.2, (depth, FEATURES))),
        "weight": jnp.asarray(rng.normal(0, 1, (depth, FEATURES, FEATURES))),
    }
    x = inputs_of(case)["x"]

    def deep(layer, wrap, network, x):
        def step(x, p):
            return wrap(partial(layer, case))({"x": x @ p["weight"], "scale": p["scale"], "bias": p["bias"]}), None

        return jnp.sum(WEIGHTS * lax.scan(step, x, network)[0])

    for wrap in (lambda f: f, jax.checkpoint):
        got = jax.jit(jax.grad(partial(deep, ours, wrap), argnums=(0, 1)))(network, x)
        assert_same(got, jax.jit(jax.grad(partial(deep, plain, wrap), argnums=(0, 1)))(network, x))


def test_state_has_no_gradient():
    params, state = jaxbn.bn_init(FEATURES, dtype=jnp.float64)

    def total(x, mean, var):
        _, new = jaxbn.bn_apply(params, BatchNormState(mean, var, state.count), x, True, momentum=0.5)
        return jnp.sum(new.mean) + jnp.sum(new.var)

    for g in jax.grad(total, argnums=(0, 1, 2))(inputs_of(Case())["x"], state.mean, state.var):
        np.testing.assert_array_equal(g, 0)


def test_third_derivative():
    """The rule is written in terms of what it differentiates, so it holds to any order."""
    base, direction = inputs_of(CASES["train"])["x"], inputs_of(CASES["train"], 1)["x"]

    def third(layer):
        def along(t):
            return loss(layer, Case(given=()), {"x": base + t * direction})

        return jax.jit(jax.grad(jax.grad(jax.grad(along))))(0.0)

    np.testing.assert_allclose(third(ours), third(plain), rtol=1e-9)
