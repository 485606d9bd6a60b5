"""Count the passes of a compiled layer over memory: the deterministic part of its speed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from experiments.benchmark import accuracy, hlo, memory
from experiments.benchmark.layers import LAYERS, Layer, arguments, program
from experiments.benchmark.one_layer import TINY
from experiments.benchmark.sizes import OURS, Case
from jaxbn.linen import BatchNorm

pytestmark = [pytest.mark.usefixtures("ordinary_promotion"), pytest.mark.compiler]

# Forward: the two sums of deviations from the running mean, and the output, each read x; the rare second pass is in a
# loop of its own. Backward: a ReLU's gradient is an array of its own; two sums read it, one of them x too; then it
# and x make dx. In bfloat16 both sums share a gradient that is computed in float32, so that there is an array of it in
# either case.
COUNTS = {
    ("float32", "none"): 10,
    ("float32", "relu"): 13,
    ("float32", "residual+relu"): 15,
    ("bfloat16", "none"): 12,
    ("bfloat16", "relu"): 13,
    ("bfloat16", "residual+relu"): 17,
}


@pytest.mark.parametrize(("dtype", "epilogue"), COUNTS)
def test_arrays_moved(dtype, epilogue):
    case = Case((16, 64, 64, 16), dtype, epilogue)
    moved = {name: memory.one_layer(name, case)["arrays moved"] for name in (OURS, "flax", "flax, stable")}
    assert moved[OURS] == COUNTS[dtype, epilogue]
    assert moved[OURS] <= moved["flax"] - 5
    assert moved[OURS] <= moved["flax, stable"] - 8


@pytest.mark.parametrize(
    ("name", "kernels"), [(OURS, 14 if jax.__version_info__ >= (0, 12) else 12), ("flax", 6), ("flax, stable", 6)]
)
def test_kernels_of_a_tiny_layer(name, kernels):
    """Leave out the second pass, a loop that is not entered, and the `call` that XLA for CPU puts around it."""
    layer = LAYERS[name](TINY.shape[-1])
    step = jax.jit(program(layer, "forward", TINY.relu)).lower(*arguments(layer, accuracy.inputs(TINY, 0.0)))
    entry, computations = hlo.parse_program(step.compile().as_text() or "")
    assert len([i for i in computations[entry] if i.operation not in (*hlo.FREE, "call")]) == kernels


def test_programs_of_an_eager_call(caplog):
    """Each new size costs a compilation of each program, for instance when a network is initialized."""
    compiled = {}
    for name, norm, sizes in ((OURS, BatchNorm, (41, 43)), ("flax", nn.BatchNorm, (45, 47))):
        for size in sizes:  # the first also compiles what does not depend on it
            key, x = jax.random.key(0), jnp.ones((3, size))
            caplog.clear()
            with jax.log_compiles(), caplog.at_level("WARNING"):
                norm(use_running_average=False).init(key, x)
            compiled[name] = sum("Compiling" in record.getMessage() for record in caplog.records)
    assert compiled == {OURS: 7, "flax": 14}


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
    assert memory.moved(text, 32) == 3
    assert memory.moved(text, 4) == 4


def test_the_instrument_sees_each_pass():
    def f(x):
        return x + 1, jnp.sum(jnp.sin(x)), jnp.sum(x, 1)

    compiled = jax.jit(f).lower(jnp.ones((64, 32))).compile()
    assert 4 <= memory.moved(compiled.as_text() or "", 64 * 32) <= 8


@pytest.mark.parametrize(("dtype", "share"), [("float32", 0.5), ("bfloat16", 0.35)])
def test_temporary_memory_of_a_loop_over_layers(dtype, share, monkeypatch):
    """Sixteen convolutions under `lax.scan`: XLA's memory with `save_inputs`, against flax's as it is written."""
    case = Case((8, 16, 16, 16), dtype, "relu")
    own, flax = memory.scanned(OURS, case, 16, rematerialized=True), memory.scanned("flax", case, 16)
    if dtype == "bfloat16" and jax.__version_info__ < (0, 12):
        # XLA for CPU of JAX 0.10 makes the whole stack of bfloat16 float32 before its backward loop, even where there
        # is no layer at all: the loop of convolutions alone takes as much.
        none = Layer(lambda mean, var: mean, lambda params, state, x, residual, train, relu: (x, state))
        monkeypatch.setitem(memory.LAYERS, "none", lambda features: none)
        bare = memory.scanned("none", case, 16, rematerialized=True)
        assert bare > share * flax
        assert own <= 1.01 * bare
    else:
        assert own <= share * flax
