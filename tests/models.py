"""Small decode steps in plain JAX, one for each way of nesting that people use.

Every step has the signature ``step(params, cache, tokens, shift) -> (logits, cache)``: ``tokens`` is ``[B]``, ``shift``
a ``[D]`` vector added to the embeddings (so that there is an activation to differentiate by).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

D, M, V, L, H, S = 16, 40, 71, 2, 2, 6


def random_array(rng, *shape, dtype=jnp.float32) -> jax.Array:
    scale = shape[-2] ** -0.5 if len(shape) > 1 else 0.1
    return jnp.asarray(rng.normal(size=shape) * scale, dtype)


def layer_weights(rng, dtype, lead=()) -> dict[str, jax.Array]:
    shapes = {"wq": (D, D), "wk": (D, D), "wv": (D, D), "wo": (D, D), "w1": (D, M), "w2": (M, D)}
    found = {name: random_array(rng, *lead, *shape, dtype=dtype) for name, shape in shapes.items()}
    for name, size in (("b1", M), ("b2", D)):
        found[name] = random_array(rng, *lead, size, dtype=dtype)
    return found


def list_params(dtype=jnp.float32, seed=0, tied=False) -> dict[str, Any]:
    """Layers as a list of dictionaries."""
    rng = np.random.default_rng(seed)
    params = {"layers": [layer_weights(rng, dtype) for _ in range(L)], "embed": random_array(rng, V, D, dtype=dtype)}
    return params if tied else {**params, "head": random_array(rng, D, V, dtype=dtype)}


def stacked_params(dtype=jnp.float32, seed=0, tied=False) -> dict[str, Any]:
    """Layers stacked along a leading axis."""
    params = list_params(dtype, seed, tied)
    return {**params, "layers": jax.tree.map(lambda *x: jnp.stack(x), *params["layers"])}


def make_cache(batch, dtype=jnp.float32) -> dict[str, jax.Array]:
    rng = np.random.default_rng(7)
    shape = (L, batch, S, H, D // H)
    kv = {name: random_array(rng, *shape, dtype=dtype) for name in ("k", "v")}
    return {**kv, "pos": jnp.int32(2)}


def norm(x):
    return x * lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True) + 1e-6).astype(x.dtype)


def attention(w, x, k, v, pos):
    batch = x.shape[0]
    q, new_k, new_v = ((x @ w[name]).reshape(batch, H, D // H) for name in ("wq", "wk", "wv"))
    k = lax.dynamic_update_slice(k, new_k[:, None], (0, pos, 0, 0))
    v = lax.dynamic_update_slice(v, new_v[:, None], (0, pos, 0, 0))
    scores = jnp.einsum("bhd,bshd->bhs", q, k) / np.sqrt(D // H).astype(x.dtype)
    scores = jnp.where(jnp.arange(S) <= pos, scores.astype(jnp.float32), -1e9)
    mixed = jnp.einsum("bhs,bshd->bhd", jax.nn.softmax(scores).astype(x.dtype), v)
    return mixed.reshape(batch, D) @ w["wo"], k, v


def relu_ffn(w, x):
    return jax.nn.relu(x @ w["w1"] + w["b1"]) @ w["w2"] + w["b2"]


def layer(w, x, k, v, pos, ffn=relu_ffn):
    mixed, k, v = attention(w, norm(x), k, v, pos)
    x = x + mixed
    return x + ffn(w, norm(x)), k, v


def embed(params, tokens, shift):
    return params["embed"][tokens] + shift.astype(params["embed"].dtype)


def head(params, x):
    weight = params["head"] if "head" in params else params["embed"].T
    return (norm(x) @ weight).astype(jnp.float32)


def unrolled(params, cache, tokens, shift, one_layer=layer):
    x, ks, vs = embed(params, tokens, shift), [], []
    for i, w in enumerate(params["layers"]):
        x, k, v = one_layer(w, x, cache["k"][i], cache["v"][i], cache["pos"])
        ks.append(k)
        vs.append(v)
    return head(params, x), {"k": jnp.stack(ks), "v": jnp.stack(vs), "pos": cache["pos"] + 1}


def scanned(params, cache, tokens, shift, one_layer=layer):
    def body(x, slices):
        w, k, v = slices
        x, k, v = one_layer(w, x, k, v, cache["pos"])
        return x, (k, v)

    x, (k, v) = lax.scan(body, embed(params, tokens, shift), (params["layers"], cache["k"], cache["v"]))
    return head(params, x), {"k": k, "v": v, "pos": cache["pos"] + 1}


def indexed(params, cache, tokens, shift):
    """Layers taken from the stack with ``w[i]`` in a ``fori_loop``."""

    def body(i, state):
        x, ks, vs = state
        w = jax.tree.map(lambda stack: stack[i], params["layers"])
        x, k, v = layer(w, x, ks[i], vs[i], cache["pos"])
        return x, ks.at[i].set(k), vs.at[i].set(v)

    x, k, v = lax.fori_loop(0, L, body, (embed(params, tokens, shift), cache["k"], cache["v"]))
    return head(params, x), {"k": k, "v": v, "pos": cache["pos"] + 1}


def taken(params, cache, tokens, shift):
    """Layers taken from the stack with ``jnp.take``, which makes a layer out of range NaN."""

    def body(i, state):
        x, ks, vs = state
        w = jax.tree.map(lambda stack: jnp.take(stack, i, axis=0), params["layers"])
        x, k, v = layer(w, x, ks[i], vs[i], cache["pos"])
        return x, ks.at[i].set(k), vs.at[i].set(v)

    x, k, v = lax.fori_loop(0, L, body, (embed(params, tokens, shift), cache["k"], cache["v"]))
    return head(params, x), {"k": k, "v": v, "pos": cache["pos"] + 1}


def while_indexed(params, cache, tokens, shift):
    """Layers in a ``while_loop`` that counts for itself, the cache updated in place; each stack indexed its own way."""
    ways = {
        "w1": lambda stack, i: lax.dynamic_index_in_dim(stack, i, 0, keepdims=False),
        "w2": lambda stack, i: stack.at[i].get(mode="fill"),
        "b1": lambda stack, i: jnp.take(stack, i, axis=0, mode="clip"),
    }

    def body(state):
        i, x, ks, vs = state
        w = {name: ways.get(name, lambda stack, i: stack[i])(stack, i) for name, stack in params["layers"].items()}
        x, k, v = layer(w, x, ks[i], vs[i], cache["pos"])
        ks = lax.dynamic_update_slice(ks, k[None], (i, 0, 0, 0, 0))
        vs = lax.dynamic_update_slice(vs, v[None], (i, 0, 0, 0, 0))
        return i + 1, x, ks, vs

    start = (0, embed(params, tokens, shift), cache["k"], cache["v"])
    _, x, k, v = lax.while_loop(lambda state: state[0] < L, body, start)
    return head(params, x), {"k": k, "v": v, "pos": cache["pos"] + 1}


jitted_layer = jax.jit(layer)


@jax.jit
def jit_scan_jit(params, cache, tokens, shift):
    return scanned(params, cache, tokens, shift, jitted_layer)


def rematerialised(params, cache, tokens, shift):
    return scanned(params, cache, tokens, shift, jax.checkpoint(layer))


def rematerialised_unrolled(params, cache, tokens, shift):
    policy = jax.checkpoint_policies.dots_saveable
    return unrolled(params, cache, tokens, shift, jax.checkpoint(jax.jit(layer), policy=policy))


def generate(params, cache, tokens, shift, one_step=unrolled):
    """Three greedy steps in a while loop; the weights are constants of it."""

    def going(state):
        return state[0] < 3

    def body(state):
        count, tokens, _, cache = state
        logits, cache = one_step(params, cache, tokens, shift)
        return count + 1, jnp.argmax(logits, -1).astype(tokens.dtype), logits, cache

    start = (0, tokens, jnp.zeros((tokens.shape[0], V), jnp.float32), cache)
    _, _, logits, cache = lax.while_loop(going, body, start)
    return logits, cache


def generate_carrying(params, cache, tokens, shift):
    """The same, the weights carried through the loop's state unchanged."""

    def body(state):
        params, count, tokens, _, cache = state
        logits, cache = scanned(params, cache, tokens, shift)
        return params, count + 1, jnp.argmax(logits, -1).astype(tokens.dtype), logits, cache

    start = (params, 0, tokens, jnp.zeros((tokens.shape[0], V), jnp.float32), cache)
    _, _, _, logits, cache = lax.while_loop(lambda state: state[1] < 2, body, start)
    return logits, cache


