"""Sparsifies a Flax Linen decoder: layers in nn.scan, library attention with its cache, a head tied to the embedding.

Run: ``python examples/flax_linen.py`` (needs ``pip install 'hire-xform[flax]'``; about ten seconds on a CPU).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

import hire_xform as hx

WIDTH, HIDDEN, VOCABULARY, LAYERS, HEADS, LENGTH = 512, 4096, 32768, 2, 8, 16
# Weights are random, so half of all hidden units are above zero, where trained ReLU models have a tenth. Half of them
# is more than pays on a CPU, so a rule asks for it. With no config at all, blocks and head are proved for each input.
CONFIG = hx.Config(ffn=hx.Ffn(active=0.5), rules=(hx.Rule("*", force=True),))


class Block(nn.Module):
    """Attention over the cache and a feed-forward block, each after a norm; a second result, as nn.scan wants."""

    @nn.compact
    def __call__(self, x, _):
        """Inputs ``[B, 1, WIDTH]``."""
        x = x + nn.MultiHeadDotProductAttention(HEADS, decode=True)(nn.RMSNorm()(x))
        hidden = nn.relu(nn.Dense(HIDDEN)(nn.RMSNorm()(x)))
        return x + nn.Dense(WIDTH)(hidden), None


class Decoder(nn.Module):
    """Tokens ``[B, 1]`` to logits ``[B, 1, VOCABULARY]``."""

    @nn.compact
    def __call__(self, tokens):
        """One step; updates the cache."""
        embed = nn.Embed(VOCABULARY, WIDTH)
        stack = nn.scan(Block, variable_axes={"params": 0, "cache": 0}, split_rngs={"params": True}, length=LAYERS)
        x, _ = stack()(embed(tokens), None)
        return embed.attend(nn.RMSNorm()(x))


MODEL = Decoder()


def decode_step(params, cache, tokens):
    """One step: logits and the new cache."""
    logits, updated = MODEL.apply({"params": params, "cache": cache}, tokens, mutable=["cache"])
    return logits, updated["cache"]


def main():
    """Prints the plan, and how often dense and sparse choose the same token."""
    variables = jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, LENGTH), jnp.int32))
    params, tokens = variables["params"], jnp.ones((1, 1), jnp.int32)
    cache = other = variables["cache"]
    dense, sparse = jax.jit(decode_step), hx.sparsify(decode_step, config=CONFIG)

    traced = sparse.trace(params, cache, tokens)
    print(traced.explain())
    packed = traced.pack(params)

    agreed = 0
    for _ in range(LENGTH):
        logits, cache = dense(params, cache, tokens)
        close, other = sparse(packed, other, tokens)
        tokens = jnp.argmax(logits, -1)
        agreed += int(tokens[0, 0] == jnp.argmax(close))
    print(f"\n{agreed} of {LENGTH} greedy tokens agree with the dense model")


if __name__ == "__main__":
    main()
