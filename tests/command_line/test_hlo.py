"""What is read off the text of a compiled program, against programs whose bytes are known."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from hire_xform.dump.hlo import bytes_of, counts

D, N = 64, 512
W = jax.ShapeDtypeStruct((N, D), jnp.float32)
X = jax.ShapeDtypeStruct((D,), jnp.float32)
INDEX = jax.ShapeDtypeStruct((8,), jnp.int32)
ROW = 4 * D


def read(fun, *shapes):
    return counts(jax.jit(fun).trace(*shapes).lower().compile().as_text())


def test_a_matrix_is_read_once_and_a_loop_as_often_as_it_runs():
    once = read(lambda w, x: w @ x, W, X)
    assert N * ROW <= once.read < 1.1 * N * ROW
    often = read(lambda w, x: lax.fori_loop(0, 5, lambda i, y: (w @ y)[:D], x), W, X)
    assert 5 * N * ROW <= often.read < 1.1 * 5 * N * ROW
    assert not often.endless


def test_of_chosen_rows_only_these_are_read():
    chosen = read(lambda w, i: w[i] * 2, W, INDEX)
    assert 8 * ROW <= chosen.read < 16 * ROW
    block = read(lambda w, i: lax.dynamic_slice(w, (i[0], 0), (4, D)) * 2, W, INDEX)
    assert 4 * ROW <= block.read < 8 * ROW


def test_a_loop_that_nobody_counted_is_said_to_be_one():
    found = read(lambda w, x: lax.while_loop(lambda y: y.sum() < 1, lambda y: (w @ y)[:D], x), W, X)
    assert found.endless == 1


# As TPU and GPU compilers write it, shortened.
MADE = """HloModule jit_run, is_scheduled=true

