"""The arg max of a rewritten head's logits is a step of its own, wherever it reads them; others stay as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hire_xform as hx
from hire_xform.lowering.primitives.arg_max import arg_max_p

D, V = 8, 96
W = jnp.asarray(np.random.default_rng(0).normal(size=(D, V)), jnp.float32)
X = jnp.asarray(np.random.default_rng(1).normal(size=(3, D)), jnp.float32)
FULL = hx.Config(vocab=hx.Vocab(candidates=V, certify=False), rules=(hx.Rule("*", force=True),))


def steps_of(fun, *args):
    jaxpr = hx.sparsify(fun, config=FULL).trace(*args).sparse_jaxpr

    def count(jaxpr):
        inner = (p for eqn in jaxpr.eqns for p in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns")))
        held = (getattr(p, "jaxpr", p) for p in inner)
        return sum(e.primitive is arg_max_p for e in jaxpr.eqns) + sum(count(p) for p in held if hasattr(p, "eqns"))

    return count(jaxpr.jaxpr)


def padded(w, x):
    return jnp.argmax((x @ w)[:, : V - 5], axis=-1)


def capped(w, x):
    logits = 30.0 * jnp.tanh((x @ w) / 30.0)
    return logits, jnp.argmax(logits, axis=-1)


def sampled(w, x):
    return jax.random.categorical(jax.random.key(3), x @ w / 0.7)


def in_a_scan(w, x):
    def body(x, _):
        token = jnp.argmax(jax.jit(jnp.matmul)(x, w), axis=-1)
        return x + 0.1 * w.T[token], token

    return jax.lax.scan(body, x, None, length=3)[1]


def turned(w, x):
    return jnp.argmax(jnp.exp((w.T @ x.T).T), axis=-1)


@pytest.mark.parametrize("fun", [padded, capped, sampled, in_a_scan, turned])
def test_it_is_taken_by_the_step(fun):
    assert steps_of(fun, W, X) == 1
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5),
        hx.sparsify(fun, config=FULL)(W, X),
        fun(W, X),
    )


def test_16_bits_and_another_type_of_index():
    def of_16_bits(w, x):
        return jax.lax.argmax(x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16), 1, jnp.uint8)

    assert steps_of(of_16_bits, W, X) == 1
    got = hx.sparsify(of_16_bits, config=FULL)(W, X)
    assert got.dtype == jnp.uint8
    np.testing.assert_array_equal(got, of_16_bits(W, X))


@pytest.mark.parametrize(
    "fun",
    [
        lambda w, x: (jnp.argmax(x, axis=-1), jax.lax.top_k(x @ w, 4)),
        lambda w, x: (jnp.argmax(x @ w, axis=0), jax.lax.top_k(x @ w, 4)),
        lambda w, x: jnp.argmin(-(x @ w), axis=-1),
    ],
    ids=["of something else", "along the tokens", "an arg min"],
)
def test_others_are_left(fun):
    assert steps_of(fun, W, X) == 0


def test_it_is_differentiated_and_batched():
    def loss(x):
        logits = x @ W
        return jnp.sum(jnp.take_along_axis(logits, jnp.argmax(logits, axis=-1)[:, None], axis=1))

    sparse = hx.sparsify(loss, config=FULL)
    np.testing.assert_allclose(jax.grad(sparse)(X), jax.grad(loss)(X), rtol=1e-5)
    many = jnp.stack([X, 2.0 * X, -X])
    np.testing.assert_allclose(jax.vmap(sparse)(many), jax.vmap(loss)(many), rtol=1e-5)
