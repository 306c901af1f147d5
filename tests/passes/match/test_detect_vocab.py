"""Vocabulary projections fire once whatever reads their logits; products that only look like one do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same, full_width, kinds, named, tolerance
from jax import lax

import hire_xform as hx

D, V, PADDED = 12, 61, 64


def weights(dtype=jnp.float32) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = {"e": (V, D), "h": (D, V), "p": (PADDED, D), "b": (V,), "down": (V, 7), "k": (D, D), "h3": (D, 4, 16)}
    return {name: jnp.asarray(rng.normal(size=shape) * 0.3, dtype) for name, shape in shapes.items()}


def tokens(count, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(count, D)), dtype)


def plan_of(fun, p, x, config=None):
    return hx.sparsify(fun, config=config or full_width()).trace(p, x).plan


def fires_once(fun, count=3, dtype=jnp.float32, width=V, x=None, evaluated=True) -> None:
    p, x = weights(dtype), tokens(count, dtype) if x is None else x
    step = hx.sparsify(fun, config=full_width())
    traced = step.trace(p, x)
    assert kinds(traced.plan) == ["vocab"], traced.explain()
    assert not traced.plan.refusals
    site = traced.plan.sites[0]
    assert (site.units, site.inputs, site.tokens) == (width, D, int(np.prod(x.shape[:-1], dtype=int)))
    if not evaluated:
        return
    assert_same(step(p, x), jax.jit(fun)(p, x), tolerance(dtype))
    assert_same(step(traced.pack(p), x), jax.jit(fun)(p, x), tolerance(dtype))


def refused(fun, *words, config=None, count=1, x=None) -> None:
    plan = plan_of(fun, weights(), tokens(3) if x is None else x, config)
    assert "vocab" not in kinds(plan), plan
    reasons = [r.reason for r in plan.refusals]
    assert len(reasons) >= count
    assert any(all(word in reason for word in words) for reason in reasons), reasons


LOGITS = {
    "untied": lambda p, x: x @ p["h"],
    "tied": lambda p, x: x @ p["e"].T,
    "einsum": lambda p, x: jnp.einsum("td,vd->tv", x, p["e"]),
    "einsum_left": lambda p, x: jnp.einsum("vd,td->vt", p["e"], x).T,
    "weight_left": lambda p, x: (p["e"] @ x.T).T,
    "f32_logits": lambda p, x: jnp.matmul(x, p["h"], preferred_element_type=jnp.float32),
    "cast_first": lambda p, x: x.astype(jnp.float32) @ p["h"].astype(jnp.float32),
    "bias": lambda p, x: x @ p["h"] + p["b"],
    "soft_cap": lambda p, x: 30.0 * jnp.tanh(x @ p["h"] / 30.0),
    "temperature": lambda p, x: (x @ p["h"]) / 0.7,
    "mask": lambda p, x: jnp.where(jnp.arange(V) < 50, x @ p["h"], -1e9),
    "log_softmax": lambda p, x: jax.nn.log_softmax(x @ p["h"]),
    "softmax": lambda p, x: jax.nn.softmax(x @ p["h"]),
    "all_of_these": lambda p, x: jax.nn.log_softmax((jnp.tanh((x @ p["e"].T + p["b"]) / 30) * 30).astype("f4") / 0.8),
    "jitted": lambda p, x: jax.jit(lambda p, x: x @ p["h"])(p, x),
    "penalty": lambda p, x: (x @ p["h"]).at[:, 3].add(-1.0),
    "taken_targets": lambda p, x: jnp.take_along_axis(jax.nn.log_softmax(x @ p["h"]), jnp.array([[3], [4], [5]]), 1),
    "loss": lambda p, x: -jnp.mean(jax.nn.log_softmax(x @ p["h"])[jnp.arange(3), jnp.array([1, 2, 3])]),
}

PICKS = {
    "argmax": lambda p, x: jnp.argmax(x @ p["h"], axis=-1),
    "top_k": lambda p, x: lax.top_k(x @ p["h"], 5),
    "sort": lambda p, x: jnp.sort(x @ p["h"], axis=-1),
    "categorical": lambda p, x: jax.random.categorical(jax.random.key(0), x @ p["h"]),
    "sign_bit": lambda p, x: (lambda u: jnp.argmax(jnp.where((u == 0) & jnp.signbit(u), -1e-30, u), -1))(x @ p["h"]),
    "max": lambda p, x: jnp.max(x @ p["h"], axis=-1),
    "best_of_all_beams": lambda p, x: lax.top_k(jax.nn.log_softmax(x @ p["h"]).reshape(-1), 4),
    "entropy": lambda p, x: (lambda lp: -jnp.sum(jnp.exp(lp) * lp, -1))(jax.nn.log_softmax(x @ p["h"])),
}


@pytest.mark.parametrize("name", LOGITS)
def test_every_spelling_of_logits_fires_once(name, evaluated):
    fires_once(LOGITS[name], evaluated=evaluated)


@pytest.mark.parametrize("name", PICKS)
def test_every_consumer_of_logits_fires_once(name, evaluated):
    fires_once(PICKS[name], evaluated=evaluated)


def test_scores_that_a_loop_carries_and_joins_to_others_fire_once():
    def fun(p, x):
        def body(_, best):
            kept = lax.top_k(jnp.concatenate([best, best / 2], axis=-1), 4)[0]
            return jnp.maximum(kept, lax.top_k(x @ p["h"], 4)[0])

        return lax.fori_loop(0, 3, body, jnp.zeros((3, 4)))

    fires_once(fun)


def test_no_token_axis_is_one_token():
    fires_once(LOGITS["tied"], x=tokens(1)[0])


def test_the_last_token_of_a_prefill_is_one_token():
    plan = plan_of(lambda p, x: (x @ p["k"])[-1] @ p["h"], weights(), tokens(3))
    assert [(s.kind, s.tokens) for s in plan.sites] == [("vocab", 1)]


def test_a_tied_embedding_is_a_site_and_a_lookup():
    p, ids = weights(), jnp.array([3, 5])

    def fun(p, ids):
        return p["e"][ids] @ p["e"].T

    step = hx.sparsify(fun, config=full_width())
    traced = step.trace(p, ids)
    assert kinds(traced.plan) == ["vocab"]
    assert_same(step(traced.pack(p), ids), fun(p, ids))


def test_two_heads_are_two_sites():
    plan = plan_of(lambda p, x: (x @ p["h"], x @ p["e"].T), weights(), tokens(1))
    assert kinds(plan) == ["vocab", "vocab"]


@pytest.mark.parametrize("fill", ["predicted", "-inf"])
def test_the_fill_stands_where_no_candidate_is(fill):
    p, x = weights(), tokens(1)
    config = hx.Config(rules=named(hx.Vocab(candidates=8, fill=fill)))
    sparse = np.asarray(hx.sparsify(LOGITS["untied"], config=config)(p, x))
    dense = np.asarray(LOGITS["untied"](p, x))
    assert (sparse == -np.inf).sum() == (V - 8 if fill == "-inf" else 0)
    exact = np.isclose(sparse, dense, atol=1e-6)
    assert exact.sum() >= 8
    assert not exact.all()
    assert sparse.argmax() == dense.argmax()


# Near misses.


def test_logits_returned_and_contracted_are_refused():
    def fun(p, x):
        logits = x @ p["h"]
        return logits, logits @ p["down"]

    refused(fun, "returned as well as contracted", count=2)


def test_logits_read_in_pieces_of_their_bits_are_refused():
    refused(lambda p, x: lax.bitcast_convert_type(x @ p["h"], jnp.uint8), "bitcast_convert_type", "not followed")


def test_a_narrow_product_is_refused():
    refused(lambda p, x: x @ p["k"], "too narrow")


FACTORS = {
    # A projection to a narrower embedding, to one as wide as the model, to a wider one.
    "narrower": lambda p, x: (x @ p["k"][:, :5]) @ p["e"][:, :5].T,
    "square": lambda p, x: (x @ p["k"]) @ p["h"],
    "wider": lambda p, x: (x @ p["h3"].reshape(D, 64)[:, :20]) @ p["p20"],
    "scaled_and_shifted": lambda p, x: ((x @ p["k"][:, :5]) * p["b"][:5] / 2.0 + p["b"][:5]) @ p["e"][:, :5].T,
}


@pytest.mark.parametrize("name", FACTORS)
def test_the_second_of_two_factors_is_the_vocabulary(name):
    p, x = weights(), tokens(3)
    p["p20"] = jnp.tile(p["p"], (1, 2))[:, :20].T
    step = hx.sparsify(FACTORS[name], config=full_width())
    traced = step.trace(p, x)
    assert kinds(traced.plan) == ["vocab"], traced.explain()
    assert ["a weight's as well" in r.reason for r in traced.plan.refusals] == [True]
    assert_same(step(p, x), jax.jit(FACTORS[name])(p, x))


def test_chunks_of_it_are_refused():
    refused(lambda p, x: jnp.split(x @ p["p"].T, 2, axis=-1), "split or merged")


def test_scores_of_it_against_itself_are_refused():
    refused(lambda p, x: (x @ p["h"]) @ (x @ p["h"]).T, "another product")


def test_an_unused_product_is_refused_or_gone():
    def fun(p, x):
        x @ p["h"]
        return x

    plan = plan_of(fun, weights(), tokens(1))
    assert not plan.sites
    assert all("not used" in r.reason for r in plan.refusals)


def test_a_scan_over_it_is_refused():
    def fun(p, x):
        return lax.scan(lambda c, u: (c + u, c), jnp.zeros(3), (x @ p["h"]).T)

    refused(fun, "scan", "not followed")


def test_too_many_tokens_are_refused():
    refused(LOGITS["untied"], "9 tokens", "max_tokens=8", config=full_width(max_tokens=8), x=tokens(9))


def test_vocab_none_leaves_it_dense():
    refused(LOGITS["untied"], "vocab=None", config=hx.Config(vocab=None))


def test_a_product_of_two_weights_is_refused():
    refused(lambda p, x: x.sum() + p["k"] @ p["h"], "both operands are weights")


def test_a_small_vocabulary_is_left_dense_by_the_cost_model():
    refused(LOGITS["untied"], "would not be faster", config=hx.Config(rules=(hx.Rule("*", vocab=hx.Vocab()),)))
