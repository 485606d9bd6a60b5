"""How often a compiled layer goes over memory: the deterministic part of its speed."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from experiments.benchmark import memory, passes
from experiments.benchmark.sizes import FEWEST, LEAST, OURS, Case
from jaxbn import _moments

pytestmark = pytest.mark.usefixtures("ordinary_promotion")

# Forward: the sample, the two sums of deviations from it, and the output read x. Backward: a ReLU's gradient is an
# array of its own; two sums read it, one of them x too; then it and x make dx. In bfloat16 both sums share a gradient
# that is computed in float32, so that there is an array of it in either case.
COUNTS = {
    ("float32", "none"): 11,
    ("float32", "relu"): 14,
    ("float32", "residual+relu"): 16,
    ("bfloat16", "none"): 13,
    ("bfloat16", "relu"): 14,
    ("bfloat16", "residual+relu"): 18,
}


@pytest.mark.parametrize(("dtype", "epilogue"), COUNTS)
def test_arrays_moved(dtype, epilogue):
    case = Case((17, 64, 64, 16), dtype, epilogue)  # large, and a batch that is not spread over the 8 devices
    moved = {name: memory.one_layer(name, case).moved for name in (OURS, "flax", "flax, stable", FEWEST, LEAST)}
    assert moved[OURS] == COUNTS[dtype, epilogue]
    # The sample is all that the layer reads more than the inexact one, if no gradient is widened.
    assert moved[OURS] - moved[FEWEST] == 1 if dtype == "float32" else 1 <= moved[OURS] - moved[FEWEST] <= 3
    assert moved[FEWEST] - moved[LEAST] == 2  # a sum over x, and one over the gradient
    assert moved[OURS] <= moved["flax"] - 4
    assert moved[OURS] <= moved["flax, stable"] - 7


@pytest.fixture
def apart(monkeypatch):
    """Asks for the sums of arrays of any size as on a CPU for those of large ones, or as on an accelerator."""

    def ask(backend: str) -> None:
        monkeypatch.setattr(_moments, "LARGE", 0)
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        jax.clear_caches()  # what is traced already does not ask again

    yield ask
    monkeypatch.undo()
    jax.clear_caches()


def test_sums_that_are_apart(apart):
    """Each sum of a large array has a difference of its own on a CPU, and shares it elsewhere: the same derivatives."""
    rng = np.random.default_rng(0)
    x, direction, weight = (jnp.asarray(rng.normal(1.0, 2.0, (2, 13, 3))) for _ in range(3))
    params, state = jaxbn.bn_init(3)

    def loss(x):
        y, _ = jaxbn.bn_apply(params, state, x, True, activation=jnp.tanh, axis_name="members")
        return jnp.sum(weight[0] * y**2)

    def derivatives(x, direction):
        first = jax.grad(loss)
        second = jax.jvp(first, (x,), (direction,))[1]
        return jax.jvp(loss, (x,), (direction,)), first(x), second, jax.grad(lambda x: jnp.vdot(first(x), direction))(x)

    members = jax.vmap(derivatives, axis_name="members")
    found, barriers = [], []
    for backend in ("cpu", "tpu"):
        apart(backend)
        barriers.append("optimization_barrier" in str(jax.make_jaxpr(members)(x, direction)))
        found.append(jax.jit(members)(x, direction))
    assert barriers == [True, False]
    # Of float32 the same operations, differently fused; second derivatives are sums of some hundred terms of size 1.
    chex.assert_trees_all_close(*found, rtol=1e-4, atol=1e-4)


def test_where_the_compiler_may_spread_the_batch():
    """The price of one collective: every part has a pivot of its own, and normalization takes that of all."""
    case = Case((16, 64, 64, 16), "float32", "relu")
    assert memory.one_layer(OURS, case).moved <= COUNTS["float32", "relu"] + 2


def test_the_instrument_on_a_known_program():
    """Two reads and a write; what only renames is free, an operand that is named twice is read once."""
    text = """
%fused (p: f32[8,4]) -> f32[8,4] {
  ROOT %inside = f32[8,4]{1,0} add(%p, %p)
}
ENTRY %main (x: f32[8,4], v: f32[4]) -> (f32[8,4], f32[4]) {
  %x = f32[8,4]{1,0} parameter(0), sharding={replicated}
  %v = f32[4]{0} parameter(1)
  %b = f32[32]{0} bitcast(%x)
  %f = f32[8,4]{1,0} fusion(%x, %v, %x), kind=kLoop, calls=%fused, metadata={op_name="x"}
  %s = (f32[4]{0}, /*index=1*/f32[4]{0}) fusion(%f, %v), kind=kInput, calls=%fused
  ROOT %t = (f32[8,4]{1,0}, f32[4]{0}) tuple(%f, %v)
}
"""
    assert passes.operations(text, 32) == [(1, 1), (1, 0)]
    assert passes.moved(text, 32) == 3
    assert passes.moved(text, 4) == 4


def test_the_instrument_sees_each_pass():
    def f(x):
        return x + 1, jnp.sum(jnp.sin(x)), jnp.sum(x, 1)

    compiled = jax.jit(f).lower(jnp.ones((64, 32))).compile()
    assert 4 <= passes.moved(compiled.as_text() or "", 64 * 32) <= 8


@pytest.mark.parametrize(("dtype", "share"), [("float32", 0.5), ("bfloat16", 0.35)])
def test_temporary_memory_of_a_loop_over_layers(dtype, share):
    """Sixteen convolutions under `lax.scan`: XLA's memory with `save_inputs`, against flax's as it is written."""
    case = Case((8, 16, 16, 16), dtype, "relu")
    own, flax = memory.scanned(OURS, case, 16, rematerialized=True), memory.scanned("flax", case, 16)
    if dtype == "bfloat16" and jax.__version_info__ < (0, 12):
        # XLA for CPU of JAX 0.10 makes the whole stack of bfloat16 float32 before its backward loop, even where there
        # is no layer at all: the loop of convolutions alone takes as much.
        bare = memory.scanned("no layer", case, 16, rematerialized=True)
        assert bare > share * flax
        assert own <= 1.01 * bare
    else:
        assert own <= share * flax
