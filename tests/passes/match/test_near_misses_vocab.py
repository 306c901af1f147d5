"""Products that look like logits but are not, and logits that only look like something else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_refused, assert_same, full_width, named
from jax import lax

import hire_xform as hx

T, D, V = 3, 12, 64

SHAPES = {
    "head": (D, V),
    "other": (D, V),
    "embed": (V, D),
    "books": (4, D, V),
    "split": (D, 4, V // 4),
    "qkv": (D, 6 * D),
    "out": (2 * D, D),
    "input": (D, 4 * D),
    "hidden": (4 * D, 4 * D),
    "rank": (D, 4),
    "rank_head": (4, V),
    "scale": (V,),
}


def weights() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    found = {name: jnp.asarray(rng.normal(size=shape) * 0.3, jnp.float32) for name, shape in SHAPES.items()}
    found["int8"] = jnp.asarray(rng.integers(-9, 9, (D, V)), jnp.int8)
    return found


def tokens() -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(T, D)), jnp.float32)


def of_logits(use):
    return lambda p, x: use(x @ p["head"], p)


def recurrent(p, x):
    def step(h, _):
        h = jnp.tanh(x @ p["input"] + h @ p["hidden"])
        return h, h[:, :5]

    return lax.scan(step, jnp.zeros((T, 4 * D)), length=4)


def attention(p, x):
    q, k, v = jnp.split(x @ p["qkv"], 3, axis=-1)
    return jax.nn.softmax(q @ k.T) @ v @ p["out"]


def soft_top_k(logits, p):
    values, index = lax.top_k(logits, 4)
    return jnp.einsum("tk,tkd->td", jax.nn.softmax(values), p["embed"][index])


# Name: the function, words of one refusal's reason, and how many products must be refused.
NEAR_MISSES = {
    "contracted_by_a_weight": (of_logits(lambda u, p: jax.nn.softmax(u) @ p["embed"]), "mixed by reduce_max", 2),
    "contracted_by_a_vector": (of_logits(lambda u, p: u @ p["scale"]), "contracted by another product", 1),
    "sorted_and_contracted": (of_logits(lambda u, p: jnp.sort(u) @ p["scale"]), "mixed by sort", 1),
    "picked_and_contracted": (
        of_logits(lambda u, p: u[:, jnp.array([5, 1])] @ p["scale"][:2]),
        "mixed by gather",
        1,
    ),
    "best_and_contracted": (of_logits(soft_top_k), "mixed by top_k", 1),
    "kept_and_contracted": (
        of_logits(lambda u, p: lax.dynamic_update_slice(jnp.zeros((8, V)), u, (2, 0)) @ p["embed"]),
        "contracted by another product",
        2,
    ),
    "accumulated": (of_logits(lambda u, p: jnp.cumsum(u, axis=-1)), "cumsum", 1),
    "scanned_along": (
        of_logits(lambda u, p: lax.scan(lambda c, v: (c + v, c), jnp.zeros(T), u.T)),
        "goes into scan",
        1,
    ),
    "gates": (of_logits(lambda u, p: jax.nn.sigmoid(u[:, : V // 2]) * u[:, V // 2 :]), "split or merged", 1),
    "two_kinds_of_classes": (of_logits(lambda u, p: (u[:, :40].argmax(-1), u[:, 40:])), "split or merged", 1),
    "heads": (of_logits(lambda u, p: u.reshape(T, 4, V // 4)), "split or merged", 1),
    "codebooks": (lambda p, x: jnp.einsum("td,kdv->tkv", x, p["books"]), "split or merged", 1),
    "best_of_codebooks": (
        lambda p, x: jnp.einsum("td,kdv->tkv", x, p["books"]).argmax(-1),
        "split or merged",
        1,
    ),
    "attention": (attention, "another product", 2),
    "recurrent": (recurrent, "returned as well as contracted", 2),
    "int8": (
        lambda p, x: lax.dot_general(
            x.astype(jnp.int8), p["int8"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32
        ).astype(jnp.float32),
        "its weights are int8, multiplied by int8",
        1,
    ),
    "int8_scaled_by_data": (
        lambda p, x: x @ (p["int8"].astype(jnp.float32) * x[0][:, None]),
        "scaled by what differs from call to call, by mul",
        1,
    ),
    "int8_scaled_oddly": (
        lambda p, x: x @ (p["int8"].astype(jnp.float32) * p["scale"] ** 2),
        "its scales are computed inside the program",
        1,
    ),
    "scaled_by_data": (lambda p, x: x @ (p["head"] * x[0, 0]), "computed inside the program, by mul", 1),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_is_refused_with_its_reason(name):
    fun, words, count = NEAR_MISSES[name]
    assert_refused(fun, weights(), tokens(), words, count, "test_near_misses_vocab")


# Two projections whose outputs meet: the candidates of one are not exact in the other, so one of them stays whole.
MEETING = {
    "contrast": lambda p, x: x @ p["head"] - 0.5 * (x[::-1] @ p["other"]),
    "mixture_of_softmaxes": lambda p, x: jax.nn.softmax(x @ p["head"]) + jax.nn.softmax(x @ p["other"]),
    "gate": lambda p, x: jax.nn.silu(x @ p["head"]) * (x @ p["other"]),
    "low_rank_addition": lambda p, x: x @ p["head"] + (x @ p["rank"]) @ p["rank_head"],
}


@pytest.mark.parametrize("fill", ["predicted", "-inf"])
@pytest.mark.parametrize("name", MEETING)
def test_of_two_projections_that_meet_only_one_is_sparse(name, fill):
    p, x = weights(), tokens()
    plan = hx.sparsify(MEETING[name], config=full_width()).trace(p, x).plan
    assert [s.path for s in plan.sites] == ["dot_general[0]"]
    words = "meets that of dot_general[0]"
    if name == "low_rank_addition":
        words = "to that of dot_general[0], which is larger: a summand is no head"
    assert any(words in r.reason for r in plan.refusals), plan.refusals
    config = hx.Config(rules=named(hx.Vocab(candidates=9, fill=fill)))
    sparse, dense = (np.asarray(f(p, x)) for f in (hx.sparsify(MEETING[name], config=config), MEETING[name]))
    if name != "mixture_of_softmaxes":
        assert (np.isclose(sparse, dense, rtol=1e-5, atol=1e-6).sum(axis=-1) >= 9).all()
    # SiLU makes NaN of -inf, whoever writes it.
    assert not np.isnan(sparse).any() or (name, fill) == ("gate", "-inf")


# These only look like near misses.
LOGITS = {
    "two_heads_returned": (lambda p, x: (x @ p["head"], x @ p["other"]), 2),
    "two_heads_stacked": (lambda p, x: jnp.tanh(jnp.stack([x @ p["head"], x @ p["other"]])), 2),
    "two_heads_concatenated_by_token": (lambda p, x: jnp.concatenate([x @ p["head"], x @ p["other"]]) / 2, 2),
    "one_cut_read_twice": (of_logits(lambda u, p: (u[:, :50].argmax(-1), jax.nn.softmax(u[:, :50]))), 1),
    "split_weight_merged": (lambda p, x: jnp.einsum("td,dhk->thk", x, p["split"]).reshape(T, V), 1),
    "of_two_factors": (lambda p, x: (x @ p["rank"]) @ p["rank_head"], 1),
    "beams": (of_logits(lambda u, p: lax.top_k(jax.nn.log_softmax(u).reshape(-1), 5)), 1),
    "beams_of_one_prompt": (of_logits(lambda u, p: lax.top_k(jax.nn.log_softmax(u).reshape(1, -1), 5)), 1),
    "kept": (of_logits(lambda u, p: lax.dynamic_update_slice(jnp.zeros((8, V)), u, (2, 0))), 1),
}


@pytest.mark.parametrize("name", LOGITS)
def test_what_only_looks_like_a_near_miss_is_a_site(name):
    fun, count = LOGITS[name]
    p, x = weights(), tokens()
    step = hx.sparsify(fun, config=full_width())
    traced = step.trace(p, x)
    assert [(s.kind, s.units, s.tokens) for s in traced.plan.sites] == [("vocab", V, T)] * count, traced.explain()
    assert_same(step(traced.pack(p), x), jax.jit(fun)(p, x))
