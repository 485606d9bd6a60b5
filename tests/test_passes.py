"""How often a compiled layer goes over memory: the deterministic part of its speed."""

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmark import memory, passes
from experiments.benchmark.sizes import FEWEST, OURS, Case

pytestmark = pytest.mark.usefixtures("ordinary_promotion")

# Forward: the sample and the deviations from it read x, the sums read those, the output reads x again. Backward: a
# ReLU's gradient is an array of its own; two sums read it, one of them the deviations too; then it and x make dx.
# In bfloat16 what both sums share is computed in float32, so that there is an array of it in either case.
COUNTS = {
    ("float32", "none"): 13,
    ("float32", "relu"): 16,
    ("float32", "residual+relu"): 18,
    ("bfloat16", "none"): 15,
    ("bfloat16", "relu"): 16,
    ("bfloat16", "residual+relu"): 20,
}


@pytest.mark.parametrize(("dtype", "epilogue"), COUNTS)
def test_arrays_moved(dtype, epilogue):
    case = Case((11, 8, 8, 16), dtype, epilogue)  # a batch that is not spread over the 8 devices
    moved = {name: memory.one_layer(name, case)[1] for name in (OURS, "flax", "flax, stable", FEWEST)}
    assert moved[OURS] == COUNTS[dtype, epilogue]
    # What the layer costs more than the inexact one at least: the sample, and an array of deviations in float32.
    assert moved[OURS] - moved[FEWEST] == (3 if dtype == "float32" else 1)
    assert moved[OURS] <= moved["flax"] - 2
    assert moved[OURS] <= moved["flax, stable"] - 5


def test_where_the_compiler_may_spread_the_batch():
    """The price of one collective: every part has a pivot of its own, and normalization takes that of all."""
    case = Case((8, 8, 8, 16), "float32", "relu")
    assert memory.one_layer(OURS, case)[1] <= COUNTS["float32", "relu"] + 2


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
    # XLA for CPU of JAX 0.10 makes the whole stack of bfloat16 float32 before its backward loop.
    widened = dtype == "bfloat16" and jax.__version_info__ < (0, 12)
    assert own <= (0.42 if widened else share) * flax
