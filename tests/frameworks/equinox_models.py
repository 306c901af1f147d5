"""Decoders as users of Equinox write them: modules with functions among their leaves, called for one token."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from case import Case
from jax import lax

D, M, V, L, H, S, B = 16, 40, 71, 2, 2, 6, 3


class Attention(eqx.Module):
    """Self-attention of one new token against a cache of keys and values."""

    query: eqx.nn.Linear
    key: eqx.nn.Linear
    value: eqx.nn.Linear
    out: eqx.nn.Linear

    def __init__(self, *, key):
        keys = jax.random.split(key, 4)
        self.query, self.key, self.value, self.out = (eqx.nn.Linear(D, D, use_bias=False, key=k) for k in keys)

    def __call__(self, x, cache, position):
        query, key, value = (linear(x).reshape(H, D // H) for linear in (self.query, self.key, self.value))
        keys = lax.dynamic_update_slice(cache[0], key[None], (position, 0, 0))
        values = lax.dynamic_update_slice(cache[1], value[None], (position, 0, 0))
        scores = jnp.einsum("hd,shd->hs", query, keys) / (D // H) ** 0.5
        weights = jax.nn.softmax(jnp.where(jnp.arange(S) <= position, scores, -jnp.inf))
        return self.out(jnp.einsum("hs,shd->hd", weights, values).reshape(D)), (keys, values)


class FeedForward(eqx.Module):
    """Two linear layers; the activation is a field like any other."""

    up: eqx.nn.Linear
    down: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    activation: Callable

    def __init__(self, activation=jax.nn.relu, *, key):
        first, second = jax.random.split(key)
        self.up = eqx.nn.Linear(D, M, key=first)
        self.down = eqx.nn.Linear(M, D, key=second)
        self.dropout = eqx.nn.Dropout(0.1, inference=True)
        self.activation = activation

    def __call__(self, x):
        return self.dropout(self.down(self.activation(self.up(x))))


class Gated(eqx.Module):
    """ReGLU, with a learned number that is a parameter and a Python number that is not."""

    gate: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    scale: jax.Array
    alpha: float

    def __init__(self, *, key):
        first, second, third = jax.random.split(key, 3)
        self.gate = eqx.nn.Linear(D, M, use_bias=False, key=first)
        self.up = eqx.nn.Linear(D, M, use_bias=False, key=second)
        self.down = eqx.nn.Linear(M, D, use_bias=False, key=third)
        self.scale = jnp.float32(0.5)
        self.alpha = 2.0

    def __call__(self, x):
        return self.alpha * self.scale * self.down(jax.nn.relu(self.gate(x)) * self.up(x))


def mlp(*, key):
    return eqx.nn.MLP(D, D, M, depth=1, activation=jax.nn.relu, key=key)


def squared(x):
    return jnp.square(jax.nn.relu(x))


class Block(eqx.Module):
    """Attention and a feed-forward block, each after a norm."""

    norms: list[eqx.nn.LayerNorm]
    attention: Attention
    feed_forward: eqx.Module

    def __init__(self, make_ffn=FeedForward, *, key):
        first, second = jax.random.split(key)
        self.norms = [eqx.nn.LayerNorm(D), eqx.nn.LayerNorm(D)]
        self.attention = Attention(key=first)
        self.feed_forward = make_ffn(key=second)

    def __call__(self, x, cache, position):
        mixed, cache = self.attention(self.norms[0](x), cache, position)
        x = x + mixed
        return x + self.feed_forward(self.norms[1](x)), cache


class Decoder(eqx.Module):
    """One token to logits, with the cache of every layer."""

    embed: eqx.nn.Embedding
    blocks: list[Block]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear | None
    call: Callable
    seed: jax.Array
    name: str = "decoder"

    def __init__(self, make_ffn=FeedForward, tied=False, call=lambda block, *args: block(*args), *, key):
        keys = jax.random.split(key, L + 3)
        self.embed = eqx.nn.Embedding(V, D, key=keys[0])
        self.blocks = [Block(make_ffn, key=k) for k in keys[1 : L + 1]]
        self.norm = eqx.nn.LayerNorm(D)
        self.head = None if tied else eqx.nn.Linear(D, V, use_bias=False, key=keys[L + 1])
        self.call = call
        self.seed = jax.random.key(3)

    def __call__(self, token, cache, position):
        x, caches = self.embed(token), []
        for block, layer_cache in zip(self.blocks, cache, strict=True):
            x, layer_cache = self.call(block, x, layer_cache, position)
            caches.append(layer_cache)
        x = self.norm(x)
        return x @ self.embed.weight.T if self.head is None else self.head(x), caches


class Stacked(eqx.Module):
    """The same with the blocks' arrays stacked, made by ``filter_vmap`` and run by ``lax.scan``."""

    embed: eqx.nn.Embedding
    blocks: Block
    norm: eqx.nn.RMSNorm
    head: eqx.nn.Linear
    checkpoint: bool = eqx.field(static=True)

    def __init__(self, make_ffn=FeedForward, checkpoint=False, *, key):
        first, second, third = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(V, D, key=first)
        self.blocks = eqx.filter_vmap(lambda k: Block(make_ffn, key=k))(jax.random.split(second, L))
        self.norm = eqx.nn.RMSNorm(D)
        self.head = eqx.nn.Linear(D, V, key=third)
        self.checkpoint = checkpoint

    def __call__(self, token, cache, position):
        arrays, static = eqx.partition(self.blocks, eqx.is_array)

        def body(x, slices):
            block = eqx.combine(slices[0], static)
            if self.checkpoint:
                block = eqx.filter_checkpoint(block)
            return block(x, slices[1], position)

        x, cache = lax.scan(body, self.embed(token), (arrays, cache))
        return self.head(self.norm(x)), cache


