"""A decoder-only transformer with ReLU feed-forward blocks, in plain JAX.

Pre-norm (RMSNorm), rotary positions, and one matrix that serves as the embedding and as the output projection.
Parameters are a dict whose ``layers`` entry is a list with one dict per layer, so they are a pytree like any other::

    params = load("tiny_lm/weights.safetensors")
    logits, cache = prefill(params, init_cache(config_of(params), batch=1, length=512), prompt)
    tokens, cache = generate(jax.jit(decode_step), params, cache, jnp.argmax(logits, axis=-1), count=64)

In the shapes below B is the batch, S the sequence, V the vocabulary, D the model width, F the feed-forward width,
H the number of heads and K the width of a head.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file
from safetensors.numpy import save as to_bytes

Params = dict[str, Any]
Cache = dict[str, Any]

_ROPE_BASE = 10_000.0
_NORM_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of the model; everything else follows from them."""

    vocab_size: int = 8192
    d_model: int = 256
    d_ff: int = 1024
    num_layers: int = 4
    num_heads: int = 4

    def __post_init__(self) -> None:
        """Refuses sizes that no model can have."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}")
        if self.d_model % (2 * self.num_heads):
            raise ValueError(
                f"d_model must be a multiple of 2 * num_heads, got d_model={self.d_model}, num_heads={self.num_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.num_heads


def init(config: Config, key: jax.Array) -> Params:
    """Returns freshly initialised float32 parameters.

    Args:
      config: the sizes of the model.
      key: a PRNG key.

    Returns:
      A dict of ``embedding`` [V, D], ``norm`` [D] and ``layers``, a list of
      ``{"attention": {"norm": [D], "w_q", "w_k", "w_v": [D, H, K], "w_o": [H, K, D]},
      "ffn": {"norm": [D], "w_in": [D, F], "b_in": [F], "w_out": [F, D], "b_out": [D]}}``.
    """
    d, f, h, k = config.d_model, config.d_ff, config.num_heads, config.head_dim
    # The two products that write to the residual stream start smaller, so that its variance does not grow with depth.
    residual_scale = (2 * config.num_layers) ** -0.5

    def normal(key: jax.Array, shape: tuple[int, ...], scale: float) -> jax.Array:
        return scale * jax.random.normal(key, shape, jnp.float32)

    def layer(key: jax.Array) -> Params:
        keys = jax.random.split(key, 6)
        return {
            "attention": {
                "norm": jnp.ones(d),
                "w_q": normal(keys[0], (d, h, k), d**-0.5),
                "w_k": normal(keys[1], (d, h, k), d**-0.5),
                "w_v": normal(keys[2], (d, h, k), d**-0.5),
                "w_o": normal(keys[3], (h, k, d), d**-0.5 * residual_scale),
            },
            "ffn": {
                "norm": jnp.ones(d),
                "w_in": normal(keys[4], (d, f), d**-0.5),
                "b_in": jnp.zeros(f),
                "w_out": normal(keys[5], (f, d), f**-0.5 * residual_scale),
                "b_out": jnp.zeros(d),
            },
        }

    embedding_key, *layer_keys = jax.random.split(key, 1 + config.num_layers)
    return {
        "embedding": normal(embedding_key, (config.vocab_size, d), 0.02),
        "layers": [layer(layer_key) for layer_key in layer_keys],
        "norm": jnp.ones(d),
    }


def config_of(params: Params) -> Config:
    """Reads the sizes of the model off the shapes of its parameters."""
    vocab_size, d_model = params["embedding"].shape
    first = params["layers"][0]
    return Config(
        vocab_size=vocab_size,
        d_model=d_model,
        d_ff=first["ffn"]["w_in"].shape[1],
        num_layers=len(params["layers"]),
        num_heads=first["attention"]["w_q"].shape[1],
    )


def _rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + _NORM_EPSILON) * scale


def _rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Applies rotary position embeddings to x [B, S, H, K] at positions [S]."""
    half = x.shape[-1] // 2
    frequencies = _ROPE_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    x1, x2 = x[..., :half], x[..., half:]
    return jnp.concatenate([x1 * cos - x2 * sin, x1 * sin + x2 * cos], axis=-1)


