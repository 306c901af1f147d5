"""Spellings that XLA is fast at: the same as plain NumPy, whatever the shapes and dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive

from hire_xform.lowering.xla import blocks, slabs
from hire_xform.lowering.xla.devices import ONE
from hire_xform.lowering.xla.eager import compiled_alone
from hire_xform.lowering.xla.nan_max import largest_or_nan
from hire_xform.lowering.xla.narrow_reads import read_part, sliced_on_cpu
from hire_xform.lowering.xla.promotion import usual_promotion
from hire_xform.lowering.xla.skinny_dot import accumulation_dtype, skinny_dot, skinny_dot_transposed, wide_dtype

RNG = np.random.default_rng(0)
ROWS = RNG.integers(-9, 9, size=(12, 6)).astype(np.float32)


# --- blocks ---


@pytest.mark.parametrize("block", [1, 5, 6, 12, 20])
def test_rows_in_blocks_are_all_rows_in_their_order(block):
    met = []

    def fun(rows, ids):
        met.append(rows.shape[0])
        return {"sum": rows.sum(1), "twice": rows * 2, "ids": ids}

    made = blocks.map_row_blocks(fun, block, jnp.asarray(ROWS), jnp.arange(12))
    np.testing.assert_array_equal(made["sum"], ROWS.sum(1))
    np.testing.assert_array_equal(made["twice"], ROWS * 2)
    np.testing.assert_array_equal(made["ids"], np.arange(12))
    assert max(met) <= block


@pytest.mark.parametrize("block", [1, 5, 6, 12, 20])
def test_a_sum_over_blocks_has_each_row_once(block):
    def fun(rows):
        assert rows.shape[0] <= block
        return rows.sum(0), rows.T @ rows

    total, gram = blocks.fold_row_blocks(fun, block, jnp.asarray(ROWS))
    np.testing.assert_array_equal(total, ROWS.sum(0))
    np.testing.assert_array_equal(gram, ROWS.T @ ROWS)


def test_a_sum_over_blocks_has_a_derivative():
    grad = jax.grad(lambda rows: blocks.fold_row_blocks(lambda b: (b**2).sum(), 5, rows))(jnp.asarray(ROWS))
    np.testing.assert_array_equal(grad, 2 * ROWS)


def test_rows_together_are_few_where_they_are_long():
    assert blocks.rows_together(1 << 10) == 1 << 10
    assert blocks.rows_together(1 << 20) == 16


# --- products ---

FLOATS = [jnp.float32, jnp.bfloat16, jnp.float16]


@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize("dtype", [*FLOATS, jnp.int8], ids=lambda d: np.dtype(d).name)
def test_skinny_products(dtype, tokens):
    x, rows = jnp.asarray(RNG.integers(-9, 9, size=(tokens, 6)), dtype), jnp.asarray(ROWS, dtype)
    made = skinny_dot(x, rows)
    assert made.dtype == (jnp.int32 if dtype == jnp.int8 else jnp.float32)
    np.testing.assert_array_equal(made, np.asarray(x, np.float32) @ ROWS.T)
    h = jnp.asarray(RNG.integers(-9, 9, size=(tokens, 12)), dtype)
    back = skinny_dot_transposed(h, rows)
    assert back.dtype == made.dtype
    np.testing.assert_array_equal(back, np.asarray(h, np.float32) @ ROWS)


def test_one_row_of_a_narrow_dtype_is_multiplied_as_two():
    for dtype, columns in ((jnp.bfloat16, 2), (jnp.float32, 1)):
        jaxpr = jax.make_jaxpr(skinny_dot)(jnp.ones((1, 6), dtype), jnp.ones((12, 6), dtype))
        (product,) = (e for e in jaxpr.eqns if e.primitive.name == "dot_general")
        assert product.outvars[0].aval.shape == (12, columns)
        # The matrix stands on the left.
        assert product.invars[0].aval.shape == (12, 6)


def test_integers_have_no_precision_that_is_asked_for_around():
    with jax.default_matmul_precision("highest"):
        jaxpr = jax.make_jaxpr(skinny_dot)(jnp.ones((2, 6), jnp.int8), jnp.ones((12, 6), jnp.int8))
    (product,) = (e for e in jaxpr.eqns if e.primitive.name == "dot_general")
    assert product.params["precision"] in ((jax.lax.Precision.DEFAULT,) * 2, None)


def test_dtypes_of_sums():
    assert accumulation_dtype(jnp.int8, jnp.int8) == jnp.int32
    assert accumulation_dtype(jnp.bfloat16, jnp.bfloat16) == jnp.float32
    assert accumulation_dtype(jnp.float32, jnp.int8) == jnp.float32
    assert wide_dtype(jnp.bfloat16, jnp.float16) == jnp.float32
    assert wide_dtype(jnp.float32, np.float64) == np.float64


# --- chosen rows ---


@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8], ids=lambda d: np.dtype(d).name)
def test_slabs_are_the_chosen_groups_one_after_the_other(group, dtype):
    index = jnp.asarray([2, 0, 2, 3], jnp.int32)
    made = slabs.slabs_of(jnp.asarray(ROWS, dtype), index, group)
    want = ROWS.reshape(12 // group, group, 6)[np.asarray(index)].reshape(-1, 6)
    np.testing.assert_array_equal(np.asarray(made, np.float32), want)
    assert made.dtype == dtype


@pytest.mark.parametrize("count", [1, 4, 5])
def test_slabs_in_two_steps_are_the_same(count, monkeypatch):
    """What a TPU runs, here."""
    monkeypatch.setattr(slabs.lax, "platform_dependent", lambda *operands, tpu, default: tpu(*operands))
    index = jnp.asarray(RNG.integers(0, 12, count), jnp.int32)
    np.testing.assert_array_equal(slabs.slabs_of(jnp.asarray(ROWS), index, 1), ROWS[np.asarray(index)])


@pytest.mark.parametrize("tokens", [1, 3, slabs._UNROLLED_TOKENS + 1])
def test_each_token_has_its_own_rows(tokens):
    x, index = jnp.asarray(RNG.normal(size=(tokens, 6)), jnp.float32), jnp.asarray(RNG.integers(0, 12, (tokens, 2)))
    made = slabs.each_token(lambda one, own: one @ jnp.asarray(ROWS)[own].T, x, index)
    want = np.stack([np.asarray(x)[t] @ ROWS[np.asarray(index)[t]].T for t in range(tokens)])
    np.testing.assert_allclose(made, want, rtol=1e-5)


def test_rows_are_walked_in_blocks_where_they_are_many():
    rows = jax.ShapeDtypeStruct((1 << 20, 4096), jnp.float32)
    assert slabs.block_of(rows, jax.ShapeDtypeStruct((4096,), jnp.int32), 1) == 4096
    assert slabs.block_of(rows, jax.ShapeDtypeStruct((4097,), jnp.int32), 1) == 64
    assert slabs.block_of(rows, jax.ShapeDtypeStruct((4097,), jnp.int32), 128) == 1


WRONG = {
    "rows": (
        (ROWS[None], np.zeros(2, np.int32), 1, 1),
        ValueError,
        r"f: rows has shape \(1, 12, 6\); expected \[n, d\]",
    ),
    "groups": ((ROWS, np.zeros(2, np.int32), 5, 1), ValueError, "group_size=5 does not divide the 12 rows"),
    "no groups": ((ROWS, np.zeros(2, np.int32), 0, 1), ValueError, "group_size=0"),
    "tokens": ((ROWS, np.zeros((2, 2), np.int32), 1, 3), ValueError, r"expected \[K\] or \[3, K\]"),
    "floats": ((ROWS, np.zeros(2, np.float32), 1, 1), TypeError, "index has dtype float32; expected integers"),
}


@pytest.mark.parametrize("name", WRONG)
def test_rows_and_an_index_that_do_not_fit(name):
    (rows, index, group, tokens), error, words = WRONG[name]
    with pytest.raises(error, match=words):
        slabs.check_rows("f", rows, index, group, tokens)
    slabs.check_rows("f", ROWS, np.zeros((3, 2), np.int32), 2, 3)


def test_parts_of_narrow_matrices_are_read_where_they_lie():
    def read(rows, at):
        return jax.lax.dynamic_slice_in_dim(rows, at, 2)

    for dtype, barrier in ((jnp.bfloat16, True), (jnp.int8, True), (jnp.float32, False), (jnp.float16, False)):
        assert sliced_on_cpu(dtype) is not barrier
        rows = jnp.asarray(ROWS, dtype)
        text = str(jax.make_jaxpr(lambda r, i: read_part(read, r, i))(rows, 3))
        assert ("optimization_barrier" in text) is barrier
        np.testing.assert_array_equal(read_part(read, rows, 3), rows[3:5])


# --- the rest ---


@pytest.mark.parametrize("n", [3, 5000])
def test_a_maximum_keeps_a_nan(n):
    values = np.zeros((2, n), np.float32)
    values[0, n // 2], values[1, 1] = np.nan, 7
    found = largest_or_nan(jnp.asarray(values), axis=1, keepdims=True)
    assert found.shape == (2, 1)
    np.testing.assert_array_equal(found[:, 0], [np.nan, 7])
    assert np.isnan(float(largest_or_nan(jnp.asarray(values))))


def test_one_device_has_all_there_is():
    values = jnp.arange(6).reshape(2, 3)
    for same in (ONE.largest(values), ONE.total(values), ONE.gathered(values, 1)):
        assert same is values
    assert ONE.number() == 0
    np.testing.assert_array_equal(ONE.ids(values, 3, cyclic=True), values)
    np.testing.assert_array_equal(ONE.ids(values, 3, cyclic=False), values)


def test_promotion_is_the_usual_one_inside_only():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        with usual_promotion():
            assert (jnp.ones((2, 2), jnp.float32) + jnp.ones(2, jnp.bfloat16)).dtype == jnp.float32
        with pytest.raises(Exception, match="promotion"):
            jnp.ones((2,), jnp.float32) + jnp.ones(2, jnp.bfloat16)


def test_an_eager_primitive_is_compiled_by_itself_under_disable_jit_as_well():
    twice = Primitive("twice_for_a_test")
    traced = []

    def lowered(x, *, by):
        traced.append(by)
        return x * by

    twice.def_abstract_eval(lambda x, *, by: x)
    twice.def_impl(compiled_alone(twice, "by"))
    jax.interpreters.mlir.register_lowering(twice, jax.interpreters.mlir.lower_fun(lowered, multiple_results=False))
    assert float(twice.bind(jnp.float32(3), by=2)) == 6
    with jax.disable_jit():
        assert float(twice.bind(jnp.float32(4), by=2)) == 8
    assert traced == [2]
