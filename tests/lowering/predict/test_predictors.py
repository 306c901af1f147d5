import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hire_xform.lowering.predict import predictors
from hire_xform.lowering.predict.few_bits import pack_nibbles, quantize, quantize_clipped, unpack_nibbles
from hire_xform.lowering.predict.low_rank import LowRank
from hire_xform.lowering.predict.predictors import packed_shapes, predictor_bytes
from hire_xform.lowering.predict.projected import Projected
from hire_xform.lowering.predict.quantized import Quantized
from hire_xform.lowering.primitives.da_top_k import da_top_k

pytestmark = pytest.mark.any_jax("cases vary numbers, dtypes and predictors of arithmetic that is our own", every=4)

pack_predictor = jax.jit(predictors.pack_predictor, static_argnums=1)
predict_scores = jax.jit(predictors.predict_scores, static_argnums=(2, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Quantized(3), "bits=3"),
        (lambda: Quantized(bits=True), "bits=True"),
        (lambda: Quantized(None), "expected 8 or 4"),
        (lambda: LowRank(0), "rank=0"),
        (lambda: LowRank(-1), "rank=-1"),
        (lambda: LowRank(0.0), "rank=0.0"),
        (lambda: LowRank(1.5), "rank=1.5 is not a fraction"),
        (lambda: LowRank(float("nan")), "rank=nan"),
        (lambda: LowRank("a"), "rank='a'"),
        (lambda: LowRank(4, bits=5), "bits=5"),
    ],
)
def test_bad_specs_are_refused_with_their_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_specs_are_values():
    assert Quantized(8) == Quantized(bits=8)
    assert hash(LowRank(0.25)) == hash(LowRank(rank=0.25))
    assert [LowRank(r).rank_for(100, 10) for r in (0.01, 0.3, 0.7, 1.0, 3, 99)] == [1, 3, 7, 10, 3, 10]
    with pytest.raises(TypeError):
        LowRank(4, 8)


@pytest.mark.parametrize(
    ("n", "d", "dtype"), [(1, 1, jnp.float32), (1, 7, jnp.bfloat16), (5, 9, jnp.float32), (300, 31, jnp.bfloat16)]
)
def test_packed_arrays_are_as_announced(n, d, dtype, spec, normal):
    packed = pack_predictor(normal((n, d), dtype), spec)
    announced = packed_shapes(n, d, spec, dtype)
    assert {k: (v.shape, v.dtype) for k, v in packed.items()} == {k: (v.shape, v.dtype) for k, v in announced.items()}
    assert predictor_bytes(n, d, spec, dtype) == sum(v.nbytes for v in packed.values())
    for tokens in (1, 3) if d > 8 else (1,):
        scores = predict_scores(normal((tokens, d), dtype, 1), packed, spec, n)
        assert scores.shape == (tokens, n)
        assert scores.dtype == jnp.float32
        assert np.isfinite(scores).all()


@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize(("bits", "bound"), [(8, 0.012), (4, 0.15)])
def test_quantised_scores_are_close(tokens, bits, bound, normal):
    rows, x = normal((517, 63)), normal((tokens, 63), seed=1)
    scores = predict_scores(x, pack_predictor(rows, Quantized(bits)), Quantized(bits), 517)
    error = np.linalg.norm(scores - x @ rows.T) / np.linalg.norm(x @ rows.T)
    assert error < bound


def test_quantisation_error_is_half_a_step(normal):
    rows = normal((40, 16))
    for bits, levels in ((8, 127), (4, 7)):
        packed = pack_predictor(rows, Quantized(bits))
        q = packed["q"] if bits == 8 else jnp.concatenate(unpack_nibbles(packed["q"]), axis=1)
        error = np.abs(q * packed["scale"][:, None] - rows).max(axis=1)
        assert (error <= 0.501 * np.abs(rows).max(axis=1) / levels).all()


@pytest.mark.parametrize("d", [1, 2, 7, 16])
def test_nibbles_round_trip(d):
    q = jnp.asarray(np.random.default_rng(0).integers(-7, 8, (9, d)), jnp.int8)
    low, high = unpack_nibbles(pack_nibbles(q))
    np.testing.assert_array_equal(jnp.concatenate([low, high], axis=1)[:, :d], q)


