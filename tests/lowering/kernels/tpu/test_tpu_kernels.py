"""The TPU's kernels give what the portable forms do, run by Pallas' interpreters on the CPU."""

import contextlib
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import hire_xform as hx
from hire_xform.lowering.kernels import tpu
from hire_xform.lowering.kernels.tpu import block, numbering, placing, rows, scores, shapes, top_k
from hire_xform.lowering.kernels.tpu.open_rows import open_rows
from hire_xform.lowering.kernels.tpu.slabs import Slabs
from hire_xform.lowering.predict.few_bits import (
    entries,
    fine_scores,
    pack_nibbles,
    quantize,
    quantized_scores,
    scores_in_two,
)
from hire_xform.lowering.primitives.chosen_block import chosen_block
from hire_xform.lowering.primitives.combine_rows import combine_rows
from hire_xform.lowering.primitives.da_top_k import da_top_k
from hire_xform.lowering.primitives.kernels import _built_in as built_in
from hire_xform.lowering.primitives.kernels import backends, register_kernel
from hire_xform.lowering.primitives.open_rows import open_rows as portable_open_rows
from hire_xform.lowering.primitives.select_rows import select_rows_dot
from hire_xform.lowering.primitives.stack_entry import StackEntry, whole
from hire_xform.lowering.primitives.stored_rows import Operation, StoredRows

pytestmark = pytest.mark.any_jax("cases vary shapes and dtypes of a few kernels", every=3)

F32, BF16, INT32 = jnp.float32, jnp.bfloat16, jnp.int32
# As a TPU has it: memory of its own, copies that take their time, and an error for an index out of range.
TPU = pltpu.InterpretParams()
# That one can't see rows of 16 bits as words of 32; this one can.
PLAIN = True


@pytest.fixture(autouse=True)
def _alone(portable_forms, monkeypatch):
    # Nor where an operand is to lie.
    for module in (rows, scores, block):
        assert module.in_hbm is placing.in_hbm
        monkeypatch.setattr(module, "in_hbm", lambda matrix: matrix)
    yield
    jax.clear_caches()


@pytest.fixture
def as_cpu():
    """Puts the TPU's kernels in place of the CPU's, interpreted: those of some steps, or all."""
    removed, stack = [], contextlib.ExitStack()
    tpu.install.__wrapped__()
    own = {step: kernel for (step, platform), kernel in built_in.items() if platform == "tpu"}

    def put(*steps):
        asked = types.SimpleNamespace(served=[])
        for step in steps or own:

            def serves(*structs, kernel=own[step], **settings):
                asked.served.append(kernel.serves(*structs, **settings))
                return asked.served[-1]

            removed.append(register_kernel(step, "cpu", own[step].rule, serves))
        stack.enter_context(pltpu.force_tpu_interpret_mode(PLAIN))
        return asked

    with stack:
        yield put
    for remove in removed:
        remove()


