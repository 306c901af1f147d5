"""Decoders as users of Keras 3 write them on its JAX backend, called without state: lists of variables' values."""

from __future__ import annotations

import os
import warnings
from contextlib import contextmanager
from functools import partial

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import keras
from case import Case
from keras import layers, ops

D, M, V, L, H, S, B, T = 16, 40, 71, 2, 2, 6, 3, 5


class CachedAttention(layers.Layer):
    """Self-attention of one new token against a cache, its projections ``EinsumDense`` as in Keras's own."""

    def __init__(self, **options):
        super().__init__(**options)
        self.query, self.key, self.value = (
            layers.EinsumDense("btd,dhk->bthk", output_shape=(None, H, D // H), bias_axes="hk", dtype=self.dtype_policy)
            for _ in range(3)
        )
        self.out = layers.EinsumDense("bthk,hkd->btd", output_shape=(None, D), bias_axes="d", dtype=self.dtype_policy)

    def build(self, shape):
        for projection in (self.query, self.key, self.value):
            projection.build(shape)
        self.out.build((shape[0], shape[1], H, D // H))

    def call(self, x, cache, position):
        keys = ops.slice_update(cache[:, 0], [0, position, 0, 0], ops.cast(self.key(x), cache.dtype))
        values = ops.slice_update(cache[:, 1], [0, position, 0, 0], ops.cast(self.value(x), cache.dtype))
        scores = ops.einsum("bthk,bshk->bhts", self.query(x), keys) / (D // H) ** 0.5
        scores = ops.where(ops.arange(S) <= position, ops.cast(scores, "float32"), -1e9)
        weights = ops.cast(ops.softmax(scores), x.dtype)
        mixed = ops.einsum("bhts,bshk->bthk", weights, values)
        return self.out(mixed), ops.stack([keys, values], axis=1)


class FeedForward(layers.Layer):
    """Two dense layers and dropout."""

    def __init__(self, activation="relu", **options):
        super().__init__(**options)
        self.up = layers.Dense(M, activation=activation, dtype=self.dtype_policy)
        self.down = layers.Dense(D, dtype=self.dtype_policy)
        self.dropout = layers.Dropout(0.1)

    def build(self, shape):
        self.up.build(shape)
        self.down.build((*shape[:-1], M))

    def call(self, x, training=False):
        return self.dropout(self.down(self.up(x)), training=training)


class Gated(layers.Layer):
    """ReGLU with ``EinsumDense``."""

    def __init__(self, **options):
        super().__init__(**options)
        self.gate = layers.EinsumDense("btd,dm->btm", output_shape=(None, M), activation="relu")
        self.up = layers.EinsumDense("btd,dm->btm", output_shape=(None, M))
        self.down = layers.EinsumDense("btm,md->btd", output_shape=(None, D))

    def build(self, shape):
        self.gate.build(shape)
        self.up.build(shape)
        self.down.build((*shape[:-1], M))

    def call(self, x):
        return self.down(self.gate(x) * self.up(x))


class Rematerialised(FeedForward):
    """The same under ``keras.remat``."""

    def call(self, x, training=False):
        return keras.remat(lambda x: self.down(self.up(x)))(x)


def sequential(**options):
    return keras.Sequential([layers.Dense(M), layers.ReLU(), layers.Dense(D)])


class Decoder(keras.Model):
    """One token to logits, with the cache of every layer ``[B, L, 2, S, H, D / H]``."""

    def __init__(self, make_ffn=FeedForward, tied=False, **options):
        super().__init__(**options)
        policy = {"dtype": self.dtype_policy}
        self.embed = (layers.ReversibleEmbedding if tied else layers.Embedding)(V, D, **policy)
        self.attentions = [CachedAttention(**policy) for _ in range(L)]
        self.ffns = [make_ffn(**policy) for _ in range(L)]
        self.norms = [layers.LayerNormalization(epsilon=1e-6, **policy) for _ in range(2 * L)]
        self.final = layers.RMSNormalization(**policy)
        self.head = None if tied else layers.Dense(V, use_bias=False, dtype="float32")

    def call(self, tokens, cache, position):
        x, caches = self.embed(tokens[:, None]), []
        for i, (attention, ffn) in enumerate(zip(self.attentions, self.ffns, strict=True)):
            mixed, one = attention(self.norms[2 * i](x), cache[:, i], position)
            x = x + mixed
            x = x + ffn(self.norms[2 * i + 1](x))
            caches.append(one)
        x = self.final(x)
        logits = self.embed(x, reverse=True) if self.head is None else self.head(x)
        return logits[:, 0], ops.stack(caches, axis=1)


def functional(activation="relu", attention_dropout=0.1):
    """A whole sequence at once: ``keras.layers.MultiHeadAttention`` in a functional model."""
    tokens = keras.Input((T,), dtype="int32")
    x = layers.Embedding(V, D)(tokens) + layers.Embedding(T, D)(ops.arange(T))
    for _ in range(L):
        y = layers.LayerNormalization()(x)
        attention = layers.MultiHeadAttention(H, D // H, dropout=attention_dropout)
        x = layers.Add()([x, attention(y, y, use_causal_mask=True)])
        y = layers.LayerNormalization()(x)
        y = layers.Dense(M, activation=activation)(y)
        x = layers.Add()([x, layers.Dropout(0.1)(layers.Dense(D)(y))])
    return keras.Model(tokens, layers.Dense(V)(layers.LayerNormalization()(x)))


def values(variables):
    return [variable.value for variable in variables]


def data(dtype="float32"):
    cache = 0.3 * jax.random.normal(jax.random.key(5), (B, L, 2, S, H, D // H))
    return jnp.asarray([3, 5, 8], jnp.int32), cache.astype(dtype), jnp.int32(2)


@contextmanager
def policy(name):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def made(dtype="float32", change=lambda model: None, **options):
    """A built decoder with random weights, biases included."""
    keras.utils.set_random_seed(0)
    with policy(dtype):
        model = Decoder(**options)
    model(*data(model.compute_dtype))
    for i, variable in enumerate(model.trainable_variables):
        if len(variable.shape) == 1:
            variable.assign_add(0.1 * jax.random.normal(jax.random.key(i), variable.shape))
    change(model)
    return model


def with_lora(model):
    for ffn in model.ffns:
        ffn.up.enable_lora(2)


def quantized(model):
    with warnings.catch_warnings(action="ignore"):  # layers without weights to quantize say so
        model.quantize("int8")


def build(jitted=False, **options):
    """``model.stateless_call`` with the lists of trainable and other variables' values."""
    model = made(**options)
    call = model.stateless_call
    lists = values(model.trainable_variables), values(model.non_trainable_variables)
    return jax.jit(call) if jitted else call, (*lists, *data(model.compute_dtype))


def build_functional(sharing=False, **options):
    keras.utils.set_random_seed(0)
    model = functional(**options)
    tokens = jnp.arange(2 * T).reshape(2, T)
    lists = values(model.trainable_variables), values(model.non_trainable_variables)
    if not sharing:
        return model.stateless_call, (*lists, tokens)

    def step(trainable, other, tokens):
        """The model as a layer of another, called by Keras's functional interface."""
        logits, other = model.stateless_call(trainable, other, tokens, training=False)
        return ops.log_softmax(logits[:, -1]), other

    return step, (*lists, tokens)


def build_scope():
    """Weights as a dictionary by path, put in place by ``keras.StatelessScope``."""
    model = made()
    variables = {variable.path: variable for variable in model.variables}

    def step(params, tokens, cache, position):
        with keras.StatelessScope([(variables[path], value) for path, value in params.items()]):
            return model(tokens, cache, position)

    return step, ({path: variable.value for path, variable in variables.items()}, *data())


def build_closed():
    """The model closed over: its variables are constants of the program."""
    model = made()
    return lambda tokens, cache, position: model(tokens, cache, position), data()


def build_greedy():
    """Three tokens by ``keras.ops.while_loop``."""
    model = made()

    def step(trainable, other, tokens, cache, position):
        def body(count, tokens, cache, position, _):
            (logits, cache), _ = model.stateless_call(trainable, other, tokens, cache, position)
            return count + 1, ops.cast(ops.argmax(logits, -1), "int32"), cache, position + 1, logits

        start = 0, tokens, cache, position, ops.zeros((B, V))
        return ops.while_loop(lambda count, *_: count < 3, body, start)

    lists = values(model.trainable_variables), values(model.non_trainable_variables)
    return step, (*lists, *data())


COMPUTED = "LoRA: its weight is computed inside the program"
INTEGERS = "its weights are integers"

_case = partial(Case, "Keras", ffn=L, vocab=1, refusals=4 * L, weights=(0, 1))

CASES = [
    _case("decoder", "stateless_call", build),
    _case("decoder", "weights_argnums=0", build, weights=0),
    _case("decoder", "jax.jit(stateless_call)", partial(build, jitted=True)),
    _case("decoder", "StatelessScope, a dictionary", build_scope, weights=0),
    _case("decoder", "model closed over", build_closed, weights=()),
    _case("decoder", "keras.remat", partial(build, make_ffn=Rematerialised)),
    _case("decoder, tied head", "ReversibleEmbedding", partial(build, tied=True)),
    _case("decoder, GELU", "stateless_call", partial(build, make_ffn=partial(FeedForward, "gelu"))),
    _case("decoder, ReGLU", "EinsumDense", partial(build, make_ffn=Gated)),
    _case("decoder", "keras.Sequential blocks", partial(build, make_ffn=sequential)),
    _case("decoder, mixed_bfloat16", "stateless_call", partial(build, dtype="mixed_bfloat16"), tolerance=4e-2),
    _case("decoder, bfloat16", "stateless_call", partial(build, dtype="bfloat16"), tolerance=4e-2),
    # For each block the product of the two factors, the product with the sum, and the product that contracts.
    _case("decoder, LoRA", "enable_lora", partial(build, change=with_lora), refusals=7 * L, missed=(COMPUTED,) * L),
    _case(
        "decoder, int8 weights",
        'quantize("int8")',
        partial(build, change=quantized),
        refusals=6 * L + 1,
        missed=(INTEGERS,) * (L + 1),
    ),
    _case("generation, greedy", "keras.ops.while_loop", build_greedy),
    _case("functional, MultiHeadAttention", "stateless_call", build_functional),
    _case("functional, MultiHeadAttention, GELU", "stateless_call", partial(build_functional, activation="gelu")),
    _case("functional, MultiHeadAttention", "training=False, log_softmax", partial(build_functional, sharing=True)),
]