def test_many_blocks_give_what_one_block_gives(normal, monkeypatch):
    rows, x = normal((101, 14)), normal((2, 14), seed=1)
    for spec in (Quantized(4), LowRank(5), LowRank(5, bits=8)):
        whole = predict_scores(x, pack_predictor(rows, spec), spec, 101)
        with monkeypatch.context() as patch:
            patch.setattr("hire_xform.lowering.xla.blocks._TOGETHER", 1)
            patch.setattr("hire_xform.lowering.predict.few_bits._NIBBLE_BLOCK_BYTES", 14 * 8)
            blocked = predictors.predict_scores(x, predictors.pack_predictor(rows, spec), spec, 101)
        # Eigenvectors may turn by rounding; the product they give may not, but for 8-bit steps.
        np.testing.assert_allclose(whole, blocked, atol=0.05 if spec == LowRank(5, bits=8) else 1e-4)


@pytest.mark.parametrize("shape", [(60, 12), (7, 12)])
def test_low_rank_is_the_best_of_its_rank(shape, normal):
    rows = normal(shape)
    for rank in (1, 3, 7):
        packed = pack_predictor(rows, LowRank(rank))
        error = np.linalg.norm(packed["a"] @ packed["basis"].T - rows)
        u, s, vt = np.linalg.svd(rows, full_matrices=False)
        assert error <= np.linalg.norm((u[:, :rank] * s[:rank]) @ vt[:rank] - rows) + 1e-4


@pytest.mark.parametrize("make", [LowRank, Projected])
def test_of_four_bits_the_leading_directions_have_eight(make, normal):
    n, d, lead = 200, 64, 8
    sizes = jnp.where(jnp.arange(d) < lead, 30.0, 1.0)
    directions = jnp.linalg.qr(normal((d, d)))[0]
    rows, x = (normal((n, d)) * sizes) @ directions.T, normal((50, d))
    spec = make(1.0, bits=4)
    packed = pack_predictor(rows, spec, (directions * sizes**2) @ directions.T if make is Projected else None)
    assert packed["lead_q"].shape == (n, lead)
    off = predict_scores(x, packed, spec, n) - x @ rows.T
    spread = jnp.std(x @ rows.T)
    # Of the others, a part in 100 of the variance, 4 bits lose a tenth at most; plain 4 bits lose that of everything.
    plain = Quantized(4)
    in_four = predict_scores(x, pack_predictor(rows, plain), plain, n) - x @ rows.T
    assert jnp.std(off) < 0.02 * spread < 0.2 * jnp.std(in_four)


def test_large_entries_are_clipped_where_that_brings_a_row_closer(normal):
    for values in (normal((64, 128)), normal((64, 128)) ** 3):
        q, scale = quantize_clipped(values, 7)
        r, peak = quantize(values, 7)
        clipped, unclipped = (jnp.sum((values - q * s[:, None]) ** 2, 1) for q, s in ((q, scale), (r, peak)))
        assert bool(jnp.all(clipped <= unclipped))
        assert float(jnp.mean(clipped)) < 0.95 * float(jnp.mean(unclipped))


