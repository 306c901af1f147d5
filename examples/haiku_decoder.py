"""Sparsifies a decoder written with Haiku, layers scanned by ``hk.layer_stack``: sparsify the ``apply`` function.

Run: ``python examples/haiku_decoder.py`` (needs ``pip install 'hire-xform[haiku]'``; about ten seconds on a CPU).
"""

import haiku as hk
import jax
import jax.numpy as jnp
from jax import lax

import hire_xform as hx

WIDTH, HIDDEN, VOCABULARY, LAYERS, LENGTH = 512, 4096, 32768, 2, 16
# Weights are random, so half of all hidden units are above zero, where trained ReLU models have a tenth. Half of them
# is more than pays on a CPU, so a rule asks for it. With no config at all, blocks and head are proved for each input.
CONFIG = hx.Config(ffn=hx.Ffn(active=0.5), rules=(hx.Rule("*", force=True),))


def norm(x):
    """Before each part of a layer."""
    return hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)


def attention(x, cache, position):
    """One token over the cache ``[2, LENGTH, WIDTH]`` of its layer."""
    query, key, value = (hk.Linear(WIDTH, name=name)(x) for name in ("query", "key", "value"))
    cache = lax.dynamic_update_slice(cache, jnp.stack([key, value])[:, None], (0, position, 0))
    scores = jnp.where(jnp.arange(LENGTH) <= position, cache[0] @ query * WIDTH**-0.5, -jnp.inf)
    return hk.Linear(WIDTH, name="out")(jax.nn.softmax(scores) @ cache[1]), cache


def decode_step(cache, token, position):
    """One token to logits ``[VOCABULARY]``; the cache of keys and values is ``[LAYERS, 2, LENGTH, WIDTH]``."""

    @hk.layer_stack(LAYERS, with_per_layer_inputs=True)
    def layers(x, cache):
        mixed, cache = attention(norm(x), cache, position)
        x = x + mixed
        return x + hk.nets.MLP([HIDDEN, WIDTH], activation=jax.nn.relu)(norm(x)), cache

    x, cache = layers(hk.Embed(VOCABULARY, WIDTH)(token), cache)
    return hk.Linear(VOCABULARY, with_bias=False)(norm(x)), cache


def main():
    """Prints the plan, and how often dense and sparse choose the same token."""
    model, token = hk.without_apply_rng(hk.transform(decode_step)), jnp.int32(1)
    cache = other = jnp.zeros((LAYERS, 2, LENGTH, WIDTH))
    params = model.init(jax.random.key(0), cache, token, jnp.int32(0))
    dense, sparse = jax.jit(model.apply), hx.sparsify(model.apply, config=CONFIG)

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