def _project(attention: Params, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns queries, keys and values, each [B, S, H, K], of x [B, S, D] at positions [S]."""
    q = jnp.einsum("bsd,dhk->bshk", x, attention["w_q"])
    k = jnp.einsum("bsd,dhk->bshk", x, attention["w_k"])
    v = jnp.einsum("bsd,dhk->bshk", x, attention["w_v"])
    return _rotate(q, positions), _rotate(k, positions), v


def _attend(attention: Params, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Attends from q [B, S, H, K] to k and v [B, T, H, K] where mask [S, T] is true; returns [B, S, D]."""
    scores = jnp.einsum("bshk,bthk->bhst", q, k) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    mixed = jnp.einsum("bhst,bthk->bshk", weights, v)
    return jnp.einsum("bshk,hkd->bsd", mixed, attention["w_o"])


def _ffn(ffn: Params, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ ffn["w_in"] + ffn["b_in"]) @ ffn["w_out"] + ffn["b_out"]


def _logits(params: Params, x: jax.Array) -> jax.Array:
    return _rms_norm(x, params["norm"]) @ params["embedding"].T


def forward(params: Params, tokens: jax.Array) -> jax.Array:
    """Computes the logits of the token after each prefix, for training and validation.

    Args:
      params: the parameters, as from `init` or `load`.
      tokens: integer [B, S].

    Returns:
      Logits, [B, S, V]; those at position s depend on tokens[:, :s + 1].
    """
    positions = jnp.arange(tokens.shape[1])
    causal = positions[:, None] >= positions[None, :]
    x = params["embedding"][tokens]
    for layer in params["layers"]:
        attention, ffn = layer["attention"], layer["ffn"]
        q, k, v = _project(attention, _rms_norm(x, attention["norm"]), positions)
        x = x + _attend(attention, q, k, v, causal)
        x = x + _ffn(ffn, _rms_norm(x, ffn["norm"]))
    return _logits(params, x)


def init_cache(config: Config, batch: int, length: int) -> Cache:
    """Returns an empty key-value cache.

    Args:
      config: the sizes of the model.
      batch: the number of sequences, B.
      length: the number of positions the cache has room for, L. Writing more tokens than that is an error of the
        caller that goes unnoticed: the last positions are overwritten.

    Returns:
      A dict of ``position``, an int32 scalar that counts the tokens so far, and ``layers``, a list of
      ``{"k": [B, L, H, K], "v": [B, L, H, K]}``.
    """
    shape = (batch, length, config.num_heads, config.head_dim)
    layers = [{"k": jnp.zeros(shape), "v": jnp.zeros(shape)} for _ in range(config.num_layers)]
    return {"position": jnp.zeros((), jnp.int32), "layers": layers}


def _extend(params: Params, cache: Cache, tokens: jax.Array) -> tuple[jax.Array, Cache]:
    """Appends tokens [B, S] to the cache; returns the last layer's output [B, S, D] and the new cache."""
    start = cache["position"]
    length = cache["layers"][0]["k"].shape[1]
    positions = start + jnp.arange(tokens.shape[1])
    mask = positions[:, None] >= jnp.arange(length)[None, :]
    x = params["embedding"][tokens]
    layers = []
    for layer, entry in zip(params["layers"], cache["layers"], strict=True):
        attention, ffn = layer["attention"], layer["ffn"]
        q, k, v = _project(attention, _rms_norm(x, attention["norm"]), positions)
        keys = jax.lax.dynamic_update_slice(entry["k"], k, (0, start, 0, 0))
        values = jax.lax.dynamic_update_slice(entry["v"], v, (0, start, 0, 0))
        layers.append({"k": keys, "v": values})
        x = x + _attend(attention, q, keys, values, mask)
        x = x + _ffn(ffn, _rms_norm(x, ffn["norm"]))
    return x, {"position": start + tokens.shape[1], "layers": layers}


def prefill(params: Params, cache: Cache, tokens: jax.Array) -> tuple[jax.Array, Cache]:
    """Appends a prompt to the cache in one pass.

    Args:
      params: the parameters.
      cache: a cache with room for S more tokens; it need not be empty.
      tokens: integer [B, S].

    Returns:
      The logits of the token after the prompt, [B, V], and the new cache.
    """
    x, cache = _extend(params, cache, tokens)
    return _logits(params, x[:, -1]), cache


def decode_step(params: Params, cache: Cache, token: jax.Array) -> tuple[jax.Array, Cache]:
    """Appends one token per sequence to the cache.

    Args:
      params: the parameters.
      cache: a cache with room for one more token; it carries the position.
      token: integer [B].

    Returns:
      The logits of the token that follows, [B, V], and the new cache.
    """
    x, cache = _extend(params, cache, token[:, None])
    return _logits(params, x[:, -1]), cache


def generate(
    step: Callable[[Any, Cache, jax.Array], tuple[jax.Array, Cache]],
    params: Any,
    cache: Cache,
    token: jax.Array,
    count: int,
) -> tuple[jax.Array, Cache]:
    """Decodes greedily.

    Args:
      step: `decode_step` or a function with its signature, normally jitted.
      params: what the step takes as its parameters.
      cache: the cache after the prompt, with room for count - 1 more tokens.
      token: the first token to emit, integer [B]: the arg max of what `prefill` returned.
      count: the number of tokens to emit, the first included.

    Returns:
      The emitted tokens, [B, count], and the new cache, in which the last of them is not yet entered.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    tokens = [token]
    for _ in range(count - 1):
        logits, cache = step(params, cache, tokens[-1])
        tokens.append(jnp.argmax(logits, axis=-1))
    return jnp.stack(tokens, axis=1), cache


def flatten(params: Params) -> dict[str, Any]:
    """Returns a flat dict of the leaves, named like ``layers.0.ffn.w_in``."""
    leaves, _ = jax.tree.flatten_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def unflatten(arrays: dict[str, Any]) -> Params:
    """Undoes `flatten`."""
    params: Params = {}
    for name, array in arrays.items():
        *parents, last = name.split(".")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = array
    layers = params.get("layers", {})
    params["layers"] = [layers[str(i)] for i in range(len(layers))]
    return params


def save(path: str | os.PathLike[str], params: Params, dtype: Any = jnp.float32) -> None:
    """Writes the parameters as safetensors, rounded to dtype; a file of that name is replaced in one move."""
    path = Path(path)
    arrays = {name: np.asarray(leaf).astype(dtype) for name, leaf in flatten(params).items()}
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(to_bytes(arrays))
    os.replace(partial, path)


def load(path: str | os.PathLike[str]) -> Params:
    """Reads parameters written by `save`, as float32 whatever they are stored in."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights at {path}; train_tiny_lm.py writes them")
    return unflatten({name: jnp.asarray(array, jnp.float32) for name, array in load_file(path).items()})
