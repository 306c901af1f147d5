"""Sparsifies a decoder in plain JAX: parameters in a dictionary, layers stacked and scanned, a tied head.

Run: ``python examples/plain_jax.py`` (needs nothing but hire_xform; about ten seconds on a CPU).
"""

import jax
import jax.numpy as jnp
from jax import lax

import hire_xform as hx

WIDTH, HIDDEN, VOCABULARY, LAYERS, LENGTH = 512, 4096, 32768, 2, 16
# Weights are random, so half of all hidden units are above zero, where trained ReLU models have a tenth. Half of them
# is more than pays on a CPU, so a rule asks for it. With no config at all, blocks and head are proved for each input.
CONFIG = hx.Config(ffn=hx.Ffn(active=0.5), rules=(hx.Rule("*", force=True),))


def init(key):
    """Random parameters, those of the layers stacked."""
    shapes = {"query": (WIDTH, WIDTH), "key": (WIDTH, WIDTH), "value": (WIDTH, WIDTH), "out": (WIDTH, WIDTH)}
    shapes |= {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    keys = jax.random.split(key, len(shapes) + 1)
    layers = {
        name: jax.random.normal(k, (LAYERS, *shape)) * shape[0] ** -0.5
        for k, (name, shape) in zip(keys[1:], shapes.items(), strict=True)
    }
    return {"embed": jax.random.normal(keys[0], (VOCABULARY, WIDTH)), "layers": layers}


def norm(x):
    """Without parameters, for brevity."""
    return x * lax.rsqrt(jnp.mean(x * x) + 1e-6)


def decode_step(params, cache, token, position):
    """One token to logits ``[VOCABULARY]``; the cache of keys and values is ``[LAYERS, 2, LENGTH, WIDTH]``."""

    def layer(x, weights_and_cache):
        weights, cache = weights_and_cache
        y = norm(x)
        new = jnp.stack([y @ weights["key"], y @ weights["value"]])
        cache = lax.dynamic_update_slice(cache, new[:, None], (0, position, 0))
        scores = jnp.where(jnp.arange(LENGTH) <= position, cache[0] @ (y @ weights["query"]) * WIDTH**-0.5, -jnp.inf)
        x = x + jax.nn.softmax(scores) @ cache[1] @ weights["out"]
        return x + jax.nn.relu(norm(x) @ weights["up"]) @ weights["down"], cache

    x, cache = lax.scan(layer, params["embed"][token], (params["layers"], cache))
    return norm(x) @ params["embed"].T, cache


def main():
    """Prints the plan, and how often dense and sparse choose the same token."""
    params, token = init(jax.random.key(0)), jnp.int32(1)
    cache = other = jnp.zeros((LAYERS, 2, LENGTH, WIDTH))
    dense, sparse = jax.jit(decode_step), hx.sparsify(decode_step, config=CONFIG)

    traced = sparse.trace(params, cache, token, jnp.int32(0))
    print(traced.explain())
    packed = traced.pack(params)

    agreed = 0
    for position in map(jnp.int32, range(LENGTH)):
        logits, cache = dense(params, cache, token, position)
        close, other = sparse(packed, other, token, position)
        token = jnp.argmax(logits)
        agreed += int(token == jnp.argmax(close))
    print(f"\n{agreed} of {LENGTH} greedy tokens agree with the dense model")


if __name__ == "__main__":
    main()
