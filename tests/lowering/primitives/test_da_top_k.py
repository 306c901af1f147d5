import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hire_xform.lowering.primitives.da_top_k import da_top_k, da_top_k_p


def oracle(scores, k, shards):
    """Block after block, each sorted by (NaN first, value, lower index), then what is beyond the last score."""
    n = scores.shape[-1]
    width, own = -(-n // shards), -(-k // shards)
    rows = []
    for row in scores.reshape(-1, n):
        picked = []
        for s in range(shards):
            ends = min(s * width, n), min((s + 1) * width, n)
            block = sorted(range(*ends), key=lambda i: (not np.isnan(row[i]), -row[i] if row[i] == row[i] else 0.0, i))
            picked += [*block, *range(max(ends[1], s * width), (s + 1) * width)][:own]
        rows.append(picked)
    return np.array(rows, np.int32).reshape(*scores.shape[:-1], own * shards)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_takes_the_best_of_each_shard(data):
    shards = data.draw(st.sampled_from([1, 2, 4, 5, 7]))
    n = data.draw(st.sampled_from([12 * shards, 11, 3]))
    k = data.draw(st.sampled_from([1, 2, shards, 5, 7, n]).filter(lambda k: k <= n))
    pool = st.sampled_from([0.0, 1.0, 1.5, -2.0, 3.0, np.inf, -np.inf, np.nan, -np.nan])
    scores = np.array(data.draw(st.lists(pool, min_size=2 * n, max_size=2 * n)), np.float32).reshape(2, n)
    values, indices = da_top_k(scores, k, shards)
    expected = oracle(scores, k, shards)
    np.testing.assert_array_equal(indices, expected)
    beyond = expected >= n
    chosen = np.take_along_axis(scores, np.minimum(expected, n - 1), -1)
    np.testing.assert_array_equal(values, np.where(beyond, -np.inf, chosen))
    for row in np.asarray(indices):
        assert len(set(row.tolist())) == len(row)


def test_negative_nan_ranks_first():
    scores = jnp.array([1.0, jnp.inf, jnp.nan, 2.0]).at[3].set(-jnp.nan)
    assert set(np.asarray(da_top_k(scores, 2)[1]).tolist()) == {2, 3}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int8, jnp.int32, jnp.uint8])
def test_keeps_the_dtype_and_agrees_with_top_k(dtype):
    scores = jnp.asarray(np.random.default_rng(0).permutation(100), dtype)
    values, indices = da_top_k(scores, 9)
    assert values.dtype == dtype
    assert indices.dtype == jnp.int32
    np.testing.assert_array_equal(indices, jax.lax.top_k(scores, 9)[1])


def test_narrow_types_are_ranked_as_f32():
    """XLA's CPU backend runs a full sort for every other type."""
    text = jax.jit(lambda s: da_top_k(s, 4)).lower(jnp.zeros((64,), jnp.bfloat16)).as_text()
    (line,) = [line for line in text.splitlines() if "top_k" in line and "chlo" in line]
    assert "tensor<1x64xf32>" in line


@pytest.mark.parametrize(
    ("scores", "k", "shards", "error", "message"),
    [
        (jnp.zeros(8), 0, 1, ValueError, "k=0"),
        (jnp.zeros(8), 9, 1, ValueError, "expected 1 <= k <= 8"),
        (jnp.zeros(8), 4, 0, ValueError, "shards=0; expected at least 1"),
        (jnp.zeros(()), 1, 1, ValueError, "scalar"),
        (jnp.zeros(8, bool), 1, 1, TypeError, "bool"),
        (jnp.zeros(8, jnp.complex64), 1, 1, TypeError, "complex64"),
    ],
)
def test_bad_input_is_named(scores, k, shards, error, message):
    with pytest.raises(error, match=message):
        da_top_k(scores, k, shards)
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda s: da_top_k(s, k, shards), scores)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8, jnp.uint8, jnp.float8_e4m3fn])
def test_a_short_block_fills_up_with_the_lowest_value_of_any_dtype(dtype):
    """The one score in the last of three blocks is the lowest there can be: it stands before what is none."""
    lowest = jnp.iinfo(dtype).min if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype).min
    scores = jnp.asarray([1, 2, 3, 4, 5, 6, lowest], dtype)
    values, indices = da_top_k(scores, 6, 3)
    assert indices.tolist() == [2, 1, 5, 4, 6, 7]
    assert values.dtype == dtype
    assert float(values[-2]) == float(jnp.asarray(lowest, dtype)) >= float(values[-1])


