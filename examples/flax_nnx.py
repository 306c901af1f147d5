"""Sparsifies a Flax NNX decoder, split into its graph, its parameters (the weights argument) and its cache.

The parameters alone are packed, so the cache stays an argument of its own. A change that a function makes in place to a
module it was given is lost, as under ``jax.jit``: return the cache, as ``decode_step`` does.

Run: ``python examples/flax_nnx.py`` (needs ``pip install 'hire-xform[flax]'``; about ten seconds on a CPU).
"""

import jax
import jax.numpy as jnp
from flax import nnx

import hire_xform as hx

WIDTH, HIDDEN, VOCABULARY, LAYERS, HEADS, LENGTH = 512, 4096, 32768, 2, 8, 16
# Weights are random, so half of all hidden units are above zero, where trained ReLU models have a tenth. Half of them
# is more than pays on a CPU, so a rule asks for it. With no config at all, blocks and head are proved for each input.
CONFIG = hx.Config(ffn=hx.Ffn(active=0.5), rules=(hx.Rule("*", force=True),))


class Block(nnx.Module):
    """Attention over the cache and a feed-forward block, each after a norm."""

    def __init__(self, rngs):
        self.norms = nnx.List([nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=True, rngs=rngs)
        self.attention.init_cache((1, LENGTH, WIDTH))
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)

    def __call__(self, x):
        """Inputs ``[1, 1, WIDTH]``."""
        x = x + self.attention(self.norms[0](x))
        return x + self.down(nnx.relu(self.up(self.norms[1](x))))


class Decoder(nnx.Module):
    """Tokens ``[1, 1]`` to logits ``[1, 1, VOCABULARY]``."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        """One step; updates the cache."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def decode_step(graph, params, cache, tokens):
    """One step: logits and the new cache."""
    model = nnx.merge(graph, params, cache)
    logits = model(tokens)
    return logits, nnx.state(model, nnx.Not(nnx.Param))


def main():
    """Prints the plan, and how often dense and sparse choose the same token."""
    graph, params, cache = nnx.split(Decoder(nnx.Rngs(0)), nnx.Param, ...)
    other, tokens = cache, jnp.ones((1, 1), jnp.int32)
    dense, sparse = jax.jit(decode_step), hx.sparsify(decode_step, config=CONFIG, weights_argnums=1)

    traced = sparse.trace(graph, params, cache, tokens)
    print(traced.explain())
    packed = traced.pack(params)

    agreed = 0
    for _ in range(LENGTH):
        logits, cache = dense(graph, params, cache, tokens)
        close, other = sparse(graph, packed, other, tokens)
        tokens = jnp.argmax(logits, -1)
        agreed += int(tokens[0, 0] == jnp.argmax(close))
    print(f"\n{agreed} of {LENGTH} greedy tokens agree with the dense model")


if __name__ == "__main__":
    main()
