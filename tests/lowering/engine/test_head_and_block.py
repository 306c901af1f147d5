"""Heads and blocks that prove nothing: full width is dense, what is chosen is exact, under every transformation."""

from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from hire_xform.lowering.engine.block import UpProduct, ffn
from hire_xform.lowering.engine.bytes_read import ffn_bytes, vocab_bytes
from hire_xform.lowering.engine.head import vocab_logits
from hire_xform.lowering.engine.selection import selection_of
from hire_xform.lowering.predict import predictors
from hire_xform.lowering.predict.low_rank import LowRank
from hire_xform.lowering.predict.predictors import predict_scores, predictor_bytes
from hire_xform.lowering.predict.quantized import Quantized

pytestmark = pytest.mark.any_jax("cases vary numbers, dtypes and predictors of arithmetic that is our own", every=4)

Q8 = Quantized(8)
# All directions kept in f32: predictions are the products themselves, up to rounding.
EXACT = LowRank(1.0)
pack_predictor = jax.jit(predictors.pack_predictor, static_argnums=1)


@pytest.mark.parametrize(
    ("tokens", "dtype"), [(1, jnp.float32), (1, jnp.bfloat16), (3, jnp.bfloat16), (8, jnp.float32)]
)
def test_all_candidates_give_the_dense_logits(tokens, dtype, spec, normal):
    rows, x = normal((67, 13), dtype), normal((tokens, 13), dtype, 1)
    packed = pack_predictor(rows, spec)
    dense = jax.lax.dot_general(x, rows, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    for fill in ("predicted", "-inf"):
        got = jax.jit(partial(vocab_logits, spec=spec, candidates=67, fill=fill, out_dtype=jnp.float32))(
            x, rows, packed
        )
        np.testing.assert_allclose(got, dense, atol=1e-5)
    rounded = jax.jit(partial(vocab_logits, spec=spec, candidates=67, out_dtype=dtype))(x, rows, packed)
    assert rounded.dtype == dtype
    np.testing.assert_allclose(rounded.astype(jnp.float32), dense, rtol=0.01, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("shards", [1, 4])
def test_candidates_are_exact_and_the_rest_is_the_fill(tokens, shards, normal):
    """On each of several devices, which choose their share of the rows that they have."""
    rows, x = normal((400, 32)), normal((tokens, 32), seed=1)
    packed = pack_predictor(rows, Q8)
    predicted, dense = predict_scores(x, packed, Q8, 400), x @ rows.T

    def call(**fill):
        parts = [jax.tree.map(lambda a, i=i: jnp.split(a, shards)[i], (rows, packed)) for i in range(shards)]
        sizes = {"candidates": 16 // shards, "out_dtype": jnp.float32}
        return jnp.concatenate([vocab_logits(x, *part, Q8, **sizes, **fill) for part in parts], axis=1)

    kept, floored = np.asarray(call()), np.asarray(call(fill="-inf"))
    exact = np.isfinite(floored)
    assert (exact.sum(axis=1) == shards * selection_of(tokens, 400 // shards, 16 // shards).size).all()
    np.testing.assert_allclose(kept[exact], np.asarray(dense)[exact], atol=1e-4)
    np.testing.assert_array_equal(kept[~exact], np.asarray(predicted)[~exact])
    np.testing.assert_array_equal(kept.argmax(axis=1), dense.argmax(axis=1))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_row_is_computed_exactly(bad, normal):
    rows, x = normal((50, 8)).at[31, 3].set(bad), jnp.abs(normal((1, 8), seed=1))
    got = vocab_logits(x, rows, pack_predictor(rows, Q8), Q8, candidates=4, out_dtype=jnp.float32)
    np.testing.assert_array_equal(got[0, 31], (x @ rows.T)[0, 31])
    assert np.isfinite(np.delete(got[0], 31)).all()


def test_bad_vocab_input_is_named(normal):
    rows, x = normal((50, 8)), normal((1, 8))
    call = partial(vocab_logits, x, rows, pack_predictor(rows, Q8), Q8, out_dtype=jnp.float32)
    for change, message in (({"candidates": 51}, "k=51"), ({"candidates": 4, "fill": "zero"}, "fill='zero'")):
        with pytest.raises(ValueError, match=message):
            call(**change)


def test_vocab_under_every_transformation(normal):
    rows, x = normal((60, 8)), normal((5, 2, 8), seed=1)
    packed = pack_predictor(rows, Q8)
    call = partial(vocab_logits, rows=rows, packed=packed, spec=Q8, candidates=7, out_dtype=jnp.float32)
    plain = jnp.stack([jax.jit(call)(one) for one in x])
    np.testing.assert_allclose(jax.vmap(call)(x), plain, atol=1e-5)
    _, scanned = jax.jit(lambda x: jax.lax.scan(lambda c, one: (c, call(one)), None, x))(x)
    np.testing.assert_allclose(scanned, plain, atol=1e-5)
    grad = jax.grad(lambda one: jax.nn.logsumexp(call(one), axis=-1).sum())(x[0])
    dense = jax.grad(lambda one: jax.nn.logsumexp(one @ rows.T, axis=-1).sum())(x[0])
    np.testing.assert_allclose(grad, dense, atol=0.05)
    exported = jax.export.export(jax.jit(call), platforms=("cpu", "tpu", "cuda"))(x[0])
    np.testing.assert_allclose(exported.call(x[0]), plain[0], atol=1e-5)


def gated(hiddens, gather, bias=None):
    out = jax.nn.relu(hiddens[0]) * hiddens[1]
    return out if bias is None else out + gather(bias)


def block(x, gate, up, down, specs, *, region=gated, **kwargs):
    ups = [
        UpProduct(x=x, rows=w, packed=pack_predictor(w, s), spec=s, dtype=x.dtype)
        for w, s in zip((gate, up), specs, strict=True)
    ]
    norms = jnp.linalg.norm(down.astype(jnp.float32), axis=1)
    options = {"region": region, "down_norms": norms, "out_dtype": jnp.float32, **kwargs}
    return ffn(ups, down=down, **options)[0]


@pytest.mark.parametrize("specs", [(Q8, Q8), (LowRank(0.5), Q8), (Quantized(4), LowRank(3, bits=8))], ids=str)
@pytest.mark.parametrize(("tokens", "group"), [(1, 1), (1, 4), (3, 1), (8, 2)])
def test_all_units_give_the_dense_block(tokens, group, specs, normal):
    x, gate, up = normal((tokens, 13)), normal((40, 13), seed=1), normal((40, 13), seed=2)
    down, bias = normal((40, 9), seed=3), normal((40,), seed=4)
    dense = gated([x @ gate.T, x @ up.T], lambda v: v, bias) @ down
    region = partial(gated, bias=bias)
    call = partial(block, specs=specs, region=region, active=40 // group, group_size=group)
    got = jax.jit(call)(x, gate, up, down)
    np.testing.assert_allclose(got, dense, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("varying", [(40,), (1, 40), (3, 40)])
@pytest.mark.parametrize("group", [1, 4])
def test_gather_brings_values_to_the_chosen_units(varying, group, normal):
    """Exact predictions at any width: the result is dense with the other units left out."""
    x, gate, up = normal((3, 13)), normal((40, 13), seed=1), normal((40, 13), seed=2)
    down, bias = normal((40, 9), seed=3), normal(varying, seed=4)
    for active in (1, 6):
        options = {"region": partial(gated, bias=bias), "active": active, "group_size": group}
        got = jax.jit(partial(block, specs=(EXACT, EXACT), **options))(x, gate, up, down)
        activation = np.asarray(gated([x @ gate.T, x @ up.T], lambda v: v, bias))
        selection = selection_of(3, 40 // group, active)
        score = (activation * np.linalg.norm(down, axis=1)) ** 2
        score = score.reshape(3, -1, group).sum(-1)
        if selection.mode == "per_token":
            keep = score >= np.sort(score, axis=1)[:, -active][:, None]
            np.testing.assert_allclose(got, (activation * np.repeat(keep, group, 1)) @ down, rtol=1e-3, atol=1e-3)
        else:
            assert got.shape == (3, 9)


def test_units_that_are_zero_are_not_missed(normal):
    """With few units firing, computing a quarter of them is exact."""
    x, gate, down = normal((1, 32)), normal((256, 32), seed=1), normal((256, 24), seed=3)
    threshold = jnp.sort(x @ gate.T, axis=1)[0, -20]

    def region(hiddens, gather):
        return jax.nn.relu(hiddens[0] - threshold)

    up = UpProduct(x=x, rows=gate, packed=pack_predictor(gate, Q8), spec=Q8, dtype=jnp.float32)
    norms = jnp.linalg.norm(down, axis=1)
    got, _ = ffn([up], region, down, down_norms=norms, active=64, out_dtype=jnp.float32)
    np.testing.assert_allclose(got, jax.nn.relu(x @ gate.T - threshold) @ down, rtol=1e-4, atol=1e-4)


def test_bf16_blocks_keep_their_dtypes(normal):
    seen = []

    def region(hiddens, gather):
        seen.append([h.dtype for h in hiddens])
        return gated(hiddens, gather)

    x, gate, up, down = (normal(s, jnp.bfloat16, i) for i, s in enumerate([(1, 16), (32, 16), (32, 16), (32, 8)]))
    got = block(x, gate, up, down, (Q8, Q8), region=region, active=32, out_dtype=jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    assert seen == [[jnp.bfloat16] * 2] * 2
    dense = (jax.nn.relu(x @ gate.T) * (x @ up.T)).astype(jnp.float32) @ down.astype(jnp.float32)
    np.testing.assert_allclose(got.astype(jnp.float32), dense, rtol=0.05, atol=0.5)


def test_ffn_under_every_transformation(normal):
    x, gate, up, down = (normal(s, seed=i) for i, s in enumerate([(4, 3, 13), (40, 13), (40, 13), (40, 13)]))
    call = partial(block, gate=gate, up=up, down=down, specs=(Q8, Q8), active=5)
    plain = jnp.stack([jax.jit(call)(one) for one in x])
    np.testing.assert_allclose(jax.vmap(call)(x), plain, rtol=1e-4, atol=1e-3)
    _, scanned = jax.jit(lambda x: jax.lax.scan(lambda c, one: (c, call(one)), None, x))(x)
    np.testing.assert_allclose(scanned, plain, rtol=1e-4, atol=1e-3)
    full = partial(block, gate=gate, up=up, down=down, specs=(Q8, Q8), active=40)
    grad = jax.grad(lambda one: full(one).sum())(x[0])
    dense = jax.grad(lambda one: (gated([one @ gate.T, one @ up.T], None) @ down).sum())(x[0])
    np.testing.assert_allclose(grad, dense, rtol=1e-3, atol=1e-2)


def test_bad_ffn_input_is_named(normal):
    x, gate, down = normal((1, 8)), normal((10, 8)), normal((10, 4))
    up = UpProduct(x=x, rows=gate, packed=pack_predictor(gate, Q8), spec=Q8, dtype=jnp.float32)
    call = partial(ffn, region=gated, down=down, down_norms=jnp.ones(10), out_dtype=jnp.float32)
    for ups, sizes, message in (
        ([], {"active": 1}, "no product"),
        ([up], {"active": 1, "group_size": 3}, "group_size=3 does not divide the 10"),
        ([up], {"active": 6, "group_size": 2}, "expected 1 <= k <= 5"),
    ):
        with pytest.raises(ValueError, match=message):
            call(ups, **sizes)


def test_bytes_are_predictor_and_chosen_rows():
    assert vocab_bytes(1, 1000, 64, jnp.bfloat16, Q8, candidates=10) == 1000 * 64 + 4000 + 10 * 64 * 2
    assert predictor_bytes(1000, 64, LowRank(16)) == 4 * 16 * 1064
    sizes = {"active": 8, "group_size": 4}
    one = ffn_bytes(1, 256, [(64, jnp.float32, Q8)], 32, jnp.float32, **sizes)
    assert one == (256 * 64 + 4 * 256) + 32 * 64 * 4 + 32 * 32 * 4 + 4 * 256
    two = ffn_bytes(1, 256, [(64, jnp.float32, Q8), (64, jnp.float32, Q8)], 32, jnp.float32, **sizes)
    assert two - one == (256 * 64 + 4 * 256) + 32 * 64 * 4


@pytest.mark.parametrize(
    ("tokens", "active", "group_size", "shards"),
    [(1, 16, 1, 1), (1, 8, 2, 1), (2, 16, 1, 1), (3, 14, 1, 1), (8, 12, 1, 1), (1, 16, 1, 4), (3, 8, 2, 2)],
)
def test_a_block_is_short_where_a_unit_that_is_not_zero_is_left_out(tokens, active, group_size, shards, normal):
    """By the predictors, which are exact here; whatever the mode of the selection, on each of several devices."""
    m, d, modes = 64, 12, set()
    rows, down = normal((m, d)), normal((m, 7), seed=1)
    parts = list(zip(*(jnp.split(a, shards) for a in (rows, down)), strict=True))
    packed = [pack_predictor(own, EXACT) for own, _ in parts]
    sizes = {"active": active // shards, "group_size": group_size, "out_dtype": jnp.float32}
    for seed in range(4):
        for bias in (-9.0, -5.0, -4.0, -3.0, 0.0):
            x = normal((tokens, d), seed=10 + seed)
            for (own, own_down), kept in zip(parts, packed, strict=True):
                result, short = ffn(
                    [UpProduct(x=x, rows=own, packed=kept, spec=EXACT, dtype=jnp.float32)],
                    lambda hiddens, _, bias=bias: jax.nn.relu(hiddens[0] + bias),
                    own_down,
                    down_norms=jnp.linalg.norm(own_down, axis=1),
                    **sizes,
                )
                want = jax.nn.relu(x @ own.T + bias) @ own_down
                assert (short.shape, short.dtype) == ((), bool)
                assert bool(short) == (float(jnp.abs(result - want).max()) > 1e-3)
                modes.add(bool(short))
    assert modes == {False, True}
