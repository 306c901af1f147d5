"""The native kernels give what the portable forms do, on every instruction set that this processor has."""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hire_xform.lowering.kernels.cpu import _stored_rows_served, library, steps
from hire_xform.lowering.predict.few_bits import entries, fine_scores, pack_nibbles, quantize, quantized_scores
from hire_xform.lowering.primitives.combine_rows import combine_rows
from hire_xform.lowering.primitives.da_top_k import da_top_k
from hire_xform.lowering.primitives.open_rows import open_rows
from hire_xform.lowering.primitives.select_rows import select_rows_dot
from hire_xform.lowering.primitives.stored_rows import Operation, StoredRows

SETS = library.instruction_sets()
if not SETS and shutil.which("c++") and os.environ.get("HIRE_REQUIRE_EXTRAS"):
    raise RuntimeError(f"the native kernels are missing: {library.load()}")
pytestmark = pytest.mark.skipif(not SETS, reason=f"no native kernels: {library.load()}")


@pytest.fixture(params=SETS, autouse=True)
def instruction_set(request, portable_forms):
    library.use(request.param)
    yield request.param
    library.use()


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# Tokens, rows, columns: odd ones, one of each, more columns than integer sums take at once, more tokens than one pass.
SHAPES = [(1, 1, 1), (1, 7, 3), (2, 130, 65), (3, 200, 64), (5, 67, 127), (70, 33, 100), (1, 5, 140_000), (4, 2, 8)]


@pytest.mark.any_jax("loops in C++; a few cases say that they are called alike", every=8)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("tokens", "n", "d"), SHAPES)
def test_scores(tokens, n, d, bits):
    x, rows = normal(0, tokens, d), normal(1, n, d)
    rows = rows.at[n // 2].set(jnp.nan) if n > 1 else rows
    x = x.at[0].set(0.0) if tokens > 1 else x
    x = x.at[2, 0].set(jnp.inf) if tokens > 2 else x
    q, scale = quantize(rows, 127 if bits == 8 else 7)
    q = q if bits == 8 else pack_nibbles(q)
    # XLA is free to round the two scales' product first, which is the last place of it.
    np.testing.assert_allclose(
        steps.quantized_scores(x, q, scale, bits), quantized_scores(x, q, scale, bits), rtol=1e-6
    )
    (got, kept), (want, kept_there) = steps.fine_scores(x, q, scale, bits), fine_scores(x, q, scale, bits)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    step = np.nanmax(np.where(np.isfinite(x), np.abs(x), np.nan), axis=1, keepdims=True, initial=0.0) / 127.0 / 254.0
    # Where a limb falls between two integers, either is right: tokens kept are then a step apart, and scores with them.
    finite = np.isfinite(np.asarray(kept_there))
    apart = np.abs(np.asarray(kept) - np.asarray(kept_there))
    assert (apart[finite] <= np.broadcast_to(1.01 * step, apart.shape)[finite]).all()
    exact = np.asarray(kept, np.float64) @ (np.asarray(entries(q, bits, d), np.float64) * np.asarray(scale)[:, None]).T
    known = np.isfinite(np.asarray(got))
    size = (
        np.abs(np.nan_to_num(np.asarray(x), posinf=0.0)).astype(np.float64) @ np.abs(np.nan_to_num(np.asarray(rows))).T
    )
    assert (np.abs(np.asarray(got) - exact)[known] <= 1e-6 * size[known] + 1e-6).all()


@pytest.mark.any_jax("loops in C++; a few cases say that they are called alike", every=8)
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize(
    "dtype",
    [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int8],
    ids=lambda t: t.__name__,
)
@pytest.mark.parametrize(
    ("tokens", "n", "d", "k", "group"),
    [(1, 8, 1, 3, 1), (1, 40, 33, 8, 1), (3, 40, 130, 5, 2), (8, 64, 64, 9, 4), (2, 16, 17, 0, 1)],
)
def test_chosen_rows(tokens, n, d, k, group, dtype, own):
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(n, d)) * (40.0 if dtype is jnp.int8 else 1.0)
    rows = jnp.asarray(np.clip(np.round(rows), -128, 127) if dtype is jnp.int8 else rows).astype(dtype)
    wide, x, h = rows.astype(jnp.float32), normal(3, tokens, d), normal(4, tokens, k * group)
    index = jnp.asarray(rng.integers(0, n // group, (tokens, k) if own else (k,)), jnp.int32)
    for magnitudes in (False, True):
        got = steps.select_rows_dot(x, rows, index, group, magnitudes)
        want = select_rows_dot(x, wide, index, group_size=group, magnitudes=magnitudes) if k else got
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * float(jnp.abs(wide).max()) * d)
    got = steps.combine_rows(h, rows, index, group)
    want = combine_rows(h, wide, index, group_size=group) if k else jnp.zeros((tokens, d))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * float(jnp.abs(wide).max()) * (k * group + 1))
    np.testing.assert_allclose(steps.products(x, rows), x @ wide.T, rtol=1e-4, atol=1e-4 * float(jnp.abs(wide).max()))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float8_e4m3fn, jnp.float8_e5m2], ids=lambda t: t.__name__)