%cond (arg: (s32[], f32[4])) -> pred[] {
  %arg = (s32[]{:T(128)}, f32[4]{0:T(128)}) parameter(0)
  %limit = s32[]{:T(128)} constant(3)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (arg.1: (s32[], f32[4])) -> (s32[], f32[4]) {
  %arg.1 = (s32[]{:T(128)}, f32[4]{0:T(128)}) parameter(0)
  %i.1 = s32[]{:T(128)S(1)} get-tuple-element(%arg.1), index=0
  %x = f32[4]{0:T(128)} get-tuple-element(%arg.1), index=1
  %y = f32[4]{0:T(128)S(1)} negate(%x), backend_config={"estimated_cycles":"100"}
  ROOT %t = (s32[]{:T(128)}, f32[4]{0:T(128)}) tuple(%i.1, %y)
}

%update (p0: f32[8,4], p1: f32[1,4], p2: s32[]) -> f32[8,4] {
  %p0 = f32[8,4]{1,0} parameter(0)
  %p1 = f32[1,4]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %dus = f32[8,4]{1,0} dynamic-update-slice(%p0, %p1, %p2, %zero)
}

%few (q0: f32[4]) -> f32[4] {
  %q0 = f32[4]{0} parameter(0)
  ROOT %n = f32[4]{0} negate(%q0)
}

%none (q1: f32[4]) -> f32[4] {
  ROOT %q1 = f32[4]{0} parameter(0)
}

ENTRY %main (w: bf16[100,16], x: f32[2,16], rows: s32[5], big: f32[8,4], one: f32[1,4], z: f32[4]) -> f32[2,10] {
  %w = bf16[100,16]{1,0:T(8,128)(2,1)} parameter(0)
  %x.1 = f32[2,16]{1,0} parameter(1)
  %rows = s32[5]{0} parameter(2)
  %big = f32[8,4]{1,0} parameter(3)
  %one = f32[1,4]{1,0} parameter(4)
  %z = f32[4]{0} parameter(5)
  %c = s32[] constant(0)
  %init = (s32[], f32[4]{0}) tuple(%c, %z)
  %loop = (s32[], f32[4]{0}) while(%init), condition=%cond, body=%body
  %grown = f32[8,4]{1,0} fusion(%big, %one, %c), kind=kLoop, calls=%update
  %either = f32[4]{0} conditional(%c, %z, %z), branch_computations={%few, %none}
  %copy-start = (f32[4]{0:T(128)S(1)}, f32[4]{0:T(128)}, u32[]{:S(2)}) copy-start(%z)
  %copy-done = f32[4]{0:T(128)S(1)} copy-done(%copy-start)
  ROOT %k = f32[2,10]{1,0} custom-call(%x.1, %w, %rows), custom_call_target="__gpu$xla.gpu.triton", \
metadata={op_name="jit(run)/select_rows_dot/pallas_call"}, backend_config={grid_x = 4 : i32, name = "select_rows_dot"}
}
"""


def test_what_other_compilers_write():
    found = counts(MADE)
    loop = 3 * 16  # reads from memory, and writes to VMEM
    update = 16 + 4  # in place: the update, and where
    branch = 16
    copied = 16
    kernel = 2 * 16 * 4 + 5 * 4 + 10 * 16 * 2  # ten rows: two to an index
    assert found.read == loop + update + branch + copied + kernel
    assert found.written == 16 + 16 + 2 * 10 * 4
    assert found.cycles == 300
    assert found.steps == 3 + 1 + 1 + 1 + 1
    assert found.kernels == {"select_rows_dot": 1}
    assert not found.endless
    assert found.largest["f32[2,10] k"] == 80


def test_a_kernel_says_itself_what_it_moves():
    line = '"custom_call_config":{"cost_estimate":{"flops":"9","bytes_accessed":"1000"}}'
    assert counts(MADE.replace('name = "select_rows_dot"', line)).read == counts(MADE).read - 468 + 1000 - 80


# As TPU compilers write what kernels take from a stack: a layer's part of it, in another layout and in VMEM.
SLICED = """HloModule jit_run, is_scheduled=true

%relaid (p: s8[3,32,128]) -> s8[3,32,128] {
  %p = s8[3,32,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  ROOT %c = s8[3,32,128]{2,1,0:T(8,128)(4,1)} copy(%p)
}

%own (p.1: s8[3,32,128], i: s32[]) -> s8[32,128] {
  %p.1 = s8[3,32,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %f = s8[3,32,128]{2,1,0:T(8,128)(4,1)} fusion(%p.1), kind=kLoop, calls=%relaid
  %d = s8[1,32,128]{2,1,0:T(8,128)(4,1)} dynamic-slice(%f, %i, %zero, %zero), dynamic_slice_sizes={1,32,128}
  ROOT %b = s8[32,128]{1,0:T(8,128)(4,1)S(1)} bitcast(%d)
}

ENTRY %main (stack: s8[3,32,128], at: s32[]) -> f32[32] {
  %stack = s8[3,32,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  %at = s32[] parameter(1)
  %next = s32[]{:T(128)S(6)} add(%at, %at)
  %kept = f32[32]{0:T(128)} custom-call(), custom_call_target="AllocateBuffer"
  %begun = ((s8[3,32,128]{2,1,0:T(32,128)(4,1)}), s8[1,32,128]{2,1,0:T(32,128)(4,1)S(1)}, s32[]{:S(2)}) \
slice-start(%stack), slice={[1:2], [0:32], [0:128]}
  %done = s8[1,32,128]{2,1,0:T(32,128)(4,1)S(1)} slice-done(%begun)
  %q = s8[32,128]{1,0:T(8,128)(4,1)S(1)} fusion(%stack, %next), kind=kLoop, calls=%own
  ROOT %k = f32[32]{0:T(128)} custom-call(%q), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"cost_estimate":{"bytes_accessed":"4224"}}}
}
"""


def test_what_is_in_vmem_is_not_read_again():
    found = counts(SLICED)
    numbers = 2 * 4  # of the addition
    assert found.read == numbers + 2 * 32 * 128  # one layer's, and another one's ahead of time
    assert found.written == 4 * 32
    assert found.steps == 3  # numbers of the scalar core are not, nor is memory that is set aside


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("f32[2,3]{1,0}", 24),
        ("(bf16[4]{0}, s32[], pred[3]{0})", 15),
        ("s4[5]{0}", 3),
        ("f8e4m3fn[7]{0}", 7),
        ("f32[0]{0}", 0),
        ("token[]", 0),
    ],
)
def test_bytes_of_types(text, size):
    assert bytes_of(text) == size
