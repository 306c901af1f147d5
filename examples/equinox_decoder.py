"""Sparsifies a decoder of Equinox modules; the module itself is the weights argument, functions and all.

Run: ``python examples/equinox_decoder.py`` (needs ``pip install 'hire-xform[equinox]'``; about ten seconds on a CPU).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

import hire_xform as hx

WIDTH, HIDDEN, VOCABULARY, LAYERS, LENGTH = 512, 4096, 32768, 2, 16
# Weights are random, so half of all hidden units are above zero, where trained ReLU models have a tenth. Half of them
# is more than pays on a CPU, so a rule asks for it. With no config at all, blocks and head are proved for each input.
CONFIG = hx.Config(ffn=hx.Ffn(active=0.5), rules=(hx.Rule("*", force=True),))


class Block(eqx.Module):
    """Attention over a cache ``[2, LENGTH, WIDTH]`` of keys and values, and an MLP, each after a norm."""

    norms: list[eqx.nn.LayerNorm]
    projections: list[eqx.nn.Linear]
    mlp: eqx.nn.MLP

    def __init__(self, key):
        keys = jax.random.split(key, 5)
        self.norms = [eqx.nn.LayerNorm(WIDTH) for _ in range(2)]
        self.projections = [eqx.nn.Linear(WIDTH, WIDTH, key=k) for k in keys[:4]]
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, HIDDEN, depth=1, activation=jax.nn.relu, key=keys[4])

    def __call__(self, x, cache, position):
        """One token."""
        query, key, value, out = self.projections
        y = self.norms[0](x)
        cache = lax.dynamic_update_slice(cache, jnp.stack([key(y), value(y)])[:, None], (0, position, 0))
        scores = jnp.where(jnp.arange(LENGTH) <= position, cache[0] @ query(y) * WIDTH**-0.5, -jnp.inf)
        x = x + out(jax.nn.softmax(scores) @ cache[1])
        return x + self.mlp(self.norms[1](x)), cache


class Decoder(eqx.Module):
    """One token to logits ``[VOCABULARY]``."""

    embed: eqx.nn.Embedding
    blocks: list[Block]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, LAYERS + 2)
        self.embed = eqx.nn.Embedding(VOCABULARY, WIDTH, key=keys[0])
        self.head = eqx.nn.Linear(WIDTH, VOCABULARY, use_bias=False, key=keys[1])
        self.blocks = [Block(k) for k in keys[2:]]
        self.norm = eqx.nn.LayerNorm(WIDTH)

    def __call__(self, cache, token, position):
        """One step; the cache is ``[LAYERS, 2, LENGTH, WIDTH]``."""
        x, caches = self.embed(token), []
        for block, one in zip(self.blocks, cache, strict=True):
            x, one = block(x, one, position)
            caches.append(one)
        return self.head(self.norm(x)), jnp.stack(caches)


def main():
    """Prints the plan, and how often dense and sparse choose the same token."""
    model, token = Decoder(jax.random.key(0)), jnp.int32(1)
    cache = other = jnp.zeros((LAYERS, 2, LENGTH, WIDTH))
    dense, sparse = eqx.filter_jit(Decoder.__call__), hx.sparsify(Decoder.__call__, config=CONFIG)

    traced = sparse.trace(model, cache, token, jnp.int32(0))
    print(traced.explain())
    packed = traced.pack(model)

    agreed = 0
    for position in map(jnp.int32, range(LENGTH)):
        logits, cache = dense(model, cache, token, position)
        close, other = sparse(packed, other, token, position)
        token = jnp.argmax(logits)
        agreed += int(token == jnp.argmax(close))
    print(f"\n{agreed} of {LENGTH} greedy tokens agree with the dense model")


if __name__ == "__main__":
    main()
