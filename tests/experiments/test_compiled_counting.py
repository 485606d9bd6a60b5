"""Read bytes moved, collectives and loops off a compiled program."""

import pytest
from compiled_records import X

from experiments.compiled import counting

PROGRAM = """
HloModule jit_step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%fused_slices (p.0: bf16[4,8,128], p.1: f32[128]) -> bf16[4,2,128] {
  %p.0 = bf16[4,8,128]{2,1,0} parameter(0)
  %p.1 = f32[128]{0} parameter(1)
  %view = bf16[4,8,128]{2,1,0} bitcast(%p.0)
  %first = bf16[4,1,128]{2,1,0} slice(%view), slice={[0:4], [0:1], [0:128]}
  %last = bf16[4,1,128]{2,1,0} slice(%view), slice={[0:4], [7:8], [0:128]}
  ROOT %both = bf16[4,2,128]{2,1,0} concatenate(%first, %last), dimensions={1}
}

%fused_all (q: bf16[4,8,128]) -> bf16[4,8,128] {
  %q = bf16[4,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %part = bf16[4,1,128]{2,1,0} slice(%q), slice={[0:4], [0:1], [0:128]}
  ROOT %whole = bf16[4,8,128]{2,1,0} add(%q, %q)
}

ENTRY %main (x: bf16[4,8,128], v: f32[128]) -> (bf16[4,8,128], f32[128]) {
  %x = bf16[4,8,128]{2,1,0} parameter(0), metadata={op_name="x"}
  %v = f32[128]{0} parameter(1)
  %slices = bf16[4,2,128]{2,1,0} fusion(%x, %v), kind=kLoop, calls=%fused_slices
  %y = bf16[4,8,128]{2,1,0:T(8,128)(2,1)} fusion(%x), kind=kLoop, calls=%fused_all, metadata={op_name="f(%x)"}
  %started = ((f32[128]{0}), f32[128]{0}) all-reduce-start(%v), replica_groups={{0,1}}, to_apply=%sum
  %done = f32[128]{0} all-reduce-done(%started)
  %pair = (f32[128]{0}, f32[2]{0}, /*index=2*/pred[3]{0}) all-reduce(%v, %v, %v), to_apply=%sum
  %moved = bf16[4,8,128]{2,1,0} collective-permute(%y), source_target_pairs={{0,1},{1,0}}
  ROOT %out = (bf16[4,8,128]{2,1,0}, f32[128]{0}) tuple(%moved, %done)
}
"""


def test_bytes_moved():
    slices = (X // 4 + 512) + X // 4  # two eighths of x and all of v; its result
    reduces = (512 + 512) + (3 * 512 + 512 + 8 + 3)
    assert counting.count_moved(PROGRAM) == slices + 2 * X + reduces + 2 * X


def test_bytes_of_types():
    assert counting.count_bytes(
        "(bf16[2,3]{1,0:T(8,128)(2,1)}, f32[], /*index=2*/pred[7]{0}, s64[0], f8e4m3fn[5])"
    ) == (12 + 4 + 7 + 0 + 5)


def test_collectives_are_counted_once_if_they_are_asynchronous():
    found = counting.count_collectives(PROGRAM)
    assert found == {"all-reduce": (2, 512 + 523, 523), "collective-permute": (1, X, X)}


def test_calls_are_followed_and_branches_refused():
    called = PROGRAM.replace("%moved = ", "%called = f32[] call(), to_apply=%run\n  %moved = ")
    called = called.replace("ENTRY", "%run () -> f32[] {\n  ROOT %c = f32[9]{0} iota(), iota_dimension=0\n}\n\nENTRY")
    assert counting.count_moved(called) == counting.count_moved(PROGRAM) + 36
    branched = PROGRAM.replace(
        "%moved = ", "%branch = f32[] conditional(%v), branch_computations={%sum, %sum}\n  %moved = "
    )
    assert counting.has_loop(branched)
    assert not counting.has_loop(PROGRAM)
    with pytest.raises(ValueError, match="conditional"):
        counting.count_moved(branched)
