"""The model that the pages in ``docs/`` call ``decode_step``: small, in plain JAX."""

import jax
import jax.numpy as jnp

WIDTH, HIDDEN, VOCABULARY, LAYERS = 16, 64, 128, 1


def init(seed=0):
    """Random weights; few hidden units fire, as in a trained ReLU model."""
    keys = jax.random.split(jax.random.key(seed), 4)
    return {
        "embed": jax.random.normal(keys[0], (VOCABULARY, WIDTH)),
        "up": jax.random.normal(keys[1], (LAYERS, WIDTH, HIDDEN)) * WIDTH**-0.5,
        "bias": jnp.full((LAYERS, HIDDEN), -1.5),
        "down": jax.random.normal(keys[2], (LAYERS, HIDDEN, WIDTH)) * WIDTH**-0.5,
        "head": jax.random.normal(keys[3], (WIDTH, VOCABULARY)),
    }


def body(params, x):
    """The layers, unrolled: ``[T, WIDTH]`` to ``[T, WIDTH]``."""
    for up, bias, down in zip(params["up"], params["bias"], params["down"], strict=True):
        x = x + jax.nn.relu(x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True)) @ up + bias) @ down
    return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True))


def decode_step(params, cache, token):
    """One token ``[1]`` and the state before it ``[WIDTH]`` to logits ``[1, VOCABULARY]`` and the state."""
    x = body(params, params["embed"][token] + cache)
    return x @ params["head"], jnp.tanh(cache + x[0])


def forward(params, tokens):
    """Logits ``[T, VOCABULARY]`` of tokens ``[T]``."""
    return body(params, params["embed"][tokens]) @ params["head"]


def loss(params, tokens):
    """Nats a token."""
    scores = jax.nn.log_softmax(forward(params, tokens[:-1]))
    return -jnp.mean(jnp.take_along_axis(scores, tokens[1:, None], -1))


params = init()
cache, token = jnp.zeros(WIDTH), jnp.array([7])
windows = [jax.random.randint(jax.random.key(n), (32,), 0, VOCABULARY) for n in range(2)]
