"""Flax Linen: decode steps of small language models, as Linen's users write them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from case import Case
from flax.core import freeze
from flax.training.train_state import TrainState

D, M, V, L, H, S, E = 16, 40, 71, 2, 2, 6, 3
HEAD_DIM = D // H


class CachedAttention(nn.Module):
    """Attention of one new position, on a cache written by hand. Inputs are ``[B, 1, D]``."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        batch = x.shape[0]
        heads = partial(nn.DenseGeneral, (H, HEAD_DIM), use_bias=False, dtype=self.dtype)
        q, k, v = heads(name="query")(x), heads(name="key")(x), heads(name="value")(x)
        keys = self.variable("cache", "keys", jnp.zeros, (batch, S, H, HEAD_DIM), x.dtype)
        values = self.variable("cache", "values", jnp.zeros, (batch, S, H, HEAD_DIM), x.dtype)
        at = self.variable("cache", "at", lambda: jnp.int32(0))
        if not self.is_initializing():
            keys.value = jax.lax.dynamic_update_slice(keys.value, k, (0, at.value, 0, 0))
            values.value = jax.lax.dynamic_update_slice(values.value, v, (0, at.value, 0, 0))
            at.value += 1
        mask = (jnp.arange(S) < at.value)[None, None, None]
        mixed = nn.dot_product_attention(q, keys.value, values.value, mask=mask)
        return nn.DenseGeneral(D, axis=(-2, -1), use_bias=False, dtype=self.dtype, name="out")(mixed)


class LibraryAttention(nn.Module):
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        attention = nn.MultiHeadDotProductAttention(H, qkv_features=D, decode=True, dtype=self.dtype)
        return attention(x)


class ReluFfn(nn.Module):
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        return nn.Dense(D, dtype=self.dtype)(nn.relu(nn.Dense(M, dtype=self.dtype)(x)))


class GeluFfn(nn.Module):
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        return nn.Sequential([nn.Dense(M, dtype=self.dtype), nn.gelu, nn.Dense(D, dtype=self.dtype)])(x)


class SwigluFfn(nn.Module):
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        dense = partial(nn.Dense, use_bias=False, dtype=self.dtype)
        return dense(D, name="down")(nn.silu(dense(M, name="gate")(x)) * dense(M, name="up")(x))


class FusedGegluFfn(nn.Module):
    """Gate and up in one product, split after it."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        gate, up = jnp.split(nn.Dense(2 * M, dtype=self.dtype)(x), 2, axis=-1)
        return nn.Dense(D, dtype=self.dtype)(nn.gelu(gate) * up)


class HeadedFfn(nn.Module):
    """Squared ReLU, hidden units in two dimensions."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        hidden = jnp.square(nn.relu(nn.DenseGeneral((4, M // 4), dtype=self.dtype)(x)))
        return nn.DenseGeneral(D, axis=(-2, -1), dtype=self.dtype)(hidden)


class EinsumFfn(nn.Module):
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        hidden = nn.relu(nn.Einsum((D, M), "btd,dm->btm", dtype=self.dtype)(x))
        return nn.Einsum((M, D), "btm,md->btd", dtype=self.dtype)(hidden)


class DropoutFfn(nn.Module):
    """Dropout left on, as for Monte Carlo dropout."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        hidden = nn.Dropout(0.5, deterministic=False)(nn.relu(nn.Dense(M, dtype=self.dtype)(x)))
        return nn.Dense(D, dtype=self.dtype)(hidden)


class WeightNormFfn(nn.Module):
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        hidden = nn.relu(nn.WeightNorm(nn.Dense(M, dtype=self.dtype))(x))
        return nn.WeightNorm(nn.Dense(D, dtype=self.dtype))(hidden)


class DenseExperts(nn.Module):
    """All experts at once, their weights stacked by nn.vmap, mixed by a router."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        shares = nn.softmax(nn.Dense(E, dtype=self.dtype, name="router")(x))
        experts = nn.vmap(
            ReluFfn, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, out_axes=-1, axis_size=E
        )
        return jnp.einsum("btde,bte->btd", experts(dtype=self.dtype)(x), shares)