def normal(seed, *shape, dtype=F32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def chosen(count, of, seed=3):
    return jnp.asarray(np.random.default_rng(seed).permutation(of)[:count], INT32)


def interpreted(mode, fun, *operands):
    with pltpu.force_tpu_interpret_mode(mode):
        return jax.jit(fun)(*operands)


# Slabs of 8 rows, single ones, a tail of a step, tokens wider than rows, single rows of 16 bits, and slabs of two.
ROWS = [
    (TPU, F32, F32, 1, 8, 5),
    (TPU, F32, BF16, 2, 1, 131),
    (PLAIN, BF16, BF16, 1, 8, 20),
    (PLAIN, BF16, F32, 3, 16, 3),
    (PLAIN, BF16, BF16, 2, 1, 37),
    (PLAIN, BF16, F32, 1, 2, 6),
]


@pytest.mark.parametrize(("mode", "dtype", "given", "tokens", "group", "count"), ROWS)
def test_chosen_rows(mode, dtype, given, tokens, group, count):
    n, d = 64 * max(group, 4), 128
    matrix, x, index = normal(0, n, d, dtype=dtype), normal(1, tokens, d, dtype=given), chosen(count, n // group)
    h = normal(2, tokens, count * group, dtype=given)
    assert shapes.rows_served(x, matrix, index, group_size=group)
    assert shapes.rows_served(h, matrix, index, group_size=group)
    got = interpreted(mode, functools.partial(rows.select_rows_dot, group=group, magnitudes=False), x, matrix, index)
    want = select_rows_dot(x, matrix, index, group_size=group, preferred_element_type=F32)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
    got = interpreted(mode, functools.partial(rows.combine_rows, group=group), h, matrix, index)
    want = combine_rows(h, matrix, index, group_size=group, preferred_element_type=F32)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


INT8 = (Operation("convert", BF16), Operation("mul", F32))


# Scales of each row, of four, of sixteen; of each column, in a stack of two; single rows.
@pytest.mark.parametrize(
    ("given", "tokens", "group", "scales"),
    [(BF16, 1, 8, (256, 1)), (F32, 2, 8, (64, 1)), (F32, 1, 4, (16, 1)), (BF16, 2, 8, (2, 128)), (F32, 1, 1, (256, 1))],
)
def test_chosen_rows_of_int8(given, tokens, group, scales):
    n, d, count = 256, 128, 13
    values = jnp.asarray(np.random.default_rng(0).integers(-128, 128, (n, d)), jnp.int8)
    stored = StoredRows(values, (normal(1, *scales) ** 2,), INT8, (scales[1] > 1,))
    x, h = normal(2, tokens, d, dtype=given), normal(3, tokens, count * group, dtype=given)
    # All in the second half.
    index = n // group // 2 + chosen(count, n // group // 2)
    settings = {"group_size": group, "operations": INT8, "shared": stored.shared}
    assert shapes.stored_rows_served(x, index, values, *stored.others, **settings)
    magnitudes = tokens == 2
    got = interpreted(
        PLAIN, lambda *a: rows.select_rows_dot(*a[:3], group, magnitudes, a[3]), x, values, index, *stored.others
    )
    want = select_rows_dot(x, stored, index, group_size=group, preferred_element_type=F32, magnitudes=magnitudes)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-3)
    got = interpreted(PLAIN, lambda *a: rows.combine_rows(*a[:3], group, a[3]), h, values, index, *stored.others)
    want = combine_rows(h, stored, index, group_size=group, preferred_element_type=F32)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-3)


# A gate; a tail of a step, single rows of 16 bits, in a stack; slabs of two rows, three terms of a factor; single rows.
BLOCKS = [
    (F32, F32, 1, 2, 8, 5, False),
    (BF16, BF16, 1, 2, 1, 137, True),
    (BF16, F32, 3, 1, 2, 6, False),
    (F32, F32, 2, 1, 1, 131, True),
]


