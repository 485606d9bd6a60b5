"""What every variant must keep, whatever it computes: one table of variants, one contract.

What needs a test of its own kind is in the variant's own file: that eight devices with unequal masks give what one
gives, the modules of whitening, which have another name, weighing, which has no state, and the LSTM, which has another
shape. `COVERED`, at the end, says where. What works on finished statistics (`adapt`, `fold`, `health`) has no batch to
mask or to spread, and is not in it.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
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


class Variant(NamedTuple):
    """One way to call the layer.

    Attributes:
        start: `(params, state)`, parameters of a dtype.
        apply: `(params, state, x, train, **options) -> (y, state)`.
        fields: of the Flax modules.
        called: what their call is given.
    """

    start: Callable[..., Any]
    apply: Callable[..., Any]
    fields: dict[str, Any] = {}  # noqa: RUF012
    called: dict[str, Any] = {}  # noqa: RUF012


def conditional_start(dtype=jnp.float32):
    return BatchNormParams(*(jnp.asarray(v, dtype) for v in BY_EXAMPLE.values())), jaxbn.bn_init(FEATURES)[1]


def of_options(**options):
    def start(dtype=jnp.float32):
        return jaxbn.bn_init(FEATURES, dtype=dtype)

    return Variant(start, partial(jaxbn.bn_apply, **options), options)


def domain_start(dtype=jnp.float32):
    return jaxbn.domain_init(2, FEATURES, dtype=dtype)


def domain_apply(params, state, x, train, **options):
    return jaxbn.domain_apply(params, state, x, train, 1, **options)


def whiten_start(dtype=jnp.float32):
    return jaxbn.whiten_init(FEATURES, dtype=dtype)


VARIANTS = {
    "plain": of_options(),
    "ghost": of_options(ghost_batches=4),
    "renorm": of_options(renorm=Renorm(1.5, 0.5)),
    "renorm-schedule": of_options(renorm=jaxbn.renorm_warmup(start=1, r_end=4, d_end=3)),
    "ghost-renorm": of_options(ghost_batches=2, renorm=Renorm(1.5, 0.5)),
    "conditional": Variant(
        conditional_start, jaxbn.bn_apply, {"use_scale": False, "use_bias": False}, dict(BY_EXAMPLE)
    ),
    "whiten": Variant(whiten_start, jaxbn.whiten_apply),
    "domains": Variant(domain_start, domain_apply, {"num_domains": 2}, {"domain": 1}),
}
each = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def gradients(variant, train=True, **options):
    """A compiled function of `(params, state, x)`: gradients, and output with the new state."""

    def loss(params, state, x):
        y, new = variant.apply(params, state, x, train, **options)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), (y, new)

    return jax.jit(jax.grad(loss, argnums=(0, 2), has_aux=True))


@each
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
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
    step = jax.jit(lambda state, x: variant.apply(params, state, x, True, momentum=0.9))
    carried, outputs = state, []
    for x in xs:
        y, carried = step(carried, x)
        outputs.append(y)
    assert step._cache_size() == 1

    def body(state, x):
        y, state = variant.apply(params, state, x, True, momentum=0.9)
        return state, y

    assert_close(jax.jit(lambda s: lax.scan(body, s, xs))(state), (carried, jnp.stack(outputs)), atol=1e-5)
    assert int(np.max(carried.count)) == 5


@each
def test_nothing_makes_it_infinite(variant):
    """Constant rows, none that count, values at the ends of float32: output and gradients stay finite."""
    params, state = variant.start()
    nothing = np.zeros((ROWS, 1), bool)
    plain, masked = gradients(variant), gradients(variant, mask=nothing)
    for x in (np.zeros_like(X), np.full_like(X, 7e4), X * np.float32(1e-30), X * np.float32(1e15)):
        chex.assert_tree_all_finite(plain(params, state, x))
    for x in (X, np.full_like(X, 3e38)):
        own, (y, new) = masked(params, state, x)
        chex.assert_tree_all_finite((own, y))
        chex.assert_trees_all_equal(new, state)
    broken = X.copy()
    broken[3, 1] = np.nan
    _, (_, new) = plain(params, state, broken)
    chex.assert_tree_all_finite(new)


@each
def test_what_is_masked_does_not_count(variant):
    """NaN, infinity or a number under the mask: the same for all that counts, in values, gradients and state."""
    params, state = variant.start()
    masked = gradients(variant, mask=MASK)

    def counted(x):
        (_, dx), (y, new) = masked(params, state, x)
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


@pytest.mark.parametrize("variant", [v for name, v in VARIANTS.items() if name != "whiten"])
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


# Which test shows what: the names of tests, or after "no" why there is nothing to show. `refused`: what does not apply
# to the variant, or is no use of it, and the test of its error.
HERE = {
    "shapes, dtypes": "test_contract::test_shapes_and_dtypes_stay",
    "scan carry": "test_contract::test_the_state_is_carried_and_one_program_serves_all_steps",
    "no recompile": "test_contract::test_the_state_is_carried_and_one_program_serves_all_steps",
    "finite gradients": "test_contract::test_nothing_makes_it_infinite",
    "masks": "test_contract::test_what_is_masked_does_not_count",
    "both modules": "test_contract::test_both_modules_are_the_function",
}
COVERED = {
    "plain": HERE
    | {
        "devices": "test_devices::test_equals_one_device, groups: test_devices::test_groups",
        "refused": "any argument of another type, shape or range: test_errors::test_refused",
    },
    "ghost": HERE
    | {
        "devices": "test_ghost::test_on_many_devices_parts_are_local_and_the_state_is_shared, "
        "groups: test_ghost::test_groups_of_devices_divide_their_batch",
        "refused": "parts that do not divide the batch: test_ghost::test_refused, or the devices of an explicit mesh: "
        "test_attacks_variants::test_parts_that_do_not_follow_an_explicit_mesh_are_refused; no batch: "
        "test_ghost::test_a_row_without_a_batch_is_refused, a symbolic one: "
        "test_attacks_variants::test_a_symbolic_batch_has_no_parts; complex x: "
        "test_ghost::test_complex_input_is_refused",
    },
    "renorm": HERE
    | {
        "devices": "test_renorm::test_on_many_devices",
        "refused": "limits out of range: test_renorm::test_refused, test_renorm::test_warmup_refuses; complex x: "
        "test_renorm::test_complex_input_is_refused; flax's layer, which has none: test_renorm::test_both_modules",
    },
    "conditional": HERE
    | {
        "devices": "test_conditional::test_on_many_devices",
        "refused": "other shapes: test_conditional::test_other_shapes_are_refused; a module that has its own: "
        "test_conditional::test_both_modules_take_them_at_the_call",
    },
    "domains": HERE
    | {
        "devices": "test_conditional::test_domains_on_many_devices",
        "refused": "test_conditional::test_a_domain_must_be_one_of_them, "
        "test_conditional::test_domains_refuse_what_has_none; a module without: "
        "test_conditional::test_both_modules_hold_domains",
    },
    "whiten": HERE
    | {
        "devices": "test_whiten::test_on_many_devices, groups: test_whiten::test_groups_of_devices",
        "both modules": "test_whiten::test_both_modules_are_the_function, "
        "test_whiten::test_both_modules_take_masks_on_many_devices",
        "refused": "test_whiten::test_refused; a mask by feature: test_whiten::test_masks",
    },
    "weighed_apply": {
        "shapes, dtypes": "test_adapt::test_formula, test_adapt::test_without_positions_and_in_half_precision",
        "scan carry": "no: it has no state",
        "no recompile": "test_adapt::test_a_traced_weight_compiles_once",
        "finite gradients": "test_adapt::test_nothing_makes_it_infinite",
        "masks": "test_adapt::test_a_mask_leaves_out_what_it_hides",
        "devices": "test_adapt::test_eight_devices_are_one; under a named axis examples share nothing either",
        "both modules": "test_adapt::test_both_modules_weigh_in_evaluation_only",
        "refused": "test_adapt::test_weighed_apply_refuses; a traced mode, and several domains: "
        "test_adapt::test_both_modules_weigh_in_evaluation_only",
    },
    "recalibration": {
        "shapes, dtypes": "test_recalibrate::test_trees_and_features_without_values",
        "scan carry": "test_recalibrate::test_layers_stacked_by_scan",
        "no recompile": "test_recalibrate::test_calls_that_are_compiled_already",
        "finite gradients": "no: it has none; values: test_recalibrate::test_trees_and_features_without_values",
        "masks": "test_recalibrate::test_masks_over_nan_in_either_mode_of_the_call",
        "devices": "test_recalibrate::test_linen_on_many_devices, test_recalibrate::test_nnx_on_many_devices",
        "both modules": "test_recalibrate::test_all_at_once, test_recalibrate::test_layer_by_layer",
        "refused": "test_recalibrate::test_mistakes, test_recalibrate::test_models_and_calls_that_are_refused",
    },
    "lstm": {
        "shapes, dtypes": "test_recurrent::test_dtypes",
        "scan carry": "test_recurrent::test_pieces_and_single_steps_make_the_whole",
        "no recompile": "test_recurrent::test_one_program_for_modes_and_lengths_and_states",
        "finite gradients": "test_recurrent::test_nothing_makes_it_infinite",
        "masks": "lengths in their place: test_recurrent::test_ragged_sequences",
        "devices": "test_recurrent::test_eight_devices_equal_one, test_recurrent::test_cells_on_many_devices",
        "both modules": "test_recurrent::test_linen_cell_is_the_function, "
        "test_recurrent::test_nnx_cell_is_the_function",
        "refused": "a mask, and whatever else: test_recurrent::test_mistakes",
    },
}


@pytest.mark.parametrize("variant", COVERED)
def test_every_cell_names_a_test_that_is_there(variant):
    assert {name.split("-")[0] for name in VARIANTS} <= set(COVERED)
    assert set(COVERED[variant]) == {*HERE, "devices", "refused"}
    for cell in COVERED[variant].values():
        named = re.findall(r"(test_\w+)::(test_\w+)", cell)
        assert named or cell.startswith("no: ")
        for file, test in named:
            assert f"\ndef {test}(" in (Path(__file__).parent / f"{file}.py").read_text(), (file, test)