def test_every_number_of_a_narrow_float(dtype):
    """Subnormal numbers, infinities and NaNs, too, though XLA's threads take small numbers of f32 for zero."""
    unsigned = np.uint16 if jnp.dtype(dtype).itemsize == 2 else np.uint8
    numbers = np.arange(np.iinfo(unsigned).max + 1).astype(unsigned).view(jnp.dtype(dtype)).reshape(-1, 1)
    wide = numbers.astype(np.float32)[:, 0]
    # Scaled, so that what is compared is no subnormal number itself.
    got = steps.products(jnp.full((1, 1), 2.0**20, jnp.float32), jnp.asarray(numbers))[0]
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        np.testing.assert_array_equal(got, wide * np.float32(2.0**20))


@pytest.mark.any_jax("loops in C++; a few cases say that they are called alike", every=7)
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int4], ids=lambda t: t.__name__)
@pytest.mark.parametrize(("tall", "wide"), [(1, 1), (4, 1), (1, 128), (16, 128), (2, 64)])
def test_rows_of_integers_times_a_scale_are_the_weights_that_a_program_makes(tall, wide, dtype):
    n, d = 16, 128
    rng = np.random.default_rng(8)
    least = jnp.iinfo(dtype).min
    rows, scale = jnp.asarray(rng.integers(least, -least, (n, d)), dtype), normal(9, n // tall, d // wide)
    weights = rows.astype(jnp.float32) * jnp.repeat(jnp.repeat(scale, tall, 0), wide, 1)
    x, h, index = normal(10, 3, d), normal(11, 3, 4), jnp.asarray([5, 0, 15, 9], jnp.int32)
    for magnitudes in (False, True):
        got = steps.select_rows_dot(x, rows, index, 1, magnitudes, scale)
        want = select_rows_dot(x, weights, index, magnitudes=magnitudes)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-3)
    got = steps.combine_rows(h, rows, index, 1, scale)
    np.testing.assert_allclose(got, combine_rows(h, weights, index), rtol=1e-5, atol=1e-3)
    many = jnp.stack([x, 2.0 * x])
    got = jax.vmap(lambda x: steps.select_rows_dot(x, rows, index, 1, False, scale))(many)
    np.testing.assert_allclose(got[1], 2.0 * got[0], rtol=1e-5, atol=1e-3)
    # One that does not fit is refused, before it is read.
    with pytest.raises(jax.errors.JaxRuntimeError, match="takes a scale"):
        jax.block_until_ready(steps.select_rows_dot(x, rows, index, 1, False, normal(12, 3, 128)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda t: t.__name__)
def test_rows_that_a_program_scales_in_16_bits(dtype):
    n, d = 16, 128
    values = jnp.asarray(np.random.default_rng(8).integers(-128, 128, (n, d)), jnp.int8)
    operations = Operation("convert", jnp.dtype(dtype)), Operation("mul", jnp.dtype(dtype))
    rows = StoredRows(values, (normal(9, n, 1).astype(dtype),), operations, (False,))
    x, h, index = normal(10, 3, d).astype(dtype), normal(11, 3, 4).astype(dtype), jnp.asarray([5, 0, 15, 9], jnp.int32)
    got = jax.jit(select_rows_dot)(x, rows, index)
    assert got.dtype == dtype
    want = x.astype(jnp.float32) @ rows.dense()[index].astype(jnp.float32).T
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=0.02, atol=0.01 * float(jnp.abs(want).max()))
    want = h.astype(jnp.float32) @ rows.dense()[index].astype(jnp.float32)
    got = jax.jit(combine_rows)(h, rows, index).astype(jnp.float32)
    np.testing.assert_allclose(got, want, rtol=0.02, atol=0.01 * float(jnp.abs(want).max()))