class Block(nn.Module):
    ffn: Callable = ReluFfn
    attention: Callable = CachedAttention
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        norm = partial(nn.RMSNorm, dtype=self.dtype)
        x = x + self.attention(dtype=self.dtype)(norm()(x))
        return x + self.ffn(dtype=self.dtype)(norm()(x))


class ScannedBlock(Block):
    """With the second result that nn.scan wants."""

    @nn.compact
    def __call__(self, x, _):
        return super().__call__(x), None


def loop(block, x):
    for i in range(L):
        x = block(name=f"layer_{i}")(x)
    return x


def unrolled(kind, x):
    return loop(partial(Block, **kind), x)


def rematerialised(kind, x):
    return loop(partial(nn.remat(Block), **kind), x)


def jitted(kind, x):
    return loop(partial(nn.jit(Block), **kind), x)


def scan_over(block, kind, x):
    stack = nn.scan(block, variable_axes={"params": 0, "cache": 0}, split_rngs={"params": True}, length=L)
    return stack(**kind, name="layers")(x, None)[0]


def scanned(kind, x):
    return scan_over(ScannedBlock, kind, x)


def scanned_remat(kind, x):
    return scan_over(nn.remat(ScannedBlock, prevent_cse=False), kind, x)


def remat_scanned(kind, x):
    return nn.remat_scan(Block, lengths=(2, 2))(**kind, name="layers")(x)


class Decoder(nn.Module):
    """Tokens ``[B, 1]`` to logits ``[B, 1, V]``."""

    layers: Callable = unrolled
    ffn: Callable = ReluFfn
    attention: Callable = CachedAttention
    tied: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(V, D, dtype=self.dtype)
        kind = {"ffn": self.ffn, "attention": self.attention, "dtype": self.dtype}
        x = nn.LayerNorm(dtype=self.dtype)(self.layers(kind, embed(tokens)))
        logits = embed.attend(x) if self.tied else nn.Dense(V, dtype=self.dtype, name="head")(x)
        return logits.astype(jnp.float32)


class Recurrent(nn.Module):
    """A recurrent language model: tokens ``[B]`` and the cell's state."""

    cell: Callable

    @nn.compact
    def __call__(self, state, tokens):
        state, x = self.cell(D)(state, nn.Embed(V, D)(tokens))
        return state, nn.Dense(V)(x)


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(64)(x))
        x = nn.relu(nn.Dense(32)(x))
        return nn.Dense(10)(x)


def filled(variables, seed=1):
    """Random numbers for every float of a tree: biases and caches that are zero would hide mistakes."""
    leaves, treedef = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def fill(key, leaf):
        random = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf + 0.1 * jax.random.normal(key, leaf.shape, leaf.dtype) if random else leaf

    return treedef.unflatten(map(fill, keys, leaves))


def initial(model, *inputs):
    """Parameters and cache; tokens as many as the cache is long."""
    keys = dict(zip(("params", "dropout"), jax.random.split(jax.random.key(0)), strict=True))
    variables = filled(jax.jit(model.init)(keys, *inputs))
    return variables["params"], variables.get("cache", {})


TOKENS = jnp.asarray([[3], [5], [8]], jnp.int32)
PROMPT = jnp.tile(TOKENS, (1, S))


def decode_step(model):
    def step(params, cache, tokens):
        logits, updated = model.apply({"params": params, "cache": cache}, tokens, mutable=["cache"])
        return logits[:, -1], updated["cache"]

    return step


def decoder(**options):
    model = Decoder(**options)
    return decode_step(model), (*initial(model, PROMPT), TOKENS)


def with_variables():
    """All collections in one argument."""
    model = Decoder(tied=True)
    params, cache = initial(model, PROMPT)
    return lambda variables, tokens: model.apply(variables, tokens, mutable="cache"), (
        {"params": params, "cache": cache},
        TOKENS,
    )


