"""Heads that are certified in stages take the dense tokens, greedy and sampled, in every context."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import named

import hire_xform as hx

V, D = 700, 32
SPEC = hx.Staged((hx.LowRank(12, bits=8), hx.Quantized(8)))
CONFIG = hx.Config(ffn=None, rules=named(hx.Vocab(certify=True, candidates=4, predictor=SPEC)))


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def greedy(w, x):
    return jnp.argmax(x @ w.T, axis=-1)


def drawn(w, x, key):
    return jax.random.categorical(key, (x @ w.T) / 0.7)


def packed(fun, w, *data):
    step = hx.sparsify(fun, config=CONFIG)
    return step, step.trace(w, *data).pack(w)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_greedy_tokens_one_by_one_under_vmap_and_in_a_scan(dtype):
    w, x = normal(0, V, D, dtype=dtype), normal(1, 6, D, dtype=dtype)
    step, kept = packed(greedy, w, x[:1])
    want = jax.jit(greedy)(w, x)

    def one(x):
        return step(kept, x[None])[0]

    np.testing.assert_array_equal([one(each) for each in x], want)
    np.testing.assert_array_equal(jax.jit(jax.vmap(one))(x), want)
    np.testing.assert_array_equal(jax.lax.scan(lambda carry, x: (carry, one(x)), 0, x)[1], want)


def test_tokens_drawn_with_noise_that_is_known():
    w, x, keys = normal(0, V, D), normal(1, 4, D), jax.random.split(jax.random.key(0), 24)
    step, kept = packed(drawn, w, x[:1], keys[0])
    dense, dense_runs = jax.jit(drawn), 0
    for i, key in enumerate(keys):
        token, counts = step.with_fallbacks(kept, x[i % 4][None], key)
        assert int(token[0]) == int(dense(w, x[i % 4][None], key)[0])
        dense_runs += sum(map(int, counts.values()))
    assert dense_runs <= 1


def test_derivatives_are_those_of_the_dense_head():
    w, x = normal(0, V, D), normal(1, 1, D)
    fun = functools.partial(hx.sparsify(lambda w, x: x @ w.T, config=CONFIG), w)
    found = jax.grad(lambda x: jnp.sum(jnp.sin(fun(x))))(x)
    # The derivative of sin is of the logits that are returned, of which few are exact.
    want = jnp.cos(fun(x)) @ w
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-3)


def test_rows_of_stages_are_counted_and_so_are_their_bytes():
    """Two rows open alone, or all of them: what is read is counted in every context, once for all that read it."""
    w = normal(0, V, D)
    step, kept = packed(greedy, w, w[:1])
    (site,) = step.trace(w, w[:1]).plan.sites
    stage, size, dense = site.rungs
    assert site.sizes == (size, dense)
    assert (stage.stage, stage.computed) == ("Quantized(bits=8)", 0)
    # A byte an entry, and scale, error and size of the row.
    assert stage.bytes == D + 3 * 4
    x, zero = w[:1], jnp.zeros((1, D))
    (few,) = step.with_rungs(kept, x)[1].values()
    (every,) = step.with_rungs(kept, zero)[1].values()
    assert 4 < int(few[0]) < V
    assert few.tolist()[1:] == [1, 0]
    assert every.tolist() == [V, 0, 1]
    first = V * (12 + 4 * 4) * 1.0
    assert size.bytes < V * stage.bytes + first + 4 * D * 13  # those of further stages are not in it
    # In a scan they are added up; of a batch that reads rows together they are read once.
    scanned = hx.sparsify(lambda w, xs: jax.lax.map(lambda x: greedy(w, x[None]), xs), config=CONFIG)
    (counts,) = scanned.with_rungs(w, jnp.concatenate([x, zero, x]))[1].values()
    assert counts.tolist() == [2 * int(few[0]) + V, 2, 1]
    batched = hx.sparsify(lambda w, xs: jax.vmap(lambda x: greedy(w, x[None]))(xs), config=CONFIG)
    (counts,) = batched.with_rungs(w, jnp.concatenate([x, x]))[1].values()
    assert int(counts[0]) == int(few[0])


def test_what_is_expected_of_sizes_and_stages_is_what_the_site_is_said_to_read():
    w = normal(0, V, D)
    step, _ = packed(greedy, w, w[:1])
    (site,) = step.trace(w, w[:1]).plan.sites
    stage, size, _ = site.rungs
    assert abs(stage.share * stage.bytes + size.bytes - site.sparse_bytes) <= 1