def test_which_stored_rows_are_served():
    def of(name, dtype=jnp.float32):
        return Operation(name, jnp.dtype(dtype))

    def served(scale, *operations, dtype=jnp.int8, d=128):
        x, index, values = normal(0, 2, d), jnp.zeros(3, jnp.int32), jnp.zeros((8, d), dtype)
        return _stored_rows_served(x, index, values, *scale, operations=operations, shared=())

    per_row = [normal(1, 8, 1)]
    assert served(per_row, of("mul"))
    assert served(per_row, of("convert", jnp.bfloat16), of("mul"))
    assert served(per_row, of("mul"), dtype=jnp.int4)
    assert not served(per_row, of("mul"), dtype=jnp.int4, d=127)
    assert served([normal(1, 8, 2)], of("mul"))
    assert not served([normal(1, 8, 4)], of("mul"))
    assert not served(per_row, of("div"))
    assert served(per_row, of("convert", jnp.bfloat16), of("mul", jnp.bfloat16))
    assert not served(per_row, of("mul", jnp.float64))
    assert not served(per_row, of("convert", jnp.float8_e4m3fn), of("mul"))
    assert not served([*per_row, *per_row], of("sub"), of("mul"))
    assert not served(per_row, of("mul"), dtype=jnp.float8_e4m3fn)


@pytest.mark.parametrize(
    ("shape", "k", "shards"),
    [((1,), 1, 1), ((5,), 3, 1), ((3, 64), 17, 1), ((2, 1_500), 375, 1), ((2, 40_000), 300, 1), ((4, 96), 12, 4)],
)
def test_the_largest(shape, k, shards):
    scores = np.round(np.random.default_rng(5).normal(size=shape), 1).astype(np.float32)
    if scores.size > 20:
        scores.flat[[3, 7, 9, 11, 12]] = np.nan, np.copysign(np.nan, -1.0), np.inf, -0.0, 0.0
    got, want = steps.top_k(jnp.asarray(scores), k, shards), da_top_k(jnp.asarray(scores), k, shards)
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_array_equal(got[0], want[0])


SCORES = ["all equal", "mostly NaN", "not in a sample", "only in a sample", "falling", "mostly zero", "denormals too"]


