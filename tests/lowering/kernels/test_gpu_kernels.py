"""The kernels for GPUs: equal to the portable forms in the interpreter, lowered without a GPU, compiled for one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, PartitionSpec

import hire_xform as hx
from hire_xform.dump import targets
from hire_xform.dump.hlo import counts
from hire_xform.dump.targets import Target
from hire_xform.lowering.kernels.gpu import calls, shapes
from hire_xform.lowering.kernels.gpu import open_rows as gpu_open_rows
from hire_xform.lowering.kernels.gpu import rows as gpu_rows
from hire_xform.lowering.kernels.gpu import scores as gpu_scores
from hire_xform.lowering.kernels.gpu import top_k as gpu_top_k
from hire_xform.lowering.kernels.results import result
from hire_xform.lowering.predict import few_bits
from hire_xform.lowering.primitives.combine_rows import combine_rows
from hire_xform.lowering.primitives.da_top_k import da_top_k
from hire_xform.lowering.primitives.open_rows import open_rows
from hire_xform.lowering.primitives.select_rows import select_rows_dot
from hire_xform.lowering.primitives.stack_entry import StackEntry
from hire_xform.lowering.primitives.stored_rows import Operation, StoredRows

pytestmark = pytest.mark.any_jax("cases vary shapes and dtypes of a few kernels", every=3)

# Sides that no block divides.
N, D, K = 136, 200, 21
SCALED = (Operation("convert", jnp.dtype("float32")), Operation("mul", jnp.dtype("float32")))


def packed(normal, bits, n=N, d=D):
    q, scale = few_bits.quantize(normal((n, d), seed=1), 127 if bits == 8 else 7)
    return (q if bits == 8 else few_bits.pack_nibbles(q)), scale


def chosen(tokens, count, rows, own=False):
    index = np.random.default_rng(2).integers(0, rows, size=(tokens, count) if own else (count,))
    return jnp.asarray(index, jnp.int32)


def stored(normal, high=N, wide=1):
    values = jnp.asarray(np.random.default_rng(3).integers(-127, 128, size=(N, D)), jnp.int8)
    scale = jnp.abs(normal((high, wide), seed=4))
    return values, scale, StoredRows(values, (scale,), SCALED, (False,))


@pytest.mark.parametrize(
    ("tokens", "bits", "d"), [(1, 8, D), (8, 4, D), (16, 8, 36), (3, 4, 39), (2, 8, 1300), (1, 8, 4100)]
)
def test_scores_are_those_of_the_portable_form(portable_forms, normal, tokens, bits, d):
    """Of tokens with a zero, an infinity and a NaN as well; rounding apart, since XLA joins products and sums."""
    x, (q, scale) = normal((tokens, d)), packed(normal, bits, d=d)
    if tokens > 2:
        x = x.at[0].set(0.0).at[1, 3].set(jnp.inf).at[2, 5].set(jnp.nan)
    got = gpu_scores.quantized_scores(x, q, scale, bits, interpret=True)
    np.testing.assert_allclose(got, few_bits.quantized_scores(x, q, scale, bits), rtol=1e-6)
    if tokens <= shapes.MOST_TOKENS:
        fine = gpu_scores.fine_scores(x, q, scale, bits, interpret=True)
        for mine, theirs in zip(fine, few_bits.fine_scores(x, q, scale, bits), strict=True):
            # A second limb may be one more or less, which the tokens that are kept say, too: see the test below.
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("bits", [8, 4])
def test_tokens_as_they_are_kept_are_those_that_are_multiplied(normal, bits):
    """What bounds are made of: products of what is said to be kept with the entries are the scores."""
    x, (q, scale) = normal((3, D)), packed(normal, bits)
    scores, kept = gpu_scores.fine_scores(x, q, scale, bits, interpret=True)
    rows = np.asarray(few_bits.as_rows(q, scale, bits, D), np.float64)
    np.testing.assert_allclose(scores, np.asarray(kept, np.float64) @ rows.T, rtol=1e-5, atol=1e-4)
    assert np.max(np.abs(np.asarray(kept - x))) < 1.01 * np.max(np.abs(np.asarray(x))) / (127 * 254 * 2)


def ranked(scores, k, shards):
    """By a sort: the largest first, NaN before all, -0 behind 0, of equal ones the first."""
    n = scores.shape[-1]
    found = []
    for row in np.asarray(scores, np.float64).reshape(-1, shards, n // shards):
        for number, block in enumerate(row):
            order = np.lexsort((np.signbit(block), -block, ~np.isnan(block)))
            found.append(order[: -(-k // shards)] + number * (n // shards))
    return np.stack(found).reshape(*scores.shape[:-1], -1)


@pytest.mark.parametrize(
    ("shape", "k", "shards"), [((1000,), 1, 1), ((3, 513), 513, 1), ((2, 4096), 96, 4), ((17000,), 300, 1)]
)
def test_the_largest_are_found(portable_forms, normal, shape, k, shards):
    """Of all, of blocks and by groups of neighbours; with ties, infinities, NaNs and zeros of both signs among them."""
    scores = jnp.round(normal(shape) * 8) / 8
    scores = scores.at[..., 5].set(jnp.inf).at[..., 7:9].set(jnp.nan).at[..., 11].set(-jnp.inf)
    values, index = gpu_top_k.top_k(scores, k, shards, interpret=True)
    np.testing.assert_array_equal(index, ranked(scores, k, shards))
    np.testing.assert_array_equal(values, jnp.take_along_axis(scores, index, axis=-1))


@pytest.mark.parametrize("value", [0.0, -jnp.inf, jnp.nan, 3e38])
def test_of_equal_scores_the_first_are_the_largest(value):
    for n, k in ((40, 7), (17000, 20)):
        _, index = gpu_top_k.top_k(jnp.full((n,), value), k, 1, interpret=True)
        np.testing.assert_array_equal(index, np.arange(k))


def test_the_largest_of_narrow_scores_have_their_dtype(normal):
    scores = normal((300,)).astype(jnp.bfloat16)
    values, index = gpu_top_k.top_k(scores, 9, 1, interpret=True)
    assert values.dtype == jnp.bfloat16
    np.testing.assert_array_equal(index, ranked(scores, 9, 1))


@pytest.mark.parametrize("n", [5, 1024, 5000])
def test_open_rows_are_numbered_in_order(normal, n):
    values = normal((n,)).at[1].set(jnp.nan).at[2].set(-0.0).at[3].set(-jnp.inf)
    index, count = gpu_open_rows.open_rows(values, interpret=True)
    want = np.flatnonzero(~(np.asarray(values) < 0))
    assert count == len(want)
    np.testing.assert_array_equal(index, np.pad(want, (0, n - len(want))))


def test_no_row_is_open():
    index, count = gpu_open_rows.open_rows(jnp.full((1500,), -1.0), interpret=True)
    assert count == 0
    np.testing.assert_array_equal(index, np.zeros(1500))


@pytest.mark.parametrize("bits", [8, 4])
def test_scores_of_one_of_a_stack_are_read_where_it_lies(portable_forms, normal, bits):
    entries, scales = zip(*(packed(normal, bits, n, 40) for n in (N, N)), strict=True)
    stack, x = jnp.stack([entries[0], entries[0][::-1]]), normal((2, 40))
    for layer in (0, 1):
        entry = StackEntry(stack, (jnp.int32(layer),))
        got = gpu_scores.quantized_scores(x, entry, scales[0], bits, interpret=True)
        np.testing.assert_allclose(got, few_bits.quantized_scores(x, stack[layer], scales[0], bits), rtol=1e-6)


CASES = [(1, 1, False, "float32"), (3, 1, True, "bfloat16"), (8, 4, False, "bfloat16"), (2, 8, True, "float16")]


@pytest.mark.parametrize(("tokens", "group", "own", "dtype"), CASES)
def test_products_and_sums_are_those_of_the_portable_form(portable_forms, normal, tokens, group, own, dtype):
    x, rows = normal((tokens, D)).astype(dtype), normal((N, D), seed=1).astype(dtype)
    index = chosen(tokens, K, N // group, own)
    for magnitudes in (False, True):
        got = gpu_rows.select_rows_dot(x, rows, index, group, magnitudes, interpret=True)
        options = {"group_size": group, "magnitudes": magnitudes, "preferred_element_type": jnp.float32}
        np.testing.assert_allclose(got, select_rows_dot(x, rows, index, **options), rtol=1e-5, atol=1e-4)
    h = normal((tokens, K * group), seed=5).astype(dtype)
    want = combine_rows(h, rows, index, group_size=group, preferred_element_type=jnp.float32)
    got = gpu_rows.combine_rows(h, rows, index, group, interpret=True)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_many_rows_are_dealt_out_and_added_up(portable_forms, normal):
    """More parts than one, the last of which is short."""
    rows, index, h = normal((N, D), seed=1), chosen(1, 1000, N), normal((1, 1000), seed=5)
    assert gpu_rows._parts(1000, 1, 1, 4) > 1
    got = gpu_rows.combine_rows(h, rows, index, 1, interpret=True)
    np.testing.assert_allclose(got, combine_rows(h, rows, index), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("high", "wide"), [(N, 1), (1, D), (N // 8, 4)])
def test_rows_in_eight_bits_have_their_scales(portable_forms, normal, high, wide):
    values, scale, rows = stored(normal, high, wide)
    x, h, index = normal((2, D)), normal((2, K), seed=5), chosen(2, K, N)
    got = gpu_rows.select_rows_dot(x, values, index, 1, scale=scale, interpret=True)
    np.testing.assert_allclose(got, select_rows_dot(x, rows, index), rtol=1e-5, atol=1e-2)
    got = gpu_rows.combine_rows(h, values, index, 1, scale=scale, interpret=True)
    np.testing.assert_allclose(got, combine_rows(h, rows, index), rtol=1e-5, atol=1e-2)


def test_rows_of_groups_are_those_after_their_first():
    def kernel(index_ref, out_ref):
        slot = jnp.arange(calls.padded(5))
        out_ref[...] = calls.row_of(index_ref, 1, slot, 2, slot < 5)

    out = jax.ShapeDtypeStruct((8,), jnp.int32)
    index = jnp.array([7, 3, 0, 5], jnp.int32)
    got = calls.call(kernel, "rows", out, (1,), index, warps=1, interpret=True)
    np.testing.assert_array_equal(got, [6, 7, 0, 1, 10, 1, 0, 1])
    assert [calls.padded(n) for n in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]


def test_tokens_of_a_batch_are_taken_together(portable_forms, normal):
    x, rows = normal((3, 2, D)), normal((N, D), seed=1)
    index = jnp.stack([chosen(1, K, N), chosen(1, K, N)[::-1], chosen(1, K, N) * 0])
    step = lambda x, index: gpu_rows.select_rows_dot(x, rows, index, 1, interpret=True)  # noqa: E731
    want = jax.vmap(lambda x, index: select_rows_dot(x, rows, index))(x, index)
    np.testing.assert_allclose(jax.vmap(step)(x, index), want, rtol=1e-5, atol=1e-4)


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


BF16, INT8, INT32, UINT8 = jnp.bfloat16, jnp.int8, jnp.int32, jnp.uint8
# A matrix that is served.
LARGE = (8192, 512)


def step_of(name):
    """The step alone, a function of its operands, and operands for so many tokens that its kernel serves."""
    n, d = LARGE
    made = lambda values, scale: StoredRows(values, (scale,), SCALED, (False,))  # noqa: E731
    return {
        "integer_scores": (
            lambda x, q, scale: few_bits.quantized_scores(x, q, scale, 4),
            lambda t: (struct(t, 2 * d), struct(n, d, dtype=UINT8), struct(n)),
        ),
        "largest": (lambda scores: da_top_k(scores, 64)[1], lambda t: (struct(t, n),)),
        "open_rows": (open_rows, lambda t: (struct(t * n),)),
        "select_rows_dot": (
            lambda x, rows, index: select_rows_dot(x, rows, index),
            lambda t: (struct(t, d, dtype=BF16), struct(n, d, dtype=BF16), struct(1024, dtype=INT32)),
        ),
        "combine_rows": (
            lambda h, rows, index: combine_rows(h, rows, index, group_size=8),
            lambda t: (struct(t, 1024, dtype=BF16), struct(n, d, dtype=BF16), struct(128, dtype=INT32)),
        ),
        "stored select_rows_dot": (
            lambda x, values, scale, index: select_rows_dot(x, made(values, scale), index),
            lambda t: (struct(t, d), struct(n, d, dtype=INT8), struct(n, 1), struct(1024, dtype=INT32)),
        ),
        "stored combine_rows": (
            lambda h, values, scale, index: combine_rows(h, made(values, scale), index),
            lambda t: (struct(t, 1024), struct(n, d, dtype=INT8), struct(n // 8, 4), struct(1024, dtype=INT32)),
        ),
    }[name]


NAMES = ["integer_scores", "largest", "open_rows", "select_rows_dot", "combine_rows"]
NAMES += ["stored select_rows_dot", "stored combine_rows"]
TRITON = "xla.gpu.triton"
# What each is made of.
KERNELS = {name: [name.split()[-1]] for name in NAMES} | {
    "integer_scores": ["integer_scores", "quantize_tokens"],
    "largest": ["by_rank", "largest"],
    "open_rows": ["count_open_rows", "open_rows"],
}


@pytest.mark.parametrize("name", NAMES)
def test_programs_for_cuda_have_them_and_no_others(name):
    step, shapes_of = step_of(name)
    traced = jax.jit(lambda *operands: step(*operands)).trace(*shapes_of(2))
    assert TRITON in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert TRITON not in traced.lower(lowering_platforms=("tpu",)).as_text()
    together = traced.lower(lowering_platforms=("cpu", "cuda", "tpu")).as_text()
    assert together.count(TRITON) == len(KERNELS[name])
    exported = export.export(jax.jit(lambda *operands: step(*operands)), platforms=("cpu", "cuda"))(*shapes_of(2))
    assert TRITON not in exported.mlir_module()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit])
def test_inside_a_shard_map_each_part_has_them(name, types):
    """As it is by default, with types that say along which axes values vary."""
    step, shapes_of = step_of(name)
    mesh = jax.make_mesh((1,), ("model",), axis_types=(types,))
    inside = jax.shard_map(step, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec())
    traced = jax.jit(inside).trace(*shapes_of(2))
    assert TRITON in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_results_of_kernels_vary_along_no_axis():
    struct = result((2, 3), jnp.float32)
    assert (struct.shape, struct.dtype) == ((2, 3), jnp.float32)
    kind = getattr(struct, "manual_axis_type", None)  # in JAX 0.9 the axes themselves
    assert (struct.vma if kind is None else kind.varying) == frozenset()


@pytest.mark.parametrize(
    ("serves", "operands", "settings", "served"),
    [
        (shapes.scores_served, [struct(1, 1024), struct(8192, 512, dtype=UINT8), None], {"bits": 4}, True),
        (shapes.scores_served, [struct(1, 512), struct(8192, 512, dtype=INT8), None], {"bits": 8}, True),
        (shapes.scores_served, [struct(17, 1024), struct(8192, 512, dtype=UINT8), None], {"bits": 4}, False),
        (shapes.scores_served, [struct(1, 256), struct(8192, 64, dtype=UINT8), None], {"bits": 4}, False),
        (shapes.products_served, [struct(2, 512), struct(*LARGE), struct(8, dtype=INT32)], {}, True),
        (shapes.products_served, [struct(1, 512), struct(*LARGE), struct(8, dtype=INT32)], {}, False),
        (shapes.products_served, [struct(2, 512), struct(*LARGE), struct(2, 8, dtype=INT32)], {}, False),
        (shapes.products_served, [struct(9, 512), struct(*LARGE), struct(8, dtype=INT32)], {}, False),
        (shapes.products_served, [struct(2, 512), struct(64, 512), struct(8, dtype=INT32)], {}, False),
        (shapes.sums_served, [struct(1, 1024), struct(*LARGE), struct(1024, dtype=INT32)], {}, True),
        (shapes.sums_served, [struct(1, 64), struct(*LARGE), struct(64, dtype=INT32)], {}, False),
        (shapes.sums_served, [struct(2, 64), struct(1 << 21, 1024, dtype=BF16), struct(64, dtype=INT32)], {}, False),
    ],
)
def test_what_they_serve(serves, operands, settings, served):
    assert serves(*operands, **settings) == served


def test_stored_rows_with_a_zero_point_have_the_portable_form():
    index, values, scale = struct(8, dtype=INT32), struct(*LARGE, dtype=INT8), struct(8192, 1)
    zero = (Operation("sub", jnp.dtype("float32")), *SCALED[1:])
    told = functools.partial(shapes.stored_sums_served, struct(1, 8), index, values)
    assert told(scale, operations=SCALED)
    assert not told(scale, scale, operations=zero)
    assert not told(scale, operations=(Operation("mul", jnp.dtype("bfloat16")),))


def test_backends_say_which_and_why():
    there = {step: platforms["cuda"] for step, platforms in hx.backends().items()}
    assert there["hire_combine_rows"] == "Pallas, through Triton, of up to 8 tokens"
    assert there["hire_arg_max"].startswith("portable: XLA's own is one pass")
    assert all(said.startswith(("Pallas", "portable: ")) for said in there.values())


@pytest.fixture(scope="module")
def gpu():
    if not any(map(targets._is_installed, targets.PACKAGES["cuda"])):
        pytest.skip("needs the compiler for CUDA: make gpu")
    return Target.parse("cuda:h100")


# What has to move of each token's own, and of what they share. Open rows are counted first, and then numbered.
BYTES = {
    "integer_scores": (0, 8192 * 512),
    "largest": (8192 * 4, 0),
    "open_rows": (2 * 8192 * 4, 0),
    "select_rows_dot": (0, 1024 * 512 * 2),
    "combine_rows": (0, 1024 * 512 * 2),
    "stored select_rows_dot": (0, 1024 * 512),
    "stored combine_rows": (0, 1024 * 512),
}


@pytest.mark.slow
@pytest.mark.gpu_aot
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [2, 8])
def test_the_gpus_compiler_takes_them_and_nothing_is_copied(gpu, name, tokens):
    step, shapes_of = step_of(name)
    compiled = jax.jit(lambda *operands: step(*operands)).trace(*gpu.placed(shapes_of(tokens))).lower().compile()
    text = compiled.as_text()
    found = counts(text)
    assert TRITON in text
    made = KERNELS[name] if (name, tokens) != ("integer_scores", 8) else ["integer_products", "quantize_tokens"]
    assert found.kernels == dict.fromkeys(made, 1)
    # Sums of parts take up to half as much again as the rows; no row is written.
    own, shared = BYTES[name]
    assert found.read < 1.5 * (tokens * own + shared)
    assert found.written < 0.6 * (tokens * own + shared)


@pytest.mark.slow
@pytest.mark.gpu_aot
@pytest.mark.parametrize(("tokens", "bits"), [(1, 8), (1, 4), (8, 8)])
def test_of_a_stack_one_matrix_is_read(gpu, tokens, bits):
    """By words, by one kernel or two, and by bytes in tensor cores."""
    n, d = LARGE

    def step(x, q, scale, i):
        return few_bits.quantized_scores(x, StackEntry(q, (i,)), scale, bits)

    given = struct(tokens, 8 * d // bits), struct(4, n, d, dtype=INT8 if bits == 8 else UINT8), struct(n)
    compiled = jax.jit(step).trace(*gpu.placed((*given, struct(dtype=INT32)))).lower().compile()
    assert counts(compiled.as_text()).read < 1.2 * n * d