class Tied(eqx.Module):
    """An embedding and a head that share a matrix by ``eqx.nn.Shared``."""

    shared: eqx.nn.Shared
    blocks: list[Block]

    def __init__(self, *, key):
        keys = jax.random.split(key, L + 2)
        pair = eqx.nn.Embedding(V, D, key=keys[0]), eqx.nn.Linear(D, V, use_bias=False, key=keys[1])
        self.shared = eqx.nn.Shared(pair, lambda pair: pair[1].weight, lambda pair: pair[0].weight)
        self.blocks = [Block(key=k) for k in keys[2:]]

    def __call__(self, token, cache, position):
        embed, head = self.shared()
        x, caches = embed(token), []
        for block, layer_cache in zip(self.blocks, cache, strict=True):
            x, layer_cache = block(x, layer_cache, position)
            caches.append(layer_cache)
        return head(x), caches


class Stateful(eqx.Module):
    """A decoder whose cache and position are kept in ``eqx.nn.State``."""

    embed: eqx.nn.Embedding
    blocks: list[Block]
    head: eqx.nn.Linear
    caches: list[eqx.nn.StateIndex]
    position: eqx.nn.StateIndex

    def __init__(self, *, key):
        keys = jax.random.split(key, L + 2)
        self.embed = eqx.nn.Embedding(V, D, key=keys[0])
        self.blocks = [Block(mlp, key=k) for k in keys[2:]]
        self.head = eqx.nn.Linear(D, V, key=keys[1])
        self.caches = [eqx.nn.StateIndex(one) for one in make_cache()]
        self.position = eqx.nn.StateIndex(jnp.int32(2))

    def __call__(self, token, state):
        position, x = state.get(self.position), self.embed(token)
        for block, index in zip(self.blocks, self.caches, strict=True):
            x, cache = block(x, state.get(index), position)
            state = state.set(index, cache)
        return self.head(x), state.set(self.position, position + 1)


