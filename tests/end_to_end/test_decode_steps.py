"""Decode steps as people write them: caches, batches, verification, prefill, generation, indexed stacks."""

from functools import partial

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from checks import assert_same, full_width, kinds
from jax import lax

import hire_xform as hx

D, H, V, LAYERS, ROOM = models.D, models.H, models.V, models.L, 48


def empty_cache(lead=()):
    shape = (*lead, LAYERS, ROOM, H, D // H)
    return {"k": jnp.zeros(shape), "v": jnp.zeros(shape), "pos": jnp.zeros(lead, jnp.int32)}


def extend(params, cache, tokens):
    """Appends ``[T]`` tokens of one sequence to its cache: prefill, verification and decoding are one function."""
    x, pos = params["embed"][tokens], cache["pos"]
    places = pos + jnp.arange(tokens.shape[0])
    for i, w in enumerate(params["layers"]):
        q, k, v = ((models.norm(x) @ w[name]).reshape(-1, H, D // H) for name in ("wq", "wk", "wv"))
        cache = {
            **cache,
            "k": lax.dynamic_update_slice(cache["k"], k[None], (i, pos, 0, 0)),
            "v": lax.dynamic_update_slice(cache["v"], v[None], (i, pos, 0, 0)),
        }
        scores = jnp.einsum("thd,shd->hts", q, cache["k"][i]) / np.sqrt(D // H)
        scores = jnp.where(jnp.arange(ROOM) <= places[:, None], scores, -1e9)
        mixed = jnp.einsum("hts,shd->thd", jax.nn.softmax(scores), cache["v"][i])
        x = x + mixed.reshape(-1, D) @ w["wo"]
        x = x + models.relu_ffn(w, models.norm(x))
    return models.head(params, x), {**cache, "pos": pos + tokens.shape[0]}


def some_tokens(count, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, V, size=count), jnp.int32)


SITES = ["ffn"] * LAYERS + ["vocab"]


def test_prefill_and_decode_share_one_packed():
    params = models.list_params()
    step = hx.sparsify(extend, config=full_width(max_tokens=8, stated=False))
    packed = step.trace(params, empty_cache(), some_tokens(1)).pack(params)
    prefill = step.trace(params, empty_cache(), some_tokens(32)).plan
    assert not prefill.sites
    assert all("a prefill runs dense" in r.reason for r in prefill.refusals if r.kind)
    dense = jax.jit(extend)
    cache = want_cache = empty_cache()
    for tokens in (some_tokens(32), some_tokens(1, 1), some_tokens(1, 2), some_tokens(9, 3), some_tokens(1, 4)):
        logits, cache = step(packed, cache, tokens)
        want, want_cache = dense(params, want_cache, tokens)
        assert_same((logits, cache), (want, want_cache))


@pytest.mark.parametrize("count", [4, 8])
def test_speculative_verification(count):
    params = models.list_params()

    def verify(params, cache, drafted):
        """Logits of all drafted tokens at once, and how many of them greedy decoding would have drawn."""
        logits, cache = extend(params, cache, drafted)
        same = jnp.argmax(logits[:-1], -1) == drafted[1:]
        accepted = jnp.sum(jnp.cumprod(same)) + 1
        return logits[accepted - 1], accepted, {**cache, "pos": cache["pos"] - count + accepted}

    _, cache = jax.jit(extend)(params, empty_cache(), some_tokens(5))
    drafted = [some_tokens(1)]
    state = cache
    for _ in range(count - 1):  # the first half as drawn, the rest wrong
        logits, state = jax.jit(extend)(params, state, drafted[-1])
        good = len(drafted) <= count // 2
        drafted.append((jnp.argmax(logits, -1) + (0 if good else 1)).astype(jnp.int32) % V)
    drafted = jnp.concatenate(drafted)
    step = hx.sparsify(verify, config=full_width(max_tokens=8, stated=False))
    traced = step.trace(params, cache, drafted)
    assert sorted(kinds(traced.plan)) == SITES
    assert {site.tokens for site in traced.plan.sites} == {count}
    want = jax.jit(verify)(params, cache, drafted)
    assert int(want[1]) == count // 2 + 1
    assert_same(step(params, cache, drafted), want)
    assert_same(step(traced.pack(params), cache, drafted), want)


def batch_of_sequences(count):
    """Sequences at different positions, each with its own cache."""
    cache = empty_cache((count,))
    dense = jax.jit(extend)
    params = models.list_params()
    for i in range(count):
        _, one = dense(params, jax.tree.map(lambda a: a[i], cache), some_tokens(2 + i, i))  # noqa: B023
        cache = jax.tree.map(lambda all_, own: all_.at[i].set(own), cache, one)  # noqa: B023
    return params, cache, some_tokens(count, 9)[:, None]


@pytest.mark.any_jax("cases vary how many sequences there are", every=2)
@pytest.mark.parametrize("count", [1, 3, 8])
def test_vmap_over_sequences_inside(count):
    params, caches, tokens = batch_of_sequences(count)
    many = jax.vmap(extend, (None, 0, 0))
    step = hx.sparsify(many, config=full_width(stated=False))
    traced = step.trace(params, caches, tokens)
    assert sorted(kinds(traced.plan)) == SITES, traced.explain()
    assert {site.tokens for site in traced.plan.sites} == {count}
    want = jax.jit(many)(params, caches, tokens)
    assert_same(step(params, caches, tokens), want)
    assert_same(step(traced.pack(params), caches, tokens), want)


@pytest.mark.any_jax("cases vary how many sequences there are", every=2)
@pytest.mark.parametrize("count", [1, 3, 8])
def test_vmap_over_sequences_outside(count):
    params, caches, tokens = batch_of_sequences(count)
    step = hx.sparsify(extend, config=full_width(stated=False))
    packed = step.trace(params, empty_cache(), tokens[0]).pack(params)
    want = jax.jit(jax.vmap(extend, (None, 0, 0)))(params, caches, tokens)
    assert_same(jax.vmap(step, (None, 0, 0))(packed, caches, tokens), want)
    assert_same(jax.jit(jax.vmap(step, (None, 0, 0)))(packed, caches, tokens), want)
    assert_same(jax.vmap(partial(step, packed))(caches, tokens), want)


def test_generation_with_sampling_around_a_sparse_step():
    params = models.list_params()
    step = hx.sparsify(extend, config=full_width(stated=False))
    packed = step.trace(params, empty_cache(), some_tokens(1)).pack(params)

    def generate(one_step, weights, prompt, key):
        """Samples until token 7 or until there is no room."""
        logits, cache = one_step(weights, empty_cache(), prompt)

        def body(state):
            key, logits, cache, written, count = state
            key, own = jax.random.split(key)
            token = jax.random.categorical(own, logits[-1:] / 0.9).astype(jnp.int32)
            logits, cache = one_step(weights, cache, token)
            return key, logits, cache, written.at[count].set(token[0]), count + 1

        def going(state):
            *_, written, count = state
            return (count < 8) & ((count == 0) | (written[count - 1] != 7))

        start = (key, logits[-1:], cache, jnp.full(8, -1, jnp.int32), 0)
        return lax.while_loop(going, body, start)[2:]

    for seed in range(3):
        key = jax.random.key(seed)
        want = jax.jit(partial(generate, extend))(params, some_tokens(6), key)
        assert_same(jax.jit(partial(generate, step))(packed, some_tokens(6), key), want)
        whole = hx.sparsify(partial(generate, extend), config=full_width(max_tokens=4, stated=False))
        assert sorted(kinds(whole.trace(params, some_tokens(6), key).plan)) == SITES  # the prompt's are too long
        assert_same(whole(params, some_tokens(6), key), want)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.filterwarnings("error")
def test_a_donated_cache_is_taken_and_given_back(packing):
    params = models.list_params()
    step = hx.sparsify(extend, config=full_width(stated=False), donate_argnums=1)
    weights = step.trace(params, empty_cache(), some_tokens(1)).pack(params) if packing else params
    cache, want_cache = empty_cache(), empty_cache()
    for seed in range(3):
        before = cache
        logits, cache = step(weights, cache, some_tokens(1, seed))
        want, want_cache = jax.jit(extend)(params, want_cache, some_tokens(1, seed))
        assert_same((logits, cache), (want, want_cache))
        assert before["k"].is_deleted()
        assert before["v"].is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


# One layer of a stack at an index known at run time only.
def stacks():
    rng = np.random.default_rng(0)
    shapes = {"up": (3, 8, 24), "down": (3, 24, 8), "middle": (8, 3, 24), "pairs": (3, 2, 8, 24), "embed": (11, 8)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def raw_slice(stack, i):
    """A dynamic slice with an index that is never counted from the end: out of range it is clamped."""
    return lax.dynamic_slice(stack, (jnp.maximum(i, 0), *[0] * (stack.ndim - 1)), (1, *stack.shape[1:]))[0]


WAYS = {
    "w[i]": lambda w, i: w[i],
    "take": lambda w, i: jnp.take(w, i, axis=0),
    "take_clip": lambda w, i: jnp.take(w, i, axis=0, mode="clip"),
    "take_wrap": lambda w, i: jnp.take(w, i, axis=0, mode="wrap"),
    "at_get": lambda w, i: w.at[i].get(),
    "at_get_fill": lambda w, i: w.at[i].get(mode="fill"),
    "at_get_promised": lambda w, i: w.at[i].get(mode="promise_in_bounds"),
    "one_index_array": lambda w, i: w[i[None]][0],
    "dynamic_index_in_dim": lambda w, i: lax.dynamic_index_in_dim(w, i, 0, keepdims=False),
    "small_integers": lambda w, i: w[i.astype(jnp.uint8)],
    "dynamic_slice": raw_slice,
    "half": lambda w, i: jnp.take(w.astype(jnp.float16), i, axis=0).astype(w.dtype),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_layer_indexed_out_of_a_stack(way):
    pick, w, x = WAYS[way], stacks(), jnp.asarray(np.random.default_rng(1).normal(size=(2, 8)), jnp.float32)

    def fun(w, x, i):
        return jax.nn.relu(x @ pick(w["up"], i)) @ pick(w["down"], i)

    step = hx.sparsify(fun, config=full_width())
    traced = step.trace(w, x, jnp.int32(1))
    assert (kinds(traced.plan), traced.plan.refusals) == (["ffn"], ())
    packed, dense = traced.pack(w), jax.jit(fun)
    closed = hx.sparsify(partial(fun, w), config=full_width(), weights_argnums=())
    # Out of range, some ways clamp and some give NaN: the rewritten program does as the original does.
    for i in map(jnp.int32, (0, 1, 2, 3, -1, -3, -4, -5, 100)):
        for got in (step(w, x, i), step(packed, x, i), closed(x, i)):
            assert_same(got, dense(w, x, i), 1e-2 if way == "half" else 2e-5)


def test_an_index_out_of_range_fills_only_what_it_indexes():
    w, x = stacks(), jnp.ones((2, 8))

    def fun(w, x, i, j):
        u = x @ jnp.take(w["up"], i, axis=0)
        return jnp.where(u > 0, u, 0) @ jnp.take(w["down"], j, axis=0), x @ jnp.take(w["pairs"][:, 0], i, axis=0)

    step = hx.sparsify(fun, config=full_width())
    assert kinds(step.trace(w, x, 0, 0).plan) == ["ffn", "vocab"]
    for i in (0, 5):
        for j in (0, 5):
            got, want = step(w, x, i, j), jax.jit(fun)(w, x, i, j)
            assert_same(got, want)
            assert [bool(jnp.isnan(a).all()) for a in got] == [j == 5, i == 5]


def test_indices_along_other_axes_and_along_two():
    w, x = stacks(), jnp.ones((2, 8))
    ways = (
        lambda w, i: jnp.take(w["middle"], i, axis=1),
        lambda w, i: w["middle"][:, i],
        lambda w, i: w["pairs"][i, 1],
        lambda w, i: w["pairs"][i, i - 1],
    )
    for pick in ways:

        def fun(w, x, i, pick=pick):
            return jax.nn.relu(x @ pick(w, i)) @ w["down"][i]

        step = hx.sparsify(fun, config=full_width())
        assert kinds(step.trace(w, x, 1).plan) == ["ffn"]
        assert_same(step(w, x, 2), jax.jit(fun)(w, x, 2))


def test_a_row_looked_up_is_no_matrix():
    w = stacks()

    def fun(w, i):
        return jax.nn.relu(w["embed"][i][None] @ w["up"][0]) @ w["down"][0]

    step = hx.sparsify(fun, config=full_width())
    assert kinds(step.trace(w, 1).plan) == ["ffn"]
    assert_same(step(w, 1), jax.jit(fun)(w, 1))


@pytest.mark.parametrize("tokens", [1, 3])
def test_tokens_looked_up_are_data_however_few(tokens):
    w, keys = {**stacks(), "square": jnp.ones((8, 8))}, jnp.ones((5, 8))

    def fun(w, keys, i):
        return w["embed"][i] @ w["square"] @ keys.T

    plan = hx.sparsify(fun).trace(w, keys, jnp.arange(tokens)).plan
    assert (plan.sites, len(plan.refusals)) == ((), 1)
    assert "w['square']" in plan.refusals[0].weights


def test_what_is_indexed_in_another_way_is_refused():
    w, x = stacks(), jnp.ones((2, 8))
    ways = (
        ("gather", lambda w, x, i: jnp.einsum("td,kdm->ktm", x, w["up"][jnp.stack([i, i + 1])])),
        ("gather", lambda w, x, i: x @ w["up"].at[i].get(mode="fill", fill_value=0)),
        ("dynamic_slice", lambda w, x, i: x @ lax.dynamic_slice(w["up"][0], (0, i), (8, 4))),
    )
    for name, fun in ways:
        step = hx.sparsify(fun, config=full_width())
        plan = step.trace(w, x, 1).plan
        assert (plan.sites, len(plan.refusals)) == ((), 1)
        assert f"computed inside the program, by {name} at" in plan.refusals[0].reason
        assert_same(step(w, x, 1), jax.jit(fun)(w, x, 1))


def test_some_tokens_of_the_logits_leave_a_vocabulary_one():
    params, x = models.list_params(), jnp.ones((4, D))
    picks = (
        lambda a, i: a[i],
        lambda a, i: a[jnp.stack([i, 0])],
        lambda a, i: lax.dynamic_slice(a, (i, 0), (2, V)),
    )
    for pick in picks:
        step = hx.sparsify(lambda p, x, i, pick=pick: pick(models.head(p, x), i), config=full_width())
        assert kinds(step.trace(params, x, 1).plan) == ["vocab"]
        assert_same(step(params, x, 1), pick(models.head(params, x), 1))

        def mixed(p, x, i, pick=pick):
            return pick(x @ p["head"], i) @ p["embed"]

        assert not kinds(hx.sparsify(mixed, config=full_width()).trace(params, x, 1).plan)
