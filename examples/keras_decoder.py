"""Sparsifies a Keras 3 model on its JAX backend: sparsify ``stateless_call``, whose first two arguments are weights.

Run: ``python examples/keras_decoder.py`` (needs ``pip install 'hire-xform[keras]'``; about ten seconds on a CPU).
"""

import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import keras
from keras import layers, ops

import hire_xform as hx

WIDTH, HIDDEN, VOCABULARY, LAYERS, LENGTH = 512, 4096, 32768, 2, 16
# Weights are random, so half of all hidden units are above zero, where trained ReLU models have a tenth. Half of them
# is more than pays on a CPU, so a rule asks for it. With no config at all, blocks and head are proved for each input.
CONFIG = hx.Config(ffn=hx.Ffn(active=0.5), rules=(hx.Rule("*", force=True),))


class Attention(layers.Layer):
    """Attention of one token over a cache ``[2, LENGTH, WIDTH]`` of keys and values."""

    def build(self, shape):
        """Makes the projections."""
        self.projections = [layers.Dense(WIDTH) for _ in range(4)]
        for projection in self.projections:
            projection.build(shape)

    def call(self, x, cache, position):
        """One token."""
        query, key, value = (projection(x) for projection in self.projections[:3])
        cache = ops.slice_update(cache, [0, position, 0], ops.stack([key, value]))
        scores = ops.where(ops.arange(LENGTH) <= position, query @ ops.transpose(cache[0]) * WIDTH**-0.5, -1e9)
        return self.projections[3](ops.softmax(scores) @ cache[1]), cache


class Decoder(keras.Model):
    """One token ``[1]`` to logits ``[1, VOCABULARY]``, its head the transposed embedding."""

    def __init__(self):
        super().__init__()
        self.embed = layers.ReversibleEmbedding(VOCABULARY, WIDTH)
        self.attentions = [Attention() for _ in range(LAYERS)]
        self.mlps = [
            keras.Sequential([layers.Dense(HIDDEN, activation="relu"), layers.Dense(WIDTH)]) for _ in range(LAYERS)
        ]
        self.norms = [layers.LayerNormalization() for _ in range(2 * LAYERS + 1)]

    def call(self, cache, token, position):
        """One step; the cache is ``[LAYERS, 2, LENGTH, WIDTH]``."""
        x, caches = self.embed(token), []
        for i in range(LAYERS):
            mixed, one = self.attentions[i](self.norms[2 * i](x), cache[i], position)
            x = x + mixed
            x = x + self.mlps[i](self.norms[2 * i + 1](x))
            caches.append(one)
        return self.embed(self.norms[-1](x), reverse=True), ops.stack(caches)


def main():
    """Prints the plan, and how often dense and sparse choose the same token."""
    keras.utils.set_random_seed(0)
    model, token = Decoder(), jnp.ones(1, jnp.int32)
    cache = other = jnp.zeros((LAYERS, 2, LENGTH, WIDTH))
    model(cache, token, jnp.int32(0))  # builds it
    weights = [[v.value for v in group] for group in (model.trainable_variables, model.non_trainable_variables)]
    dense = jax.jit(model.stateless_call)
    sparse = hx.sparsify(model.stateless_call, config=CONFIG, weights_argnums=(0, 1))

    traced = sparse.trace(*weights, cache, token, jnp.int32(0))
    print(traced.explain())
    packed = traced.pack(*weights)

    agreed = 0
    for position in map(jnp.int32, range(LENGTH)):
        (logits, cache), _ = dense(*weights, cache, token, position)
        (close, other), _ = sparse(*packed, other, token, position)
        token = jnp.argmax(logits, -1)
        agreed += int((token == jnp.argmax(close, -1))[0])
    print(f"\n{agreed} of {LENGTH} greedy tokens agree with the dense model")


if __name__ == "__main__":
    main()