def closed_over():
    model = Decoder()
    params, cache = initial(model, PROMPT)
    return lambda cache, tokens: model.apply({"params": params, "cache": cache}, tokens, mutable="cache"), (
        cache,
        TOKENS,
    )


def jitted_outside():
    step, args = decoder(layers=scanned)
    return jax.jit(step), args


def frozen_and_partitioned():
    """Boxed parameters, as nn.with_partitioning makes them, in a FrozenDict."""

    class Partitioned(nn.Module):
        @nn.compact
        def __call__(self, x):
            def dense(width, *names):
                return nn.Dense(width, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), names))

            x = nn.LayerNorm()(x)
            x = x + dense(D, "mlp", "embed")(nn.relu(dense(M, "embed", "mlp")(x)))
            return dense(V, "embed", "vocab")(nn.LayerNorm()(x))

    model, x = Partitioned(), jnp.ones((3, D))
    args = freeze({"params": initial(model, x)[0]}), x
    return lambda variables, x: jax.nn.log_softmax(model.apply(variables, x)), args


class Transformation:
    """An optimizer that does nothing: what Optax offers of one."""

    @staticmethod
    def init(params):
        return {"count": jnp.int32(0), "mean": jax.tree.map(jnp.zeros_like, params)}

    @staticmethod
    def update(updates, state, params=None):
        return updates, state


def train_state():
    """A function, an optimizer and its state beside the parameters."""
    model = Decoder()
    params, cache = initial(model, PROMPT)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=Transformation)

    def step(state, cache, tokens):
        return state.apply_fn({"params": state.params, "cache": cache}, tokens, mutable=["cache"])

    return step, (state, cache, TOKENS)


def with_keys():
    """A key array among the arguments, dropout on."""
    model = Decoder(ffn=DropoutFfn)
    params, cache = initial(model, PROMPT)

    def step(params, cache, tokens, key):
        variables = {"params": params, "cache": cache}
        return model.apply(variables, tokens, mutable=["cache"], rngs={"dropout": key})

    return step, (params, cache, TOKENS, jax.random.key(3))


def batched_by_linen():
    """A model of one sequence, over a batch by nn.vmap: shared parameters, a cache for each."""
    batched = nn.vmap(
        Decoder, variable_axes={"params": None, "cache": 0}, split_rngs={"params": False}, in_axes=0, out_axes=0
    )
    model, tokens = batched(), TOKENS[:, None]
    return decode_step(model), (*initial(model, PROMPT[:, None]), tokens)


def batched_by_jax():
    model = Decoder(tied=True, ffn=SwigluFfn)
    params, cache = initial(model, PROMPT[:1])
    caches = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), cache)
    return jax.vmap(decode_step(model), (None, 0, 0)), (params, caches, TOKENS[:, None])


def generation():
    """Three greedy tokens in a scan."""
    step, (params, cache, tokens) = decoder(layers=scanned)

    def generate(params, cache, tokens):
        def one(state, _):
            logits, cache = step(params, *state)
            tokens = jnp.argmax(logits, -1, keepdims=True).astype(jnp.int32)
            return (cache, tokens), tokens

        (cache, _), made = jax.lax.scan(one, (cache, tokens), length=3)
        return made, cache

    return generate, (params, cache, tokens)


def recurrent(cell):
    model, tokens = Recurrent(cell), TOKENS[:, 0]
    state = filled(cell(D).initialize_carry(jax.random.key(0), (3, D)), seed=2)
    params, _ = initial(model, state, tokens)
    return lambda params, state, tokens: model.apply({"params": params}, state, tokens), (params, state, tokens)


def classifier():
    model, x = Classifier(), jnp.linspace(-1, 1, 3 * D).reshape(3, D)
    return lambda params, x: model.apply({"params": params}, x), (initial(model, x)[0], x)


