"""The contract of all variants: one table of variants, one list of properties.

Tests of their own kind are in the variant's own file: that eight devices with unequal masks give what one gives, the
modules of whitening, which have another name, weighing, which has no state, and the LSTM, which has another shape.
Functions of finished statistics (`adapt`, `fold`, `health`) have no batch to mask or to spread, and are not here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from params import param
from ways import assert_close

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn import BatchNormParams, Renorm

ROWS, FEATURES = 16, 3
rng = np.random.default_rng(0)
X = (rng.standard_normal((ROWS, FEATURES)) * 2 + 1).astype(np.float32)
MASK = (np.arange(ROWS) % 4 != 3)[:, None]  # the same number in each ghost batch
BY_EXAMPLE = {"scale": X[::-1] / 4, "bias": X / 8}


@dataclass(frozen=True, eq=False)
class Variant:
    """One way to call the layer, itself a key of its compiled programs.

    Attributes:
        start: `(params, state)`, parameters of a dtype.
        apply: `(params, state, x, train, **options) -> (y, state)`.
        fields: of the Flax modules.
        called: what their call is given.
    """

    start: Callable[..., Any]
    apply: Callable[..., Any]
    fields: dict[str, Any] = field(default_factory=dict)
    called: dict[str, Any] = field(default_factory=dict)


def conditional_start(dtype=jnp.float32):
    return BatchNormParams(*(jnp.asarray(v, dtype) for v in BY_EXAMPLE.values())), jaxbn.bn_init(FEATURES)[1]


def of_options(**options):
    def start(dtype=jnp.float32):
        return jaxbn.bn_init(FEATURES, dtype=dtype)

    return Variant(start, partial(jaxbn.bn_apply, **options), options)


def domain_start(dtype=jnp.float32):
    return jaxbn.domains.domain_init(2, FEATURES, dtype=dtype)


def domain_apply(params, state, x, train, **options):
    return jaxbn.domains.domain_apply(params, state, x, train, 1, **options)


def whiten_start(dtype=jnp.float32):
    return jaxbn.whitening.whiten_init(FEATURES, dtype=dtype)


VARIANTS = {
    "plain": of_options(),
    "ghost": of_options(ghost_batches=4),
    "renorm": of_options(renorm=Renorm(1.5, 0.5)),
    "renorm-schedule": of_options(renorm=jaxbn.renorm_warmup(start=1, r_end=4, d_end=3)),
    "ghost-renorm": of_options(ghost_batches=2, renorm=Renorm(1.5, 0.5)),
    "conditional": Variant(
        conditional_start, jaxbn.bn_apply, {"use_scale": False, "use_bias": False}, dict(BY_EXAMPLE)
    ),
    "whiten": Variant(whiten_start, jaxbn.whitening.whiten_apply),
    "domains": Variant(domain_start, domain_apply, {"num_domains": 2}, {"domain": 1}),
}
# Of two options that have been seen alone.
SLOW = ("renorm-schedule", "ghost-renorm")
each = pytest.mark.parametrize("variant", [param(v, quick=n not in SLOW, id=n) for n, v in VARIANTS.items()])


@cache
def gradients(variant, train=True):
    """Return a compiled function of `(params, state, x)` and maybe a mask: gradients, and output with the new state."""

    def loss(params, state, x, mask=None):
        y, new = variant.apply(params, state, x, train, mask=mask)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), (y, new)

    return jax.jit(jax.grad(loss, argnums=(0, 2), has_aux=True))


@each
@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, *(pytest.param(d, marks=pytest.mark.slow) for d in (jnp.float32, jnp.float16))]
)
def test_shapes_and_dtypes_stay(variant, dtype):
    params, state = variant.start(dtype)
    x = jnp.asarray(X, dtype)
    for train in (True, False):
        own, (y, new) = jax.eval_shape(gradients(variant, train), params, state, x)
        chex.assert_trees_all_equal_shapes_and_dtypes((y, new, own), (x, state, (params, x)))


@each
def test_the_state_is_carried_and_one_program_serves_all_steps(variant):
    """A loop in Python and a `lax.scan` end alike."""
    params, state = variant.start()
    xs = X + np.arange(5, dtype=np.float32)[:, None, None]
    chex.clear_trace_counter()  # which does not tell cases of a test apart
    step = jax.jit(chex.assert_max_traces(lambda state, x: variant.apply(params, state, x, True, momentum=0.9), n=1))
    carried, outputs = state, []
    for x in xs:
        y, carried = step(carried, x)
        outputs.append(y)

    def body(state, x):
        y, state = variant.apply(params, state, x, True, momentum=0.9)
        return state, y

    assert_close(jax.jit(lambda s: lax.scan(body, s, xs))(state), (carried, jnp.stack(outputs)), atol=1e-5)
    assert int(np.max(carried.count)) == 5


@each
def test_extreme_input_gives_finite_output_and_gradients(variant):
    """Constant rows, none that count, values at the ends of float32: output and gradients stay finite."""
    params, state = variant.start()
    nothing = np.zeros((ROWS, 1), bool)
    step = gradients(variant)
    for x in (np.zeros_like(X), np.full_like(X, 7e4), X * np.float32(1e-30), X * np.float32(1e15)):
        chex.assert_tree_all_finite(step(params, state, x))
    for x in (X, np.full_like(X, 3e38)):
        own, (y, new) = step(params, state, x, nothing)
        chex.assert_tree_all_finite((own, y))
        chex.assert_trees_all_equal(new, state)
    broken = X.copy()
    broken[3, 1] = np.nan
    _, (_, new) = step(params, state, broken)
    chex.assert_tree_all_finite(new)


@each
def test_masked_values_do_not_count(variant):
    """NaN, infinity or a number under the mask: the same for all that counts, in values, gradients and state."""
    params, state = variant.start()
    step = gradients(variant)

    def counted(x):
        (_, dx), (y, new) = step(params, state, x, MASK)
        return jax.tree.map(lambda v: jnp.where(MASK, v, 0), (dx, y)), new

    hidden = [counted(np.where(MASK, X, np.float32(v))) for v in (np.nan, np.inf, 0.5)]
    assert_close(hidden[0], hidden[1], atol=1e-6)
    assert_close(hidden[0][1], hidden[2][1], atol=1e-6)
    assert_close(hidden[0][0][1], hidden[2][0][1], atol=1e-6)
    chex.assert_tree_all_finite(hidden[:2])


@each
def test_update_may_be_cancelled(variant):
    params, state = variant.start()
    y, new = variant.apply(params, state, X, True, update=False)
    chex.assert_trees_all_equal(new, state)
    assert_close(y, variant.apply(params, state, X, True)[0], atol=1e-6)


@pytest.mark.parametrize("variant", [param(v, quick=n not in SLOW, id=n) for n, v in VARIANTS.items() if n != "whiten"])
def test_both_modules_are_the_function(variant):
    """Three steps of training and one of evaluation."""
    params, state = variant.start()
    layer = jaxbn.linen.BatchNorm(momentum=0.9, **variant.fields)
    call = dict(variant.called)
    variables = layer.init(jax.random.key(0), X, use_running_average=True, **call)
    stateful = jaxbn.nnx.BatchNorm(FEATURES, momentum=0.9, rngs=nnx.Rngs(0), **variant.fields)
    for i in range(4):
        x, train = X + np.float32(i), i < 3
        wanted, state = variant.apply(params, state, x, train, momentum=0.9)
        y, new = layer.apply(variables, x, use_running_average=not train, mutable=["batch_stats"], **call)
        variables = {**variables, **new}
        assert_close((y, stateful(x, use_running_average=not train, **call)), (wanted, wanted), atol=1e-5)
    stats = variables["batch_stats"]
    for mean, var in ((stats["mean"], stats["var"]), (stateful.mean[...], stateful.var[...])):
        assert_close((mean, var), (state.mean, state.var), atol=1e-5)


@each
def test_second_derivatives_are_finite_and_symmetric(variant):
    """`u H v = v H u` for the Hessian of a scalar of the output."""
    params, state = variant.start()
    u, v = (rng.standard_normal(X.shape).astype(np.float32) for _ in range(2))

    @jax.jit
    def hessian(v):
        loss = jax.grad(lambda x: jnp.sum(jnp.sin(variant.apply(params, state, x, True)[0])))
        return jax.jvp(loss, (X,), (v,))[1]

    # Sums of 48 terms of size 1.
    np.testing.assert_allclose(np.sum(u * hessian(v)), np.sum(v * hessian(u)), atol=2e-4)