def generate_sampling(params, cache, tokens, shift):
    """A whole generate loop: samples until every sequence has ended or the cache is full; ended ones are padded."""
    end, pad = 7, 0

    def going(state):
        count, _, ended, _, _, _ = state
        return (count < 4) & ~jnp.all(ended)

    def body(state):
        count, tokens, ended, key, _, cache = state
        logits, cache = scanned(params, cache, tokens, shift)
        key, own = jax.random.split(key)
        drawn = jax.random.categorical(own, logits / 0.7).astype(tokens.dtype)
        tokens = jnp.where(ended, pad, drawn)
        return count + 1, tokens, ended | (tokens == end), key, logits, cache

    logits = jnp.zeros((tokens.shape[0], V), jnp.float32)
    start = (0, tokens, tokens == end, jax.random.key(3), logits, cache)
    _, tokens, _, _, logits, cache = lax.while_loop(going, body, start)
    return logits, {**cache, "tokens": tokens}


def conditional(params, cache, tokens, shift):
    """A feed-forward block in one branch of a cond, another activation of it in the other."""

    def squared(w, x):
        return jnp.square(jax.nn.relu(x @ w["w1"] + w["b1"])) @ w["w2"]

    def one_layer(w, x, k, v, pos):
        return layer(w, x, k, v, pos, lambda w, x: lax.cond(pos > 1, relu_ffn, squared, w, x))

    return unrolled(params, cache, tokens, shift, one_layer)


