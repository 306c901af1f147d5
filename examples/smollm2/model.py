"""A decoder of the Llama architecture in plain JAX: a scan over stacked layers, SiLU gates, grouped queries, one cache.

Pre-norm (RMSNorm), rotary positions that turn neighbouring pairs, and one matrix that serves as the embedding and as
the output projection.

In the shapes below B is the batch, S the sequence, T the room of the cache, V the vocabulary, D the model width, F the
feed-forward width, L the layers, H the heads of queries, G those of keys and values, and K the width of a head.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

Params = dict[str, Any]
Cache = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Config:
    """What the shapes of the weights don't say; the defaults are those of SmolLM2-135M."""

    head_dim: int = 64
    rope_base: float = 100_000.0
    norm_epsilon: float = 1e-5


SMOLLM2 = Config()


def _norm(x: jax.Array, scale: jax.Array, config: Config) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + config.norm_epsilon) * scale


def _rotate(x: jax.Array, positions: jax.Array, config: Config) -> jax.Array:
    """Turns neighbouring pairs of x [B, S, heads, K] by their positions [S]."""
    half = x.shape[-1] // 2
    frequencies = config.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """What q [B, S, H, K] reads of k and v [B, T, G, K] where mask [S, T] is true: [B, S, H * K]."""
    b, s, h, width = q.shape
    q = q.reshape(b, s, k.shape[2], -1, width)
    scores = jnp.einsum("bsgrk,btgk->bgrst", q, k) * width**-0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bgrst,btgk->bsgrk", weights, v).reshape(b, s, h * width)


def _extend(params: Params, cache: Cache, tokens: jax.Array, config: Config) -> tuple[jax.Array, Cache]:
    """Appends tokens [B, S] to the cache; returns the last layer's output [B, S, D] and the new cache."""
    start = cache["position"]
    positions = start + jnp.arange(tokens.shape[1])
    mask = positions[:, None] >= jnp.arange(cache["k"].shape[2])[None, :]

    def layer(x: jax.Array, scanned: tuple[Params, jax.Array, jax.Array]) -> tuple[jax.Array, tuple]:
        w, keys, values = scanned
        seen = _norm(x, w["attention_norm"], config)
        q, k, v = ((seen @ w[name]).reshape(*x.shape[:2], -1, config.head_dim) for name in ("q", "k", "v"))
        keys = jax.lax.dynamic_update_slice(keys, _rotate(k, positions, config), (0, start, 0, 0))
        values = jax.lax.dynamic_update_slice(values, v, (0, start, 0, 0))
        x = x + _attend(_rotate(q, positions, config), keys, values, mask) @ w["out"]
        seen = _norm(x, w["ffn_norm"], config)
        x = x + (jax.nn.silu(seen @ w["gate"]) * (seen @ w["up"])) @ w["down"]
        return x, (keys, values)

    x = params["embedding"][tokens]
    x, (keys, values) = jax.lax.scan(layer, x, (params["layers"], cache["k"], cache["v"]))
    return x, {"position": start + tokens.shape[1], "k": keys, "v": values}


def _logits(params: Params, x: jax.Array, config: Config) -> jax.Array:
    return _norm(x, params["norm"], config) @ params["embedding"].T


def init_cache(params: Params, batch: int, length: int, config: Config = SMOLLM2) -> Cache:
    """An empty key-value cache.

    Args:
      params: the weights, whose shapes say how many layers and heads there are.
      batch: the number of sequences, B.
      length: the number of positions it has room for, T. Writing more is an error that goes unnoticed.
      config: the model's other sizes.

    Returns:
      ``position``, an int32 scalar that counts the tokens so far, ``k`` and ``v`` [L, B, T, G, K] in the dtype of the
      weights.
    """
    layers, _, width = params["layers"]["k"].shape
    shape = (layers, batch, length, width // config.head_dim, config.head_dim)
    dtype = params["layers"]["k"].dtype
    return {"position": jnp.zeros((), jnp.int32), "k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


def forward(params: Params, tokens: jax.Array, config: Config = SMOLLM2) -> jax.Array:
    """The logits [B, S, V] of the token after each prefix of tokens [B, S]."""
    empty = init_cache(params, *tokens.shape, config)
    return _logits(params, _extend(params, empty, tokens, config)[0], config)


def prefill(params: Params, cache: Cache, tokens: jax.Array, config: Config = SMOLLM2) -> tuple[jax.Array, Cache]:
    """Appends a prompt [B, S] to the cache in one pass: the logits [B, V] of the token after it, and the new cache."""
    x, cache = _extend(params, cache, tokens, config)
    return _logits(params, x[:, -1], config), cache


def decode_step(params: Params, cache: Cache, token: jax.Array, config: Config = SMOLLM2) -> tuple[jax.Array, Cache]:
    """Appends one token to each sequence of the cache.

    Args:
      params: the weights.
      cache: a cache with room for one more token; it carries the position.
      token: integer [B].
      config: the model's other sizes.

    Returns:
      The logits of the token that follows, [B, V], and the new cache.
    """
    x, cache = _extend(params, cache, token[:, None], config)
    return _logits(params, x[:, -1], config), cache
