"""Decoders as users of Haiku write them: transformed functions, parameters in a dictionary of dictionaries."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
from case import Case
from jax import lax

D, M, V, L, H, S, B = 16, 40, 71, 2, 2, 6, 3


class Attention(hk.Module):
    """Self-attention of one new token against a cache of keys and values."""

    def __call__(self, x, cache, position):
        query, key, value = (
            hk.Linear(D, with_bias=False, name=name)(x).reshape(-1, H, D // H) for name in ("query", "key", "value")
        )
        keys = lax.dynamic_update_slice(cache[0], key[:, None], (0, position, 0, 0))
        values = lax.dynamic_update_slice(cache[1], value[:, None], (0, position, 0, 0))
        scores = jnp.einsum("bhd,bshd->bhs", query, keys) / (D // H) ** 0.5
        weights = jax.nn.softmax(jnp.where(jnp.arange(S) <= position, scores, -jnp.inf))
        mixed = jnp.einsum("bhs,bshd->bhd", weights, values).reshape(-1, D)
        return hk.Linear(D, name="out")(mixed), (keys, values)


class FeedForward(hk.Module):
    """Two linear layers."""

    def __init__(self, activation=jax.nn.relu, name=None):
        super().__init__(name)
        self.activation = activation

    def __call__(self, x):
        return hk.Linear(D)(self.activation(hk.Linear(M)(x)))


class Gated(hk.Module):
    """ReGLU from one matrix, cut in two."""

    def __call__(self, x):
        gate, up = jnp.split(hk.Linear(2 * M, with_bias=False)(x), 2, axis=-1)
        return hk.Linear(D, with_bias=False)(jax.nn.relu(gate) * up)


class Parameters(hk.Module):
    """Products written out over ``get_parameter``."""

    def __call__(self, x):
        start = hk.initializers.VarianceScaling()
        up = hk.get_parameter("up", (D, M), init=start)
        down = hk.get_parameter("down", (D, M), init=start)
        return jnp.einsum("bm,dm->bd", jnp.square(jax.nn.relu(jnp.einsum("bd,dm->bm", x, up))), down)


def sequential():
    return hk.Sequential([hk.Linear(M), jax.nn.relu, hk.Linear(D)])


def mlp():
    return hk.nets.MLP([M, D], activation=jax.nn.relu)


def mapped():
    """The block for one token, mapped over the batch."""
    return hk.vmap(FeedForward(), split_rng=False)


def norm(x, name=None):
    return hk.LayerNorm(-1, create_scale=True, create_offset=True, name=name)(x)


class Block(hk.Module):
    """Attention and a feed-forward block, each after a norm."""

    def __init__(self, make_ffn: Callable[[], Any] = FeedForward, name=None):
        super().__init__(name)
        self.make_ffn = make_ffn

    def __call__(self, x, cache, position):
        mixed, cache = Attention()(norm(x), cache, position)
        x = x + mixed
        return x + self.make_ffn()(norm(x)), cache


def unrolled(x, cache, position, make_ffn=FeedForward, wrap=lambda block: block):
    caches = []
    for layer_cache in cache:
        x, layer_cache = wrap(Block(make_ffn))(x, layer_cache, position)
        caches.append(layer_cache)
    return x, caches


def stacked(x, cache, position, make_ffn=FeedForward, wrap=lambda block: block, unroll=1):
    """Layers by ``hk.layer_stack``: a scan over stacked parameters, the caches scanned beside them."""

    @hk.layer_stack(L, with_per_layer_inputs=True, unroll=unroll)
    def one(x, keys, values):
        return wrap(Block(make_ffn))(x, (keys, values), position)

    return one(x, *cache)


def decoder(tokens, cache, position, layers=unrolled, tied=False):
    embed = hk.Embed(V, D)
    x, cache = layers(embed(tokens), cache, position)
    x = norm(x, "final")
    return (x @ embed.embeddings.T if tied else hk.Linear(V, with_bias=False, name="head")(x)), cache


def tied_by_parameter(tokens, cache, position):
    """A matrix from ``get_parameter``, looked up and multiplied by."""
    table = hk.get_parameter("table", (V, D), init=hk.initializers.TruncatedNormal())
    x, cache = unrolled(table[tokens], cache, position)
    return jnp.einsum("bd,vd->bv", norm(x), table) + hk.get_parameter("bias", (V,), init=jnp.zeros), cache


def stateful(tokens):
    """Cache and position in Haiku's state."""
    position = hk.get_state("position", (), jnp.int32, init=jnp.zeros)
    x, embed = None, hk.Embed(V, D)
    x = embed(tokens)
    for i in range(L):
        pair = [hk.get_state(f"{name}_{i}", (B, S, H, D // H), init=jnp.zeros) for name in ("keys", "values")]
        x, pair = Block(mlp)(x, pair, position)
        for name, value in zip(("keys", "values"), pair, strict=True):
            hk.set_state(f"{name}_{i}", value)
    hk.set_state("position", position + 1)
    return hk.Linear(V)(norm(x))


def dropping(tokens, cache, position):
    """Needs a random key at every call."""
    x, cache = unrolled(hk.Embed(V, D)(tokens), cache, position)
    return hk.Linear(V)(hk.dropout(hk.next_rng_key(), 0.1, norm(x))), cache


def sequence(tokens):
    """A whole sequence at once with ``hk.MultiHeadAttention``."""
    x = hk.Embed(V, D)(tokens)
    mask = jnp.tril(jnp.ones((1, 1, tokens.shape[1], tokens.shape[1])))
    for _ in range(L):
        y = norm(x)
        attention = hk.MultiHeadAttention(H, D // H, model_size=D, w_init=hk.initializers.VarianceScaling())
        x = x + attention(y, y, y, mask)
        x = x + mlp()(norm(x))
    return hk.Linear(V)(norm(x))


def make_cache(is_stack=False):
    keys, values = (0.3 * jax.random.normal(jax.random.key(i), (L, B, S, H, D // H)) for i in (5, 6))
    return (keys, values) if is_stack else list(zip(keys, values, strict=True))


TOKENS = (3, 5, 8)


def build(fun, is_stack=False, jitted=False, narrow=False):
    """``hk.without_apply_rng``: parameters and data."""
    model = hk.without_apply_rng(hk.transform(fun))
    tokens, cache = jnp.asarray(TOKENS, jnp.int32), make_cache(is_stack)
    params = model.init(jax.random.key(0), tokens, cache, jnp.int32(2))
    if narrow:
        params, cache = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (params, cache))
    step = jax.jit(model.apply) if jitted else model.apply
    return step, (params, tokens, cache, jnp.int32(2))


def build_with_key(key):
    """``hk.transform``: a random key, or None, between parameters and data."""
    model = hk.transform(dropping if key is not None else decoder)
    tokens = jnp.asarray(TOKENS, jnp.int32)
    params = model.init(jax.random.key(0), tokens, make_cache(), jnp.int32(2))
    return model.apply, (params, key, tokens, make_cache(), jnp.int32(2))


def build_stateful(generating=False):
    model = hk.without_apply_rng(hk.transform_with_state(stateful))
    tokens = jnp.asarray(TOKENS, jnp.int32)
    params, state = model.init(jax.random.key(0), tokens)

    def generate(params, state, tokens):
        def body(carry, _):
            logits, state = model.apply(params, *carry)
            return (state, jnp.argmax(logits, -1).astype(jnp.int32)), logits

        return lax.scan(body, (state, tokens), None, length=3)

    return (generate if generating else model.apply), (params, state, tokens)


def build_sequence(mapped=False):
    model = hk.without_apply_rng(hk.transform(sequence))
    tokens = jnp.arange(10).reshape(2, 5)
    params = model.init(jax.random.key(0), tokens)
    if not mapped:
        return model.apply, (params, tokens)
    return lambda params, tokens: jax.vmap(lambda one: model.apply(params, one[None])[0])(tokens), (params, tokens)


def build_multi():
    """``hk.multi_transform``: embedding, body and head are functions of one parameter tree."""

    def make():
        embed, head = hk.Embed(V, D), hk.Linear(V)

        def body(tokens, cache, position):
            x, cache = unrolled(embed(tokens), cache, position)
            return norm(x, "final"), cache

        def start(tokens, cache, position):
            return head(body(tokens, cache, position)[0])

        return start, (body, head)

    model = hk.without_apply_rng(hk.multi_transform(make))
    tokens, cache = jnp.asarray(TOKENS, jnp.int32), make_cache()
    body, head = model.apply

    def step(params, tokens, cache, position):
        x, cache = body(params, tokens, cache, position)
        return head(params, x), cache

    return step, (model.init(jax.random.key(0), tokens, cache, jnp.int32(2)), tokens, cache, jnp.int32(2))


def _layers(layers=unrolled, tied=False, **options):
    return partial(decoder, layers=partial(layers, **options), tied=tied)


_deep = partial(Case, "Haiku", ffn=L, vocab=1, refusals=4 * L)
_scan = partial(Case, "Haiku", ffn=1, vocab=1, refusals=4)

CASES = [
    _deep("decoder", "hk.without_apply_rng", partial(build, decoder)),
    _deep("decoder", "jax.jit(apply)", partial(build, decoder, jitted=True)),
    _deep("decoder", "hk.transform, no key", partial(build_with_key, None)),
    _deep("decoder, dropout", "hk.transform, typed key", partial(build_with_key, jax.random.key(4))),
    _deep("decoder, dropout", "hk.transform, raw key", partial(build_with_key, jax.random.PRNGKey(4))),
    _deep("decoder, bfloat16", "hk.transform", partial(build, decoder, narrow=True), tolerance=4e-2),
    _deep("decoder, tied head", "embed.embeddings.T", partial(build, _layers(tied=True))),
    _deep("decoder, tied head", "hk.get_parameter", partial(build, tied_by_parameter)),
    _deep("decoder, hk.nets.MLP", "hk.transform", partial(build, _layers(make_ffn=mlp))),
    _deep("decoder, hk.Sequential", "hk.transform", partial(build, _layers(make_ffn=sequential))),
    _deep("decoder, fused ReGLU", "hk.transform", partial(build, _layers(make_ffn=Gated))),
    _deep("decoder, squared ReLU", "hk.get_parameter", partial(build, _layers(make_ffn=Parameters))),
    _deep("decoder", "hk.remat", partial(build, _layers(wrap=hk.remat))),
    _deep("decoder", "hk.vmap of the block", partial(build, _layers(make_ffn=mapped))),
    _deep("decoder", "hk.multi_transform", build_multi),
    _deep("decoder, hk.nets.MLP", "transform_with_state cache", build_stateful),
    _deep("generation, greedy", "scan over steps, state", partial(build_stateful, generating=True)),
    _deep("sequence, MultiHeadAttention", "hk.transform", build_sequence),
    _deep("sequence, MultiHeadAttention", "jax.vmap(apply)", partial(build_sequence, mapped=True)),
    _scan("decoder", "hk.layer_stack", partial(build, _layers(stacked), is_stack=True)),
    _scan("decoder, fused ReGLU", "hk.layer_stack", partial(build, _layers(stacked, make_ffn=Gated), is_stack=True)),
    _scan("decoder", "layer_stack of hk.remat", partial(build, _layers(stacked, wrap=hk.remat), is_stack=True)),
    _scan("decoder, tied head", "hk.layer_stack", partial(build, _layers(stacked, tied=True), is_stack=True)),
]