class Encoder(eqx.Module):
    """A whole sequence at once: ``eqx.nn.MultiheadAttention`` and ``eqx.nn.MLP``, mapped over the tokens."""

    embed: eqx.nn.Embedding
    rope: eqx.nn.RotaryPositionalEmbedding
    attention: list[eqx.nn.MultiheadAttention]
    mlps: list[eqx.nn.MLP]
    norms: list[eqx.nn.LayerNorm]
    head: eqx.nn.Linear

    def __init__(self, *, key):
        keys = jax.random.split(key, 2 * L + 2)
        self.embed = eqx.nn.Embedding(V, D, key=keys[0])
        self.rope = eqx.nn.RotaryPositionalEmbedding(D // H)
        self.attention = [eqx.nn.MultiheadAttention(H, D, key=k) for k in keys[2 : L + 2]]
        self.mlps = [mlp(key=k) for k in keys[L + 2 :]]
        self.norms = [eqx.nn.LayerNorm(D) for _ in range(2 * L)]
        self.head = eqx.nn.Linear(D, V, key=keys[1])

    def rotate(self, query, key, value):
        turn = jax.vmap(self.rope, in_axes=1, out_axes=1)
        return turn(query), turn(key), value

    def __call__(self, tokens):
        x = jax.vmap(self.embed)(tokens)
        mask = jnp.tril(jnp.ones((len(tokens), len(tokens)), bool))
        for i, (attention, one_mlp) in enumerate(zip(self.attention, self.mlps, strict=True)):
            y = jax.vmap(self.norms[2 * i])(x)
            x = x + attention(y, y, y, mask=mask, process_heads=self.rotate)
            x = x + jax.vmap(one_mlp)(jax.vmap(self.norms[2 * i + 1])(x))
        return jax.vmap(self.head)(x)


def make_cache(stacked=False, lead=()):
    shape = (L, *lead, S, H, D // H)
    keys, values = (0.3 * jax.random.normal(jax.random.key(i), shape) for i in (5, 6))
    return (keys, values) if stacked else list(zip(keys, values, strict=True))


def one_token(model, token, cache, position):
    return model(token, cache, position)


def many_tokens(model, tokens, cache, position):
    """A batch: the module itself is mapped."""
    axes = jax.tree.map(lambda _: 0, cache)
    return jax.vmap(model, in_axes=(0, axes, None))(tokens, cache, position)


def filter_mapped(model, tokens, cache, position):
    """A batch by ``filter_vmap`` over the tokens, the model an argument that is not mapped."""
    return eqx.filter_vmap(one_token, in_axes=(None, 0, 0, None))(model, tokens, cache, position)


def stateful_step(model, token, state):
    logits, state = model(token, state)
    return logits, jax.tree.leaves(state)


def greedy(model, token, cache, position):
    """Three tokens, the cache carried; the model is closed over by the loop."""

    def body(carry, _):
        token, cache, position = carry
        logits, cache = model(token, cache, position)
        token = jnp.argmax(logits).astype(token.dtype)
        return (token, cache, position + 1), (token, logits)

    _, (tokens, logits) = lax.scan(body, (token, cache, position), None, length=3)
    return tokens, logits


def build(make, step=one_token, stacked=False, **options):
    model = make(key=jax.random.key(0), **options)
    batched = step in (many_tokens, filter_mapped)
    token = jnp.asarray([3, 5, 8], jnp.int32) if batched else jnp.int32(5)
    cache = make_cache(stacked)
    if batched:
        cache = jax.tree.map(lambda x: jnp.stack([x] * B), cache)
    return step, (model, token, cache, jnp.int32(2))


def build_stateful():
    model, state = eqx.nn.make_with_state(Stateful)(key=jax.random.key(0))
    return stateful_step, (model, jnp.int32(5), state)


def build_encoder(jitted=False):
    def step(model, tokens):
        return (eqx.filter_jit(model) if jitted else model)(tokens)

    return step, (Encoder(key=jax.random.key(0)), jnp.arange(5))


def build_cut(inference: bool) -> tuple[Callable, tuple[Any, ...]]:
    """The module cut into arrays and the rest beforehand, as for ``jax.jit``."""
    model = Decoder(key=jax.random.key(0))
    arrays, static = eqx.partition(eqx.nn.inference_mode(model, inference), eqx.is_array)

    def step(arrays, token, cache, position):
        return eqx.combine(arrays, static)(token, cache, position)

    return step, (arrays, jnp.int32(5), make_cache(), jnp.int32(2))


@eqx.filter_jit
def jitted_call(block, *args):
    return block(*args)


def checkpointed_call(block, *args):
    return eqx.filter_checkpoint(block)(*args)


def closed_call(block, *args):
    return eqx.filter_closure_convert(block, *args)(*args)


_deep = partial(Case, "Equinox", ffn=L, vocab=1, refusals=4 * L)
_scan = partial(Case, "Equinox", ffn=1, vocab=1, refusals=4)

CASES = [
    _deep("decoder", "layers unrolled", partial(build, Decoder)),
    _deep("decoder, tied head", "embed.weight.T", partial(build, Decoder, tied=True)),
    _deep("decoder, tied head", "eqx.nn.Shared", partial(build, Tied)),
    _deep("decoder, squared ReLU", "layers unrolled", partial(build, Decoder, make_ffn=partial(FeedForward, squared))),
    _deep("decoder, GELU", "layers unrolled", partial(build, Decoder, make_ffn=partial(FeedForward, jax.nn.gelu))),
    _deep("decoder, ReGLU", "layers unrolled", partial(build, Decoder, make_ffn=Gated)),
    _deep("decoder, eqx.nn.MLP", "layers unrolled", partial(build, Decoder, make_ffn=mlp)),
    _deep("decoder, eqx.nn.MLP", "jax.vmap(model)", partial(build, Decoder, many_tokens, make_ffn=mlp)),
    _deep("decoder", "eqx.filter_vmap(step)", partial(build, Decoder, filter_mapped)),
    _deep("decoder", "filter_jit of each layer", partial(build, Decoder, call=jitted_call)),
    _deep("decoder", "filter_jit of the step", partial(build, Decoder, eqx.filter_jit(one_token))),
    _deep("decoder", "filter_checkpoint", partial(build, Decoder, call=checkpointed_call)),
    _deep("decoder", "filter_closure_convert", partial(build, Decoder, call=closed_call)),
    _deep("decoder", "eqx.partition outside", partial(build_cut, True)),
    _deep("decoder, eqx.nn.MLP", "eqx.nn.State cache", build_stateful),
    _deep("sequence, MultiheadAttention", "jax.vmap over tokens", build_encoder),
    _deep("sequence, MultiheadAttention", "filter_jit(model)", partial(build_encoder, True)),
    _scan("decoder", "lax.scan of filter_vmap stack", partial(build, Stacked, stacked=True)),
    _scan("decoder, ReGLU", "lax.scan of stack", partial(build, Stacked, stacked=True, make_ffn=Gated)),
    _scan("decoder", "vmap of lax.scan", partial(build, Stacked, many_tokens, stacked=True)),
    _scan("decoder", "scan of filter_checkpoint", partial(build, Stacked, stacked=True, checkpoint=True)),
    _deep("generation, greedy", "lax.scan over steps", partial(build, Decoder, greedy)),
    _scan("generation, greedy", "scan of scan", partial(build, Stacked, greedy, stacked=True)),
]