def linen(model, nesting, build, ffn, vocab, refusals, **rest):
    return Case("Flax Linen", model, nesting, build, ffn, vocab, refusals, **rest)


# Four refusals for each attention: query, key, value and out.
CASES = [
    linen("decoder", "plain", decoder, L, 1, 4 * L),
    linen(
        "decoder, MultiHeadDotProductAttention",
        "plain",
        partial(decoder, attention=LibraryAttention),
        L,
        1,
        4 * L,
    ),
    linen(
        "decoder, MultiHeadDotProductAttention, tied head",
        "nn.scan(nn.remat)",
        partial(decoder, attention=LibraryAttention, tied=True, layers=scanned_remat),
        1,
        1,
        4,
    ),
    linen("decoder, SwiGLU, tied head", "plain", partial(decoder, ffn=SwigluFfn, tied=True), L, 1, 4 * L),
    linen("decoder, GELU", "nn.remat", partial(decoder, ffn=GeluFfn, layers=rematerialised), L, 1, 4 * L),
    linen("decoder, fused GeGLU", "nn.scan", partial(decoder, ffn=FusedGegluFfn, layers=scanned), 1, 1, 4),
    linen("decoder, DenseGeneral FFN", "plain", partial(decoder, ffn=HeadedFfn), L, 1, 4 * L),
    linen("decoder, nn.Einsum FFN", "nn.scan", partial(decoder, ffn=EinsumFfn, layers=scanned), 1, 1, 4),
    linen(
        "decoder, SwiGLU, bf16 on f32 weights",
        "nn.scan(nn.remat)",
        partial(decoder, ffn=SwigluFfn, layers=scanned_remat, dtype=jnp.bfloat16),
        1,
        1,
        4,
        tolerance=4e-2,
    ),
    linen(
        "decoder, bf16 on f32 weights, tied head",
        "plain",
        partial(decoder, tied=True, dtype=jnp.bfloat16),
        L,
        1,
        4 * L,
        tolerance=4e-2,
    ),
    linen("decoder", "nn.jit of each layer", partial(decoder, layers=jitted), L, 1, 4 * L),
    linen("decoder", "nn.remat_scan, two levels", partial(decoder, layers=remat_scanned), 1, 1, 4),
    linen("decoder", "jit of nn.scan", jitted_outside, 1, 1, 4),
    linen("decoder", "nn.vmap over the batch", batched_by_linen, L, 1, 4 * L),
    linen("decoder, SwiGLU, tied head", "jax.vmap over the batch", batched_by_jax, L, 1, 4 * L),
    linen("decoder, tied head", "all variables in one argument", with_variables, L, 1, 4 * L),
    linen("decoder", "parameters closed over", closed_over, L, 1, 4 * L, weights=()),
    linen("decoder", "TrainState", train_state, L, 1, 4 * L),
    linen("FFN and head", "FrozenDict of nn.Partitioned", frozen_and_partitioned, 1, 1, 0),
    linen("decoder, dropout on", "a key as argument", with_keys, L, 1, 4 * L),
    linen("generation, greedy", "lax.scan of nn.scan", generation, 1, 1, 4),
    # A loop over the experts' blocks, and a router for each layer.
    linen("decoder, dense experts", "nn.vmap over experts", partial(decoder, ffn=DenseExperts), L, 1, (4 + 1) * L),
    linen(
        "decoder, WeightNorm",
        "plain",
        partial(decoder, ffn=WeightNormFfn),
        L,
        1,
        (4 + 2) * L,
        missed=("weights are computed inside the program",) * L,
    ),
    # Six products in a GRU. Two in an LSTM, each with its weights concatenated inside the program.
    linen("recurrent, GRUCell", "plain", partial(recurrent, nn.GRUCell), 0, 1, 6),
    linen("recurrent, OptimizedLSTMCell", "plain", partial(recurrent, nn.OptimizedLSTMCell), 0, 1, 2),
    linen("classifier of three layers", "plain", classifier, 1, 0, 1),
]