@jax.custom_jvp
def custom_jvp_ffn(w, x):
    return relu_ffn(w, x)


@custom_jvp_ffn.defjvp
def _custom_jvp_rule(primals, tangents):
    out, out_dot = jax.jvp(relu_ffn, primals, tangents)
    return out, 2 * out_dot


@jax.custom_vjp
def custom_vjp_ffn(w, x):
    return relu_ffn(w, x)


def _vjp_forward(w, x):
    out, pull = jax.vjp(relu_ffn, w, x)
    return out, pull


def _vjp_backward(pull, out_bar):
    return tuple(jax.tree.map(lambda g: 2 * g, pull(out_bar)))


custom_vjp_ffn.defvjp(_vjp_forward, _vjp_backward)


def with_custom(ffn, params, cache, tokens, shift):
    return unrolled(params, cache, tokens, shift, partial(layer, ffn=ffn))


@dataclass(frozen=True)
class Model:
    """A decode step, how to make its weights, and the sites it has (those in loops count once)."""

    name: str
    step: Callable
    make_params: Callable[..., Any]
    ffn: int
    refusals: int
    vocab: int = 1
    dtypes: tuple = field(default=(jnp.float32, jnp.bfloat16))

    def __repr__(self) -> str:
        return self.name


MODELS = [
    Model("unrolled", unrolled, list_params, L, 4 * L),
    Model("tied", unrolled, partial(list_params, tied=True), L, 4 * L),
    Model("scanned", scanned, stacked_params, 1, 4),
    Model("scanned_tied", scanned, partial(stacked_params, tied=True), 1, 4),
    Model("jitted_layers", partial(unrolled, one_layer=jitted_layer), list_params, L, 4 * L),
    Model("jit_scan_jit", jit_scan_jit, stacked_params, 1, 4),
    Model("remat_scan", rematerialised, stacked_params, 1, 4),
    Model("remat_unrolled", rematerialised_unrolled, list_params, L, 4 * L),
    Model("indexed", indexed, stacked_params, 1, 4),
    Model("taken", taken, stacked_params, 1, 4),
    Model("while_indexed", while_indexed, stacked_params, 1, 4),
    # Greedy tokens may flip by rounding in bfloat16.
    Model("generate", generate, list_params, L, 4 * L, dtypes=(jnp.float32,)),
    Model("generate_carrying", generate_carrying, stacked_params, 1, 4, dtypes=(jnp.float32,)),
    Model("generate_jit_scan", partial(generate, one_step=jit_scan_jit), stacked_params, 1, 4, dtypes=(jnp.float32,)),
    Model("generate_sampling", generate_sampling, stacked_params, 1, 4, dtypes=(jnp.float32,)),
    Model("conditional", conditional, list_params, 2 * L, 4 * L),
    Model("custom_jvp", partial(with_custom, custom_jvp_ffn), list_params, L, 4 * L),
    Model("custom_vjp", partial(with_custom, custom_vjp_ffn), list_params, L, 4 * L),
]