@pytest.mark.parametrize("how", SCORES)
@pytest.mark.parametrize("n", [8_192, 40_960])
def test_the_largest_where_a_sample_misleads(n, how):
    size = min(2_048, n // 16)
    step = n // size
    scores = np.zeros(n, np.float32)
    if how == "mostly NaN":
        scores[::3] = np.nan
        scores[::step] = np.nan
    elif how == "not in a sample":
        scores[1::step] = np.arange(size)
        scores[::step] = -1.0
    elif how == "only in a sample":
        scores[::step] = np.arange(size)
    elif how == "falling":
        scores = np.linspace(1.0, -1.0, n, dtype=np.float32)
    elif how == "mostly zero":
        scores[5:n:20] = np.arange(n // 20 + 1)[: len(scores[5:n:20])]
    elif how == "denormals too":
        scores[5:n:20] = 1.0
        scores[7:n:40] = 1e-40
    got, want = steps.top_k(jnp.asarray(scores), 700), da_top_k(jnp.asarray(scores), 700)
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_array_equal(got[0], want[0])
    values, index = steps.top_k(jnp.asarray(scores), 700, ordered=False)
    np.testing.assert_array_equal(np.sort(index), np.sort(want[1]))
    np.testing.assert_array_equal(values, scores[np.asarray(index)])


@pytest.mark.parametrize("how", ["ties", "zeros of both signs", "NaN", "all masked", "the last"])
@pytest.mark.parametrize("shape", [(1,), (3, 17), (2, 3, 1_025), (2, 70_000)])
def test_the_arg_max(shape, how):
    values = np.random.default_rng(7).normal(size=shape).astype(np.float32)
    flat = values.reshape(-1, shape[-1])
    if how == "ties":
        values = np.round(values)
    elif how == "zeros of both signs":
        values = np.where(values > 0, 0.0, np.copysign(0.0, -1.0)).astype(np.float32)
    elif how == "NaN":
        flat[-1, shape[-1] // 2 :: 5] = np.copysign(np.nan, -1.0)
    elif how == "all masked":
        values = np.full(shape, -np.inf, np.float32)
    else:
        flat[:, -1] = np.inf
    got = steps.arg_max(jnp.asarray(values))
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, np.argmax(values, axis=-1))
    if len(shape) > 1:
        np.testing.assert_array_equal(jax.vmap(steps.arg_max)(jnp.asarray(values)), got)


@pytest.mark.any_jax("loops in C++; a few cases say that they are called alike", every=5)
@pytest.mark.parametrize("n", [1, 31, 1000, 40_000, 100_001])
@pytest.mark.parametrize("how", ["few", "all", "none", "NaN"])
def test_open_rows(n, how):
    values = np.random.default_rng(8).normal(size=n).astype(np.float32) - np.float32({"few": 2.0}.get(how, 0.0))
    if how == "NaN":
        values[::7], values[::11] = np.nan, -0.0
    else:
        values = {"few": values, "all": np.abs(values), "none": -np.abs(values) - 1}[how]
    (got, count), (want, number) = steps.open_rows(jnp.asarray(values)), open_rows(jnp.asarray(values))
    assert int(count) == int(number) == np.sum(~(values < 0))
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(got[: int(count)], np.flatnonzero(~(values < 0)))


@pytest.mark.parametrize("which", ["x", "index", "x and index", "rows", "all"])
def test_tokens_of_all_examples_are_taken_together_under_vmap(which):
    x, rows, index = normal(0, 3, 2, 8), normal(1, 3, 16, 8), jnp.asarray([[1, 2], [3, 3], [0, 15]], jnp.int32)
    axes = {"x": (0, None, None), "index": (None, None, 0), "x and index": (0, None, 0), "rows": (None, 0, None)}
    axes = axes.get(which, (0, 0, 0))
    given = [a if axis == 0 else a[0] for a, axis in zip((x, rows, index), axes, strict=True)]
    got = jax.vmap(lambda *a: steps.select_rows_dot(*a, 1), in_axes=axes)(*given)
    want = jax.vmap(lambda x, rows, index: x @ rows[index].T, in_axes=axes)(*given)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    got, _ = jax.vmap(lambda x: steps.fine_scores(x, *quantize(rows[0], 127), 8))(x)
    np.testing.assert_allclose(got, x @ rows[0].T, atol=0.2)


def test_an_index_out_of_range_is_an_error_and_no_read():
    with pytest.raises(jax.errors.JaxRuntimeError, match="index 8 is out of range for 8 groups"):
        jax.block_until_ready(steps.select_rows_dot(normal(0, 1, 4), normal(1, 8, 4), jnp.asarray([8], jnp.int32), 1))


@pytest.mark.any_jax("loops in C++; a few cases say that they are called alike", every=3)
def test_results_repeat_whatever_the_threads_do():
    rows, h, index = normal(0, 4_096, 512), normal(1, 2, 1_000), jnp.arange(1_000, dtype=jnp.int32) * 4
    first = steps.combine_rows(h, rows, index, 1)
    for _ in range(20):
        np.testing.assert_array_equal(steps.combine_rows(h, rows, index, 1), first)