@pytest.mark.parametrize(("dtype", "given", "tokens", "ups", "group", "count", "stacked"), BLOCKS)
def test_a_block_is_one_kernel(as_cpu, dtype, given, tokens, ups, group, count, stacked):
    n, d = 64 * max(group, 4), 128
    matrices = [normal(i, 2 * n if stacked else n, d, dtype=dtype) / 8 for i in range(ups + 1)]
    x, index, bias = normal(5, tokens, d, dtype=given), chosen(count, n // group), normal(6, count * group, dtype=given)

    def run(x, index, first):
        def activation(hiddens):
            return functools.reduce(jnp.multiply, [jax.nn.relu(hiddens[0] + bias), *hiddens[1:]])

        starts = [first if stacked else 0] * (ups + 1)
        settings = {"group_size": group, "dtypes": [given] * ups, "out_dtype": F32}
        return chosen_block([x] * ups, matrices[:-1], matrices[-1], index, starts, activation, **settings)

    first = jnp.int32(n // group)
    want = jax.jit(run)(x, index, first)
    kernels = as_cpu("hire_chosen_block")
    program = jax.jit(run).lower(x, index, first)
    assert kernels.served == [True]
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if given == BF16 else {"rtol": 1e-5, "atol": 1e-4}
    np.testing.assert_allclose(program.compile()(x, index, first), want, **tolerance)
    batched = jax.vmap(run, (0, None, None))(jnp.stack([x, x]), index, first)
    np.testing.assert_allclose(batched[1], want, **tolerance)


def test_a_user_s_kernel_for_a_part_of_a_block_is_asked(as_cpu):
    index, x, matrix = chosen(4, 8), normal(0, 1, 128), normal(1, 64, 128)

    def run(x):
        return chosen_block(
            [x], [matrix], matrix, index, [0, 0], lambda h: h[0], group_size=8, dtypes=[F32], out_dtype=F32
        )

    kernels = as_cpu("hire_chosen_block")
    remove = register_kernel(
        "hire_combine_rows", "tpu", lambda h, rows, index, **settings: 0.0 * h @ rows[: h.shape[1]]
    )
    try:
        jax.jit(run).lower(x)
    finally:
        remove()
    jax.clear_caches()
    jax.jit(run).lower(x)
    assert kernels.served == [False, True]


@pytest.mark.parametrize(
    ("slabs", "words", "steps", "single"),
    [
        (Slabs(65, 8, 128, BF16), 4, 5, False),
        (Slabs(128, 1, 128, BF16), 1, 1, True),
        (Slabs(3, 8, 128, jnp.int8), 2, 1, False),
        (Slabs(129, 1, 128, F32), 1, 2, False),
    ],
)
def test_slabs_are_whole_words_and_steps_128_rows(slabs, words, steps, single):
    assert (slabs.words, slabs.steps, slabs.single) == (words, steps, single)
    assert slabs.held().shape == (shapes.AHEAD, slabs.a_step * words, 128)
    assert shapes.bytes_of_slabs(slabs.count, slabs.group, 128, slabs.dtype) == slabs.count * words * 4 * 128


def test_magnitudes_own_choices_and_many_tokens():
    matrix, x = normal(0, 64, 128), normal(1, 17, 128)
    for index in (chosen(5, 64), jnp.stack([chosen(5, 64, seed) for seed in range(2)])):
        given = x if index.ndim == 1 else x[:2]
        fun = functools.partial(rows.select_rows_dot, group=1, magnitudes=True)
        want = select_rows_dot(given, matrix, index, magnitudes=True)
        np.testing.assert_allclose(interpreted(PLAIN, fun, given, matrix, index), want, rtol=1e-5)


def test_under_vmap_tokens_are_taken_together():
    matrix, x, index = normal(0, 64, 128), normal(1, 3, 2, 128), chosen(5, 64)
    fun = jax.vmap(functools.partial(rows.select_rows_dot, group=1, magnitudes=False), (0, None, None))
    assert str(jax.make_jaxpr(fun)(x, matrix, index)).count("pallas_call[") == 1
    want = jax.vmap(lambda x: select_rows_dot(x, matrix, index))(x)
    np.testing.assert_allclose(interpreted(PLAIN, fun, x, matrix, index), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("row", [8, 3])
def test_what_no_copy_wrote_counts_for_nothing(row):
    """A tail of a step follows a row that holds a NaN, which is in a place that the tail does not write."""
    matrix = normal(0, 256, 128).at[row].set(jnp.nan)
    index = jnp.concatenate([jnp.array([5, row] * 64), chosen(3, 256) + 0]).astype(INT32)
    h = jnp.ones((1, 131)).at[0, :128].set(0.0)
    got = interpreted(TPU, functools.partial(rows.combine_rows, group=1), h, matrix, index)
    assert np.isnan(got).all()  # zero times NaN, as in the portable form
    index = index.at[:128].set(5).at[127].set(7)
    got = interpreted(TPU, functools.partial(rows.combine_rows, group=1), h, matrix, index)
    np.testing.assert_allclose(got, combine_rows(h, matrix, index), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tokens", "d", "n", "bits"), [(1, 128, 200, 8), (3, 256, 130, 4), (17, 128, 128, 8)])
def test_scores(tokens, d, n, bits):
    x, matrix = normal(0, tokens, d), normal(1, n, d).at[n // 2].set(jnp.nan)
    x = x.at[1].set(0.0).at[2, 0].set(jnp.inf) if tokens > 2 else x
    q, scale = quantize(matrix, 127 if bits == 8 else 7)
    q = q if bits == 8 else pack_nibbles(q)
    assert shapes.scores_served(x[:16], q, scale, bits=bits)
    got = interpreted(TPU, functools.partial(scores.quantized_scores, bits=bits), x, q, scale)
    np.testing.assert_allclose(got, quantized_scores(x, q, scale, bits), rtol=1e-6)
    got, kept = interpreted(TPU, functools.partial(scores.fine_scores, bits=bits), x, q, scale)
    want, also_kept = fine_scores(x, q, scale, bits)
    # Where a limb falls between two integers, either is right: tokens kept are then a step apart.
    step = np.nanmax(np.where(np.isfinite(x), np.abs(x), 0.0), axis=1, keepdims=True) / 127.0 / 254.0
    assert (np.abs(np.nan_to_num(kept) - np.nan_to_num(also_kept)) <= 1.01 * step).all()
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    exact = np.asarray(kept, np.float64) @ (np.asarray(entries(q, bits, d), np.float64) * np.asarray(scale)[:, None]).T
    size = np.abs(np.nan_to_num(x, posinf=0.0)) @ np.abs(entries(q, bits, d) * np.nan_to_num(scale)[:, None]).T
    assert (np.abs(np.nan_to_num(got) - np.nan_to_num(exact)) <= 1e-6 * size + 1e-6).all()


def test_rows_of_several_blocks_and_a_last_one_that_is_not_whole(monkeypatch):
    monkeypatch.setattr(shapes, "_SCORED_BYTES", 128 * 128)
    x, (q, scale) = normal(0, 1, 128), quantize(normal(1, 300, 128), 127)
    assert shapes.scored_together(300, 128) == 128
    got = interpreted(TPU, functools.partial(scores.quantized_scores, bits=8), x, q, scale)
    np.testing.assert_allclose(got, quantized_scores(x, q, scale, 8), rtol=1e-6)


@pytest.mark.parametrize(("tokens", "d", "r", "n", "stacked"), [(1, 256, 128, 300, True), (3, 128, 256, 128, False)])
def test_scores_of_scores_are_one_kernel(monkeypatch, tokens, d, r, n, stacked):
    """Of several blocks each, the last of which is not whole; tokens of zeros, and with an infinity."""
    monkeypatch.setattr(shapes, "_SCORED_BYTES", 128 * 128)
    x = normal(0, tokens, d)
    x = x.at[1].set(0.0).at[2, 0].set(jnp.inf) if tokens > 2 else x
    basis, of_rows = (quantize(normal(i, 2, *of), 127) for i, of in enumerate([(r, d), (n, r)], 1))
    given = [
        a for q, scale in (basis, of_rows) for a in (StackEntry(q, (jnp.int32(1),)) if stacked else q[1], scale[1])
    ]
    plain = [whole(a) for a in given]
    assert shapes.scores_in_two_served(x, *plain)
    got = interpreted(TPU, scores.scores_in_two, x, *given)
    np.testing.assert_allclose(got, scores_in_two(x, *plain), rtol=1e-4, atol=1e-3 * r)


def test_rows_of_a_stack_are_read_where_they_lie():
    x, matrices = normal(0, 1, 128), normal(1, 2, 3, 160, 128)
    q, scale = quantize(matrices, 127)
    entry = StackEntry(q, (jnp.int32(1), jnp.int32(2)))
    got = interpreted(TPU, functools.partial(scores.quantized_scores, bits=8), x, entry, scale[1, 2])
    np.testing.assert_allclose(got, quantized_scores(x, q[1, 2], scale[1, 2], 8), rtol=1e-6)


@pytest.mark.parametrize(("n", "k", "shards"), [(3000, 37, 1), (1024, 200, 4), (20_000, 130, 1), (128, 128, 1)])
def test_the_largest(n, k, shards):
    """Rounded, so that many are equal; with infinities, NaNs of either sign, and zeros of either."""
    values = np.random.default_rng(0).normal(size=(2, n)).round(1).astype(np.float32)
    values[0, 5], values[0, 70], values[1, 7], values[1, 8] = np.nan, -np.nan, np.inf, -np.inf
    values[0, 30:60], values[1, n // 3 :] = -0.0, 0.0
    assert shapes.top_k_served(jax.ShapeDtypeStruct(values.shape, F32), k=k, shards=shards)
    got, index = interpreted(TPU, functools.partial(top_k.top_k, k=k, shards=shards), values)
    want, want_index = da_top_k(jnp.asarray(values), k, shards)
    np.testing.assert_array_equal(index, want_index)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("n", "share"), [(300, 0.5), (20_000, 0.02), (129, 1.0), (1024, 0.0)])
def test_open_rows(n, share):
    rng = np.random.default_rng(0)
    values = np.where(rng.random(n) < share, np.abs(rng.normal(size=n)), -1.0).astype(np.float32)
    values[[7, 50]] = (np.nan, -0.0) if share else -np.inf
    assert shapes.open_rows_served(values)
    got, count = interpreted(TPU, open_rows, jnp.asarray(values))
    want, many = portable_open_rows(jnp.asarray(values))
    np.testing.assert_array_equal(got, want)
    assert count == many


def test_numbers_of_what_is_set():
    mask = jnp.asarray(np.random.default_rng(0).random((8, 128)) < 0.3)
    within, until = numbering.numbered(mask)
    np.testing.assert_array_equal(within, np.cumsum(mask, axis=1))
    np.testing.assert_array_equal(until[:, 0], np.cumsum(mask.sum(axis=1)))


def struct(*shape, dtype=F32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_what_they_do_not_serve():
    x, matrix, index = struct(1, 256), struct(64, 256), struct(8, dtype=INT32)
    assert shapes.rows_served(x, matrix, index, group_size=8)
    assert not shapes.rows_served(struct(17, 256), struct(64, 256), index, group_size=8)
    assert not shapes.rows_served(struct(1, 250), struct(64, 250), index, group_size=1)
    assert not shapes.rows_served(x, struct(60, 256), index, group_size=1)
    assert not shapes.rows_served(x, struct(96, 256, dtype=BF16), index, group_size=3)
    assert not shapes.rows_served(x, struct(64, 256, dtype=jnp.float16), index, group_size=8)
    assert not shapes.rows_served(struct(1, 2**15), struct(64, 2**15), index, group_size=8)
    assert not shapes.rows_served(x, matrix, struct(0, dtype=INT32), group_size=8)
    q, scale = struct(256, 256, dtype=jnp.int8), struct(256)
    stored = functools.partial(shapes.stored_rows_served, x, index, q, operations=INT8, shared=(False,))
    assert stored(struct(64, 1), group_size=8)
    assert stored(struct(2, 256), group_size=8, shared=(True,))
    assert not stored(struct(2, 256), group_size=8)
    assert not stored(struct(256, 1), group_size=2)
    assert not stored(struct(16, 1), group_size=12)
    assert not stored(struct(256, 2), group_size=8)
    assert not stored(struct(256, 1), struct(256, 1), group_size=8)
    assert not stored(struct(256, 1), group_size=8, operations=(*INT8, Operation("add", F32)))
    assert shapes.scores_served(x, q, scale, bits=8)
    assert shapes.scores_served(struct(1, 512), q, scale, bits=4)
    assert not shapes.scores_served(struct(1, 511), q, scale, bits=4)
    assert not shapes.scores_served(struct(1, 250), struct(256, 250, dtype=jnp.int8), scale, bits=8)
    assert not shapes.top_k_served(struct(1, 1000, dtype=BF16), k=5, shards=1)
    assert not shapes.top_k_served(struct(1, 4096), k=2000, shards=1)
    assert not shapes.top_k_served(struct(0, 4096), k=2, shards=1)


def test_they_are_registered_for_tpus_alone_and_pallas_is_not_asked_for_at_once(monkeypatch):
    tpu.install.__wrapped__()
    named = {step: platforms for step, platforms in backends().items() if platforms["tpu"] == "Pallas"}
    assert set(named) == {
        "hire_quantized_scores",
        "hire_fine_scores",
        "da_top_k",
        "hire_select_rows_dot",
        "hire_combine_rows",
        "hire_select_stored_rows_dot",
        "hire_combine_stored_rows",
        "hire_chosen_block",
        "hire_scores_in_two",
        "hire_open_rows",
    }
    assert {p["cuda"].split(":")[0] for p in named.values()} == {"portable"}


def test_without_pallas_there_are_none_and_it_is_said_why(monkeypatch):
    from hire_xform.lowering.primitives import kernels

    monkeypatch.setattr(kernels, "_missing", {})
    monkeypatch.setattr(tpu, "_why_missing", lambda: "there is no Pallas")
    assert tpu.install.__wrapped__() == "there is no Pallas"
    assert backends()["da_top_k"]["tpu"] == "portable: no kernels, since there is no Pallas"
    monkeypatch.setenv("HIRE_KERNELS", "off")
    assert tpu.install.__wrapped__() == "HIRE_KERNELS is off"


def test_everything_selected_equals_dense(as_cpu):
    """A block and a head of a whole program, at full width: with these kernels, and as many as are served."""
    as_cpu()
    d, m, vocab = 128, 256, 384
    weights = {
        "up": normal(0, d, m, dtype=BF16) / 8,
        "down": normal(1, m, d, dtype=BF16) / 8,
        "head": normal(2, d, vocab, dtype=BF16) / 8,
    }

    def model(w, x):
        x = x + jax.nn.relu(x @ w["up"]) @ w["down"]
        return jnp.argmax(x @ w["head"], axis=-1)

    config = hx.Config(
        ffn=hx.Ffn(active=1.0, group_size=8),
        vocab=hx.Vocab(candidates=vocab),
        rules=(hx.Rule("*", force=True),),
    )
    x = normal(3, 2, d, dtype=BF16)
    step = hx.sparsify(model, config=config)
    assert len(step.trace(weights, x).plan.sites) == 2
    np.testing.assert_array_equal(step(weights, x), model(weights, x))
