"""Flax NNX: decode steps of small language models, as NNX's users write them."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from case import Case
from flax import nnx

D, M, V, L, H, S, E = 16, 40, 71, 2, 2, 6, 3
HEAD_DIM = D // H


class CachedAttention(nnx.Module):
    """Attention of one new position, on a cache written by hand. Inputs are ``[B, 1, D]``."""

    def __init__(self, batch, *, rngs, dtype=None):
        heads = partial(nnx.LinearGeneral, D, (H, HEAD_DIM), use_bias=False, dtype=dtype, rngs=rngs)
        self.query, self.key, self.value = heads(), heads(), heads()
        self.out = nnx.LinearGeneral((H, HEAD_DIM), D, axis=(-2, -1), dtype=dtype, rngs=rngs)
        self.keys = nnx.Cache(jnp.zeros((batch, S, H, HEAD_DIM), dtype))
        self.values = nnx.Cache(jnp.zeros((batch, S, H, HEAD_DIM), dtype))
        self.at = nnx.Cache(jnp.int32(0))

    def __call__(self, x):
        at = self.at[...]
        self.keys[...] = jax.lax.dynamic_update_slice(self.keys[...], self.key(x), (0, at, 0, 0))
        self.values[...] = jax.lax.dynamic_update_slice(self.values[...], self.value(x), (0, at, 0, 0))
        self.at[...] = at + 1
        mask = (jnp.arange(S) <= at)[None, None, None]
        return self.out(nnx.dot_product_attention(self.query(x), self.keys[...], self.values[...], mask=mask))


class LibraryAttention(nnx.MultiHeadAttention):
    def __init__(self, batch, *, rngs, dtype=None):
        super().__init__(H, D, decode=True, dtype=dtype, rngs=rngs)
        self.init_cache((batch, S, D), dtype or jnp.float32)


class ReluFfn(nnx.Module):
    def __init__(self, *, rngs, dtype=None):
        self.up = nnx.Linear(D, M, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(M, D, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


class GeluFfn(nnx.Sequential):
    """The activation is a function among the module's attributes."""

    def __init__(self, *, rngs, dtype=None):
        super().__init__(nnx.Linear(D, M, dtype=dtype, rngs=rngs), nnx.gelu, nnx.Linear(M, D, dtype=dtype, rngs=rngs))


class SwigluFfn(nnx.Module):
    def __init__(self, *, rngs, dtype=None):
        linear = partial(nnx.Linear, use_bias=False, dtype=dtype, rngs=rngs)
        self.gate, self.up, self.down = linear(D, M), linear(D, M), linear(M, D)

    def __call__(self, x):
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class EinsumFfn(nnx.Module):
    """Squared ReLU."""

    def __init__(self, *, rngs, dtype=None):
        self.up = nnx.Einsum("btd,dm->btm", (D, M), (M,), dtype=dtype, rngs=rngs)
        self.down = nnx.Einsum("btm,md->btd", (M, D), (D,), dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.square(nnx.relu(self.up(x))))


