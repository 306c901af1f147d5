"""Marks in a program, which change nothing of it: totals, sizes, platforms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hire_xform.lowering.primitives.products import all_products
from hire_xform.lowering.primitives.proved_for import proved_for, proved_for_p
from hire_xform.lowering.primitives.records import record, record_p
from hire_xform.lowering.primitives.rungs import mark_rung, rung_p

X = jnp.arange(3.0)


def equations(fun, primitive, *operands):
    return [eqn for eqn in jax.make_jaxpr(fun)(*operands).eqns if eqn.primitive is primitive]


# --- totals ---


def test_what_is_recorded_stands_in_the_program():
    def fun(x, i):
        record({"sum": x.sum(), "all": x}, "here", (4,), (i,))
        return x * 2

    (mark,) = equations(fun, record_p, X, 2)
    assert mark.params == {"path": "here", "names": ("sum", "all"), "stack": (4,)}
    assert [v.aval.shape for v in mark.outvars] == [(), (), (3,)]
    assert mark.outvars[0].aval.dtype == jnp.int32
    np.testing.assert_array_equal(fun(X, 2), X * 2)


def test_a_record_without_its_indices_is_refused():
    with pytest.raises(TypeError, match="record: 1 operands; expected 1 indices and 1 values"):
        jax.make_jaxpr(lambda x: record({"a": x}, "here", (4,)))(X)


# --- sizes ---


def test_a_marked_number_is_itself():
    assert int(mark_rung(jnp.asarray(True), "here", 1)) == 1
    assert mark_rung(jnp.asarray(2), "here", 3).dtype == jnp.int32
    (mark,) = equations(lambda r: mark_rung(r, "here", 3), rung_p, 1)
    assert mark.params == {"path": "here", "rungs": 3}


def test_a_mark_goes_through_vmap_and_has_no_derivative():
    numbers = jnp.asarray([1, 0, 2])
    batched = jax.vmap(lambda r: mark_rung(r, "here", 3))
    np.testing.assert_array_equal(jax.jit(batched)(numbers), numbers)
    (mark,) = equations(batched, rung_p, numbers)
    assert mark.outvars[0].aval.shape == (3,)

    def fun(x):
        mark_rung((x.sum() > 0).astype(jnp.int32), "here", 1)
        return (x**2).sum()

    np.testing.assert_array_equal(jax.grad(fun)(X), 2 * X)


# --- platforms ---


def test_what_is_proved_for_a_platform_is_lowered_for_it_only():
    def fun(x):
        return proved_for(x, ("cpu",), "here") + 1

    np.testing.assert_array_equal(fun(X), X + 1)
    traced = jax.jit(fun).trace(X)
    traced.lower(lowering_platforms=("cpu",))
    words = "here is certified for cpu, and is now lowered for tpu, which rounds differently; expected a step"
    with pytest.raises(ValueError, match=words):
        traced.lower(lowering_platforms=("tpu",))
    for platform in ("cuda", "tpu", "cpu"):
        jax.jit(lambda x: proved_for(x, ("cpu", "gpu", "tpu"), "here")).trace(X).lower(lowering_platforms=(platform,))


def test_a_proof_of_many_is_of_each():
    rows = jnp.ones((2, 3))
    (mark,) = equations(jax.vmap(lambda x: proved_for(x, ("cpu",), "here")), proved_for_p, rows)
    assert mark.outvars[0].aval.shape == (2, 3)
    np.testing.assert_array_equal(jax.grad(lambda x: proved_for(x**2, ("cpu",), "here").sum())(X), 2 * X)


# --- products of all rows ---


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_products_of_all_rows_are_f32(dtype, portable_forms):
    x, rows = jnp.ones((1, 3), dtype) * 2, jnp.arange(12, dtype=dtype).reshape(4, 3)
    made = all_products(x, rows)
    assert made.dtype == jnp.float32
    np.testing.assert_array_equal(made, [[6, 24, 42, 60]])