def test_full_rank_is_exact(normal):
    rows, x = normal((50, 12)), normal((3, 12), seed=1)
    np.testing.assert_allclose(
        predict_scores(x, pack_predictor(rows, LowRank(1.0)), LowRank(1.0), 50), x @ rows.T, atol=1e-4
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_row_poisons_only_itself(bad, spec, normal):
    rows, x = normal((20, 8)), normal((2, 8), seed=1)
    scores = predict_scores(x, pack_predictor(rows.at[3, 2].set(bad), spec), spec, 20)
    assert np.isnan(scores[:, 3]).all()
    assert np.isfinite(np.delete(scores, 3, axis=1)).all()
    assert (da_top_k(scores, 1)[1] == 3).all()


def test_zero_rows_and_zero_tokens_score_zero(spec, normal):
    rows = normal((20, 8)).at[4].set(0.0)
    packed = pack_predictor(rows, spec)
    assert (predict_scores(normal((1, 8)), packed, spec, 20)[0, 4] == 0).all()
    np.testing.assert_array_equal(predict_scores(jnp.zeros((1, 8)), packed, spec, 20), np.zeros((1, 20)))


def test_recall_of_the_exact_best(normal):
    rows, x = normal((2000, 64)), normal((8, 64), seed=1)
    exact = np.asarray(jax.lax.top_k(x @ rows.T, 10)[1])
    for spec, candidates, wanted in ((Quantized(8), 32, 1.0), (Quantized(4), 64, 0.97), (LowRank(0.75), 300, 0.9)):
        got = np.asarray(da_top_k(predict_scores(x, pack_predictor(rows, spec), spec, 2000), candidates)[1])
        recall = np.mean([np.isin(e, g).mean() for e, g in zip(exact, got, strict=True)])
        assert recall >= wanted, spec


def test_vmap_packs_a_stack(spec, normal):
    stack, x = normal((3, 20, 8)), normal((3, 2, 8), seed=1)
    packed = jax.jit(jax.vmap(lambda rows: pack_predictor(rows, spec)))(stack)
    got = jax.vmap(lambda x, p: predict_scores(x, p, spec, 20))(x, packed)
    for i in range(3):
        one = predict_scores(x[i], pack_predictor(stack[i], spec), spec, 20)
        np.testing.assert_allclose(got[i], one, atol=0.1 if getattr(spec, "rank", 0) else 1e-5)


def test_gradient_goes_straight_through_rounding(spec, normal):
    rows, x = normal((40, 16)), normal((2, 16), seed=1)
    packed = pack_predictor(rows, spec)
    weights = normal((2, 40), seed=2)
    grad = jax.grad(lambda x: (predict_scores(x, packed, spec, 40) * weights).sum())(x)
    # The product is linear in x apart from rounding, so the gradient is that of the decompressed rows.
    basis = jnp.eye(16)
    decompressed = predict_scores(basis, packed, spec, 40).T
    np.testing.assert_allclose(grad, weights @ decompressed, rtol=0.1, atol=0.3)
    assert jax.jvp(lambda x: predict_scores(x, packed, spec, 40), (x,), (x,))[1].shape == (2, 40)


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


@pytest.mark.parametrize("bits", [8, 4])
def test_no_decompressed_copy_is_made(bits):
    n, d, spec = 65536, 512, Quantized(bits)
    args = (jax.ShapeDtypeStruct((1, d), jnp.float32), packed_shapes(n, d, spec))
    jaxpr = jax.make_jaxpr(lambda x, p: predict_scores(x, p, spec, n))(*args).jaxpr
    largest = max(v.aval.size * v.aval.dtype.itemsize for e in _equations(jaxpr) for v in e.outvars)
    assert largest <= 4 * 2**20
    dots = [e for e in _equations(jaxpr) if e.primitive.name == "dot_general"]
    assert dots
    for eqn in dots:
        assert [v.aval.dtype for v in eqn.invars] == [jnp.int8, jnp.int8]
        assert eqn.invars[1].aval.shape[0] == 2, "one row of int8 misses the fast kernels on CPU"


@pytest.mark.parametrize("rows", [jnp.zeros((0, 4)), jnp.zeros(4), jnp.zeros((2, 4), jnp.int32)])
def test_only_floating_matrices_are_packed(rows):
    with pytest.raises(ValueError, match="expected a non-empty floating"):
        pack_predictor(rows, Quantized(8))
    with pytest.raises(TypeError, match="unknown"):
        pack_predictor(jnp.zeros((2, 2)), "int8")


@pytest.mark.parametrize("tokens", [3, 80])
def test_scores_of_many_tokens_are_their_scores(tokens, spec, normal):
    rows, x = normal((50, 24), jnp.float32), normal((tokens, 24), jnp.float32, 1)
    packed = pack_predictor(rows.at[3, 1].set(jnp.nan), spec)
    want = predict_scores(x, packed, spec, 50)
    got = jax.jit(predictors.predict_scores_of_many, static_argnums=(2, 3))(x, packed, spec, 50)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert np.isnan(got[:, 3]).all()