def test_uneven_blocks_under_vmap_grad_and_export():
    """Scattered with ``mode="drop"``, what is beyond the last score is passed over."""
    scores = jnp.asarray(np.random.default_rng(0).permutation(22).reshape(2, 11), jnp.float32)

    def kept(row):
        values, index = da_top_k(row, 8, 4)
        return jnp.zeros(11).at[index].set(values, mode="drop", unique_indices=True)

    want = np.zeros((2, 11), np.float32)
    for row, picked in zip(want, oracle(np.asarray(scores), 8, 4), strict=True):
        row[picked[picked < 11]] = 1.0
    np.testing.assert_array_equal(jax.jit(jax.vmap(kept))(scores), want * scores)
    total = jax.grad(lambda s: jnp.where(jnp.isfinite(v := da_top_k(s, 8, 4)[0]), v, 0.0).sum())
    np.testing.assert_array_equal(total(scores), want)
    exported = jax.export.export(jax.jit(kept), platforms=("cpu", "tpu", "cuda"))(scores[0])
    np.testing.assert_array_equal(exported.call(scores[0]), kept(scores[0]))


def test_vmap_moves_the_batch_axis(normal):
    scores = normal((12, 5))
    got = jax.vmap(lambda s: da_top_k(s, 4, 2), in_axes=1)(scores)
    for a, b in zip(got, da_top_k(scores.T, 4, 2), strict=True):
        np.testing.assert_array_equal(a, b)


def test_gradient_is_that_of_a_gather(normal):
    scores = normal((3, 16))
    weights = normal((3, 4), seed=1)
    grad = jax.jit(jax.grad(lambda s: (da_top_k(s, 4, 2)[0] * weights).sum()))(scores)
    expected = np.zeros((3, 16), np.float32)
    np.put_along_axis(expected, np.asarray(da_top_k(scores, 4, 2)[1]), np.asarray(weights), -1)
    np.testing.assert_allclose(grad, expected)


def test_jvp_of_integers_and_of_constants(normal):
    values, tangent = jax.jvp(lambda s: da_top_k(s, 2)[0], (normal((8,)),), (jnp.arange(8.0),))
    assert tangent.shape == values.shape
    jax.grad(lambda x: x * da_top_k(jnp.arange(8), 2)[0].sum())(1.0)
    jax.grad(lambda x: x * da_top_k(jnp.arange(8.0), 2)[0].sum())(1.0)


def test_under_scan_and_remat(normal):
    def body(carry, s):
        values, index = jax.checkpoint(lambda s: da_top_k(s, 3))(s)
        return carry + values.sum(), index

    scores = normal((5, 20))
    _, index = jax.jit(lambda s: jax.lax.scan(body, 0.0, s))(scores)
    np.testing.assert_array_equal(index, da_top_k(scores, 3)[1])


def test_unused_result_is_removed():
    jaxpr = jax.make_jaxpr(lambda s: (da_top_k(s, 2), s * 2)[1])(jnp.zeros(8))
    text = jax.jit(lambda s: (da_top_k(s, 2), s * 2)[1]).lower(jnp.zeros(8)).as_text()
    assert any(eqn.primitive is da_top_k_p for eqn in jaxpr.eqns) or "top_k" not in text
    assert "top_k" not in text