class DropoutFfn(nnx.Module):
    """Dropout with its own stream of random numbers: a key array and a count among the module's state."""

    def __init__(self, *, rngs, dtype=None):
        self.up = nnx.Linear(D, M, dtype=dtype, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.down = nnx.Linear(M, D, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.down(self.drop(nnx.relu(self.up(x))))


class UpLoraFfn(nnx.Module):
    """A low-rank adapter on the product into the hidden units."""

    def __init__(self, *, rngs, dtype=None):
        self.up = nnx.LoRALinear(D, M, lora_rank=3, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(M, D, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


class LoraFfn(nnx.Module):
    """Low-rank adapters on both products."""

    def __init__(self, *, rngs, dtype=None):
        self.up = nnx.LoRALinear(D, M, lora_rank=3, dtype=dtype, rngs=rngs)
        self.down = nnx.LoRALinear(M, D, lora_rank=3, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


class DenseExperts(nnx.Module):
    """All experts at once, made and called by nnx.vmap, mixed by a router."""

    def __init__(self, *, rngs, dtype=None):
        self.router = nnx.Linear(D, E, dtype=dtype, rngs=rngs)
        self.experts = stacked(lambda rngs: ReluFfn(rngs=rngs, dtype=dtype), E, rngs)

    def __call__(self, x):
        shares = nnx.softmax(self.router(x))
        made = nnx.vmap(lambda expert, x: expert(x), in_axes=(0, None), out_axes=-1)(self.experts, x)
        return jnp.einsum("btde,bte->btd", made, shares)


class Block(nnx.Module):
    def __init__(self, batch, *, rngs, ffn=ReluFfn, attention=CachedAttention, dtype=None):
        self.norms = nnx.List([nnx.RMSNorm(D, dtype=dtype, rngs=rngs) for _ in range(2)])
        self.attention = attention(batch, rngs=rngs, dtype=dtype)
        self.ffn = ffn(rngs=rngs, dtype=dtype)

    def __call__(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.ffn(self.norms[1](x))


def stacked(make, count, rngs):
    """Modules whose variables are stacked along a leading axis."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs):
        return make(rngs)

    return create(rngs)


class Unrolled(nnx.Module):
    def __init__(self, make, rngs):
        self.blocks = nnx.List([make(rngs=rngs) for _ in range(L)])

    def __call__(self, x):
        for block in self.blocks:
            x = self.one(block, x)
        return x

    def one(self, block, x):
        return block(x)


class Rematerialised(Unrolled):
    def one(self, block, x):
        return nnx.remat(lambda block, x: block(x))(block, x)


class Jitted(Unrolled):
    @nnx.jit
    def one(self, block, x):
        return block(x)


class Scanned(nnx.Module):
    def __init__(self, make, rngs):
        self.blocks = stacked(lambda rngs: make(rngs=rngs), L, rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def through(x, block):
            return self.one(block, x)

        return through(x, self.blocks)

    def one(self, block, x):
        return block(x)


class ScannedRemat(Scanned):
    def one(self, block, x):
        return nnx.remat(lambda block, x: block(x))(block, x)


class ScannedByJax(nnx.Module):
    """Graph and state apart, lax.scan over the state."""

    def __init__(self, make, rngs):
        self.blocks = stacked(lambda rngs: make(rngs=rngs), L, rngs)

    def __call__(self, x):
        graph, cache, rest = nnx.split(self.blocks, nnx.Cache, ...)

        def body(x, state):
            block = nnx.merge(graph, *state)
            return block(x), nnx.state(block, nnx.Cache)

        x, cache = jax.lax.scan(body, x, (cache, rest))
        nnx.update(self.blocks, cache)
        return x


class Decoder(nnx.Module):
    """Tokens ``[B, 1]`` to logits ``[B, V]``."""

    def __init__(self, batch=3, *, rngs, layers=Unrolled, tied=False, dtype=None, **kind):
        self.embed = nnx.Embed(V, D, dtype=dtype, rngs=rngs)
        self.layers = layers(partial(Block, batch, dtype=dtype, **kind), rngs)
        self.norm = nnx.LayerNorm(D, dtype=dtype, rngs=rngs)
        self.head = None if tied else nnx.Linear(D, V, dtype=dtype, rngs=rngs)

    def __call__(self, tokens):
        x = self.norm(self.layers(self.embed(tokens)))
        logits = self.embed.attend(x) if self.head is None else self.head(x)
        return logits[:, -1].astype(jnp.float32)


class Classifier(nnx.Module):
    def __init__(self, *, rngs):
        self.first, self.second, self.last = (nnx.Linear(i, o, rngs=rngs) for i, o in ((D, 64), (64, 32), (32, 10)))
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.norm = nnx.BatchNorm(D, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.first(self.norm(x)))
        return self.last(nnx.relu(self.second(self.drop(x))))


def filled(module, seed=1):
    """Random numbers for every float: biases and caches that are zero would hide mistakes."""
    leaves, treedef = jax.tree.flatten(nnx.state(module))
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def fill(key, leaf):
        random = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf + 0.1 * jax.random.normal(key, leaf.shape, leaf.dtype) if random else leaf

    nnx.update(module, treedef.unflatten(map(fill, keys, leaves)))
    return module


TOKENS = jnp.asarray([[3], [5], [8]], jnp.int32)


def decoder(batch=3, **options):
    return filled(Decoder(batch, rngs=nnx.Rngs(0), **options))


def cache_returned(model, tokens):
    return model(tokens), nnx.state(model, nnx.Cache)


def model_returned(model, tokens):
    return model(tokens), model


def module(step=cache_returned, **options):
    """The module itself is the argument."""
    return step, (decoder(**options), TOKENS)


def split(**options):
    """Graph closed over; weights and cache two arguments."""
    graph, weights, cache = nnx.split(decoder(**options), nnx.Param, ...)

    def step(weights, cache, tokens):
        model = nnx.merge(graph, weights, cache)
        return model(tokens), nnx.state(model, nnx.Not(nnx.Param))

    return step, (weights, cache, TOKENS)


def graph_first(graph, weights, cache, tokens):
    model = nnx.merge(graph, weights, cache)
    logits = model(tokens)
    return logits, nnx.state(model, nnx.Cache)


def split_graph_first(**options):
    return graph_first, (*nnx.split(decoder(**options), nnx.Param, ...), TOKENS)


def pure_dictionaries():
    """Plain nested dictionaries of arrays, as checkpoints hold them."""
    model = decoder(tied=True)
    graph, weights, cache = nnx.split(model, nnx.Param, nnx.Cache)

    def step(weights, cache, tokens):
        here = nnx.merge(graph, nnx.restore_int_paths(weights), nnx.restore_int_paths(cache))
        return here(tokens), nnx.to_pure_dict(nnx.state(here, nnx.Cache))

    return step, (nnx.to_pure_dict(weights), nnx.to_pure_dict(cache), TOKENS)


def closed_over():
    model = decoder()
    graph, weights, cache = nnx.split(model, nnx.Param, nnx.Cache)

    def step(cache, tokens):
        here = nnx.merge(graph, weights, cache)
        return here(tokens), nnx.state(here, nnx.Cache)

    return step, (cache, TOKENS)


def jitted_by_nnx():
    return nnx.jit(cache_returned), (decoder(layers=Scanned), TOKENS)


def jitted_split():
    """nnx.jit on the merged model, inside a function of the state."""
    graph, weights, cache = nnx.split(decoder(), nnx.Param, nnx.Cache)
    forward = nnx.jit(lambda model, tokens: model(tokens))

    def step(weights, cache, tokens):
        model = nnx.merge(graph, weights, cache)
        return forward(model, tokens), nnx.state(model, nnx.Cache)

    return step, (weights, cache, TOKENS)


def batched_by_jax():
    graph, weights, cache = nnx.split(decoder(1, ffn=SwigluFfn, tied=True), nnx.Param, nnx.Cache)
    caches = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), cache)

    def step(weights, cache, tokens):
        model = nnx.merge(graph, weights, cache)
        return model(tokens), nnx.state(model, nnx.Cache)

    return jax.vmap(step, (None, 0, 0)), (weights, caches, TOKENS[:, None])


def batched_by_nnx():
    """Parameters shared, a cache for each sequence."""
    model = decoder(1)
    nnx.update(model, jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), nnx.state(model, nnx.Cache)))
    axes = nnx.StateAxes({nnx.Param: None, nnx.Cache: 0})

    def step(model, tokens):
        logits = nnx.vmap(lambda model, tokens: model(tokens), in_axes=(axes, 0))(model, tokens)
        return logits, nnx.state(model, nnx.Cache)

    return step, (model, TOKENS[:, None])


def next_token(model, tokens):
    return jnp.argmax(model(tokens), -1, keepdims=True).astype(jnp.int32)


def generated_by_while():
    """Greedy tokens; nnx.while_loop carries the whole model."""

    def generate(model, tokens):
        def body(state):
            count, model, tokens = state
            return count + 1, model, next_token(model, tokens)

        _, model, tokens = nnx.while_loop(lambda state: state[0] < 3, body, (0, model, tokens))
        return tokens, nnx.state(model, nnx.Cache)

    return generate, (decoder(layers=Scanned), TOKENS)


def generated_by_scan():
    """Greedy tokens; nnx.scan carries the cache, the parameters are the same each time."""

    def generate(model, tokens):
        axes = nnx.StateAxes({nnx.Param: None, nnx.Cache: nnx.Carry})

        @nnx.scan(in_axes=(axes, nnx.Carry), out_axes=(nnx.Carry, 0), length=3)
        def some(model, tokens):
            tokens = next_token(model, tokens)
            return tokens, tokens

        return some(model, tokens)[1], nnx.state(model, nnx.Cache)

    return generate, (decoder(tied=True), TOKENS)


def classifier():
    """Dropout and batch norm, both switched off by eval()."""
    model = filled(Classifier(rngs=nnx.Rngs(0)))
    model.eval()
    return lambda model, x: model(x), (model, jnp.linspace(-1, 1, 3 * D).reshape(3, D))


class LinenLm(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(V, D)(tokens)
        x = x + nn.Dense(D)(nn.relu(nn.Dense(M)(nn.LayerNorm()(x))))
        return nn.Dense(V)(nn.LayerNorm()(x))


def bridged():
    """A Linen module as an NNX module."""
    model = filled(nnx.bridge.ToNNX(LinenLm(), rngs=nnx.Rngs(0)).lazy_init(TOKENS))
    return lambda model, tokens: model(tokens), (model, TOKENS)


def flax_nnx(model, nesting, build, ffn, vocab, refusals, **rest):
    return Case("Flax NNX", model, nesting, build, ffn, vocab, refusals, **rest)


FIRST_STATIC = (("static_argnums", 0),)

# Four refusals for each attention: query, key, value and out.
CASES = [
    flax_nnx("decoder", "module as argument", module, L, 1, 4 * L),
    flax_nnx("decoder, tied head", "module in, module out", partial(module, model_returned, tied=True), L, 1, 4 * L),
    flax_nnx("decoder, GELU", "module as argument", partial(module, ffn=GeluFfn), L, 1, 4 * L),
    flax_nnx(
        "decoder, MultiHeadAttention",
        "module as argument",
        partial(module, attention=LibraryAttention),
        L,
        1,
        4 * L,
    ),
    flax_nnx(
        "decoder, MultiHeadAttention, tied head",
        "module, nnx.scan(nnx.remat)",
        partial(module, attention=LibraryAttention, tied=True, layers=ScannedRemat),
        1,
        1,
        4,
    ),
    flax_nnx("decoder, SwiGLU, tied head", "split, merge", partial(split, ffn=SwigluFfn, tied=True), L, 1, 4 * L),
    flax_nnx(
        "decoder, SwiGLU, bf16 on f32 weights",
        "split, merge, nnx.scan",
        partial(split, ffn=SwigluFfn, layers=Scanned, dtype=jnp.bfloat16),
        1,
        1,
        4,
        tolerance=4e-2,
    ),
    flax_nnx("decoder", "graph as an argument", split_graph_first, L, 1, 4 * L, weights=1),
    flax_nnx(
        "decoder, nnx.Einsum FFN",
        "graph as a static argument",
        partial(split_graph_first, ffn=EinsumFfn),
        L,
        1,
        4 * L,
        weights=1,
        options=FIRST_STATIC,
    ),
    flax_nnx("decoder, tied head", "pure dictionaries", pure_dictionaries, L, 1, 4 * L),
    flax_nnx("decoder", "weights closed over", closed_over, L, 1, 4 * L, weights=()),
    flax_nnx("decoder", "module, nnx.scan", partial(module, layers=Scanned), 1, 1, 4),
    flax_nnx("decoder, tied head", "module, nnx.remat", partial(module, layers=Rematerialised, tied=True), L, 1, 4 * L),
    flax_nnx("decoder, GELU", "split, lax.scan of merge", partial(split, ffn=GeluFfn, layers=ScannedByJax), 1, 1, 4),
    flax_nnx("decoder", "nnx.jit of each layer", partial(module, layers=Jitted), L, 1, 4 * L),
    flax_nnx("decoder", "nnx.jit of nnx.scan", jitted_by_nnx, 1, 1, 4),
    flax_nnx("decoder", "nnx.jit of the merged model", jitted_split, L, 1, 4 * L),
    flax_nnx("decoder, SwiGLU, tied head", "jax.vmap over the batch", batched_by_jax, L, 1, 4 * L),
    flax_nnx("decoder", "nnx.vmap over the batch", batched_by_nnx, L, 1, 4 * L),
    flax_nnx("generation, greedy", "nnx.while_loop of nnx.scan", generated_by_while, 1, 1, 4),
    flax_nnx("generation, greedy, tied head", "nnx.scan", generated_by_scan, L, 1, 4 * L),
    flax_nnx(
        "decoder, dropout on", "module in, module out", partial(module, model_returned, ffn=DropoutFfn), L, 1, 4 * L
    ),
    flax_nnx("decoder, dropout on", "module, nnx.scan", partial(module, ffn=DropoutFfn, layers=Scanned), 1, 1, 4),
    # The adapter of a product into the hidden units is read whole, in two products that are neither.
    flax_nnx("decoder, LoRA on up", "module as argument", partial(module, ffn=UpLoraFfn), L, 1, (4 + 2) * L),
    # Of the adapter of down the first factor is a part of the block.
    flax_nnx(
        "decoder, LoRA on up and down",
        "module as argument",
        partial(module, ffn=LoraFfn),
        L,
        1,
        (4 + 3) * L,
    ),
    # A loop over the experts' blocks, and a router for each layer.
    flax_nnx("decoder, dense experts", "nnx.vmap over experts", partial(module, ffn=DenseExperts), L, 1, (4 + 1) * L),
    flax_nnx("FFN and head", "nnx.bridge.ToNNX", bridged, 1, 1, 0),
    flax_nnx("classifier of three layers", "module in eval()", classifier, 1, 0, 1),
]
