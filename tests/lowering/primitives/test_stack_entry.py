"""One matrix of a stack: the same as if it were taken out first, and read by kernels where it lies."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hire_xform as hx
from hire_xform.lowering.kernels.cpu import library
from hire_xform.lowering.predict.few_bits import fine_scores, pack_nibbles, quantized_scores
from hire_xform.lowering.primitives.kernels import register_kernel
from hire_xform.lowering.primitives.products import all_products
from hire_xform.lowering.primitives.scores import predicted_scores
from hire_xform.lowering.primitives.stack_entry import StackEntry, of_one, whole

pytestmark = pytest.mark.any_jax("cases vary the predictor that reads a stack", every=3)

native = pytest.mark.skipif(isinstance(library.load(), str), reason="no native kernels here")


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def integers(bits, *shape):
    top = 127 if bits == 8 else 7
    q = jnp.asarray(np.random.default_rng(1).integers(-top, top + 1, shape), jnp.int8)
    return q if bits == 8 else pack_nibbles(q)


def test_an_entry_is_of_its_own_shape_and_lies_behind_the_others():
    stack = normal(2, 3, 4, 5)
    entry = StackEntry(stack, (jnp.int32(1), jnp.int32(2)))
    assert (entry.shape, entry.ndim, entry.dtype) == ((4, 5), 2, jnp.float32)
    np.testing.assert_array_equal(whole(entry), stack[1, 2])
    rows, first = entry.laid_out()
    assert rows.shape == (24, 5)
    np.testing.assert_array_equal(rows[int(first) : int(first) + 4], stack[1, 2])
    assert [struct.shape for struct in of_one([stack, entry])] == [(2, 3, 4, 5), (4, 5)]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("score", [quantized_scores, fine_scores])
def test_scores_of_an_entry_are_those_of_its_matrix(score, bits):
    x, q, scale = normal(2, 10), integers(bits, 3, 6, 10), normal(3, 6)

    @jax.jit
    def of_entry(x, i):
        return score(x, StackEntry(q, (i,)), scale[i], bits)

    for i in range(3):
        want = score(x, q[i], scale[i], bits)
        jax.tree.map(np.testing.assert_array_equal, of_entry(x, jnp.int32(i)), want)


def test_products_with_an_entry_are_those_with_its_matrix_and_so_are_their_derivatives():
    x, rows, i = normal(2, 5), normal(3, 4, 5), jnp.int32(2)
    of_entry = jax.jit(lambda x, i: all_products(x, StackEntry(rows, (i,))))
    np.testing.assert_allclose(of_entry(x, i), x @ rows[2].T, rtol=1e-6)
    got = jax.grad(lambda x: jnp.sum(jnp.square(of_entry(x, i))))(x)
    np.testing.assert_allclose(got, jax.grad(lambda x: jnp.sum(jnp.square(x @ rows[2].T)))(x), rtol=1e-5)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
def test_examples_may_have_an_entry_each(axes):
    x, q, scale = normal(2, 1, 10), integers(8, 3, 6, 10), normal(3, 6)
    i = jnp.asarray([2, 0], jnp.int32)
    score = jax.jit(jax.vmap(lambda x, i: quantized_scores(x, StackEntry(q, (i,)), scale[i], 8), in_axes=axes))
    got = score(x if axes[0] == 0 else x[0], i if axes[1] == 0 else i[0])
    own = [(x[n if axes[0] == 0 else 0], int(i[n if axes[1] == 0 else 0])) for n in range(2)]
    np.testing.assert_array_equal(got, jnp.stack([quantized_scores(x, q[i], scale[i], 8) for x, i in own]))


def test_a_kernel_of_a_user_is_given_the_matrix():
    seen = []

    def kernel(x, q, scale, *, bits):
        seen.append(q.shape)
        return (x @ q.T.astype(jnp.float32)) * scale

    remove = register_kernel("hire_quantized_scores", "cpu", kernel, lambda x, q, scale, *, bits: q.shape == (6, 10))
    try:
        x, q, scale = normal(1, 10), integers(8, 3, 6, 10), normal(3, 6)
        entry = jax.jit(lambda x, i: quantized_scores(x, StackEntry(q, (i,)), scale[i], 8))
        np.testing.assert_allclose(entry(x, jnp.int32(1)), (x @ q[1].T) * scale[1], rtol=1e-5)
    finally:
        remove()
    assert seen == [(6, 10)]


class Doubled(hx.Predictor):
    """From outside: takes arrays, and knows nothing of stacks."""

    def pack(self, rows, given):
        return {"q": 2.0 * rows}

    def scores(self, x, packed, n):
        return x @ packed["q"].T


def test_a_predictor_that_does_not_ask_for_entries_is_given_matrices():
    x, stack = normal(1, 5), normal(3, 4, 5)
    scores = jax.jit(lambda i: predicted_scores(x, {"q": StackEntry(stack, (i,))}, Doubled(), 4))
    np.testing.assert_allclose(scores(jnp.int32(1)), x @ stack[1].T, rtol=1e-5)


LAYERS, D, M = 3, 48, 160
SETTINGS = {"active": 0.25, "certify": False}


def scanned(w, x):
    return jax.lax.scan(lambda x, own: (x + jax.nn.relu(x @ own["up"]) @ own["down"], None), x, w)[0]


def indexed(w, x):
    for i in range(LAYERS):
        x = x + jax.nn.relu(x @ w["up"][i]) @ w["down"][i]
    return x


@native
@pytest.mark.parametrize("fun", [scanned, indexed])
@pytest.mark.parametrize("predictor", [hx.Quantized(8), hx.Quantized(4), hx.LowRank(0.5), hx.LowRank(0.5, bits=8)])
def test_no_layers_predictor_is_copied_out_of_its_stack(fun, predictor):
    w, x = {"up": normal(LAYERS, D, M), "down": normal(LAYERS, M, D)}, normal(1, D)
    config = hx.Config(vocab=None, ffn=hx.Ffn(predictor=predictor, **SETTINGS), rules=(hx.Rule("*", force=True),))
    step = hx.sparsify(fun, config=config)
    packed = step.trace(w, x).pack(w)
    text = jax.jit(lambda packed, x: step(packed, x)).lower(packed, x).compile().as_text()
    assert "custom-call" in text
    one_layers = re.compile(rf"= \w+\[(1,)?{M},({D}|{D // 2})\]\S* (?!parameter)")
    assert not [line for line in text.splitlines() if one_layers.search(line)]


@pytest.mark.parametrize("fun", [scanned, indexed])
@pytest.mark.parametrize("certify", [False, True])
@pytest.mark.parametrize("predictor", [hx.Quantized(8), hx.LowRank(0.5, bits=4), hx.LowRank(0.5)])
def test_all_of_a_stacks_units_are_the_dense_block(fun, certify, predictor):
    w, x = {"up": normal(LAYERS, D, M), "down": normal(LAYERS, M, D)}, normal(2, D)
    ffn = hx.Ffn(predictor=predictor, active=1.0, certify=certify)
    step = hx.sparsify(fun, config=hx.Config(vocab=None, ffn=ffn, rules=(hx.Rule("*", force=True),)))
    traced = step.trace(w, x)
    assert len(traced.plan.decisions) == (1 if fun is scanned else LAYERS)
    np.testing.assert_allclose(step(traced.pack(w), x), fun(w, x), rtol=2e-4, atol=2e-4)
