"""Sparsifies the Flax OPT model of `transformers` as it is published; the cache is its own.

Run: ``python examples/transformers_opt.py`` (needs ``pip install 'hire-xform[transformers]'``; about twenty seconds on
a CPU). Weights are random and nothing is downloaded; trained ones come from ``FlaxOPTForCausalLM.from_pretrained``.
"""

import jax
import jax.numpy as jnp
from transformers import FlaxOPTForCausalLM, OPTConfig
from transformers.utils import logging

import hire_xform as hx

WIDTH, HIDDEN, VOCABULARY, LAYERS, LENGTH = 512, 4096, 32768, 2, 16


def make_model():
    """The model, with weights."""
    logging.set_verbosity_error()  # its Flax models say that no more are written
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        ffn_dim=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        max_position_embeddings=64,
        init_std=0.1,
    )
    model = FlaxOPTForCausalLM(config, seed=0)
    for layer in model.params["model"]["decoder"]["layers"].values():
        # Half the units of a random block are above zero, of a trained OPT's a few in a hundred; so, a tenth.
        layer["fc1"]["bias"] -= 2.9
    return model


def main():
    """Prints the plan, and how often dense and sparse choose the same token."""
    model = make_model()

    def decode_step(params, cache, token, position):
        mask, where = jnp.ones((1, LENGTH), "i4"), jnp.full((1, 1), position)
        out = model(token[None, None], mask, where, params=params, past_key_values=cache)
        return out.logits[0, -1], out.past_key_values

    params, token = model.params, jnp.int32(5)
    cache = other = model.init_cache(1, LENGTH)
    dense, sparse = jax.jit(decode_step), hx.sparsify(decode_step)

    traced = sparse.trace(params, cache, token, jnp.int32(0))
    print(traced.explain())
    packed = traced.pack(params)

    tokens, agreed = [], 0
    for position in map(jnp.int32, range(LENGTH)):
        logits, cache = dense(params, cache, token, position)
        close, other = sparse(packed, other, token, position)
        token = jnp.argmax(logits)
        tokens.append(int(jnp.argmax(close)))
        agreed += int(token) == tokens[-1]
    print(f"\nsparse: {tokens}\n{agreed} of {LENGTH} greedy tokens agree with the dense model")


if __name__ == "__main__":
    main()
