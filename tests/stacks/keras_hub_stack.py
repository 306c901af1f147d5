"""KerasHub: the backbone without state, and the compiled function that ``generate`` runs."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import keras_hub
import numpy as np
from stack import Run, Stack, randomised

import hire_xform as hx

D, M, V, L = 32, 96, 160, 2
GEMMA = {
    "vocabulary_size": V,
    "num_layers": L,
    "num_query_heads": 2,
    "num_key_value_heads": 1,
    "hidden_dim": D,
    "intermediate_dim": 2 * M,
    "head_dim": 16,
}
LLAMA = {key: value for key, value in GEMMA.items() if key != "head_dim"} | {"intermediate_dim": M}
TOKENS = jnp.asarray([[1, 5, 9, 0, 0, 0, 0, 0], [1, 30, 7, 0, 0, 0, 0, 0]], jnp.int32)


def values(variables):
    return [variable.value for variable in variables]


def model_of(kind, settings):
    backbone = getattr(keras_hub.models, f"{kind}Backbone")(**settings)
    for variable, value in zip(backbone.variables, randomised(values(backbone.variables)), strict=True):
        variable.assign(value)
    return getattr(keras_hub.models, f"{kind}CausalLM")(backbone, preprocessor=None)


def inputs():
    return {"token_ids": TOKENS, "padding_mask": TOKENS > 0}


def stateless(kind, settings):
    model = model_of(kind, settings)
    trainable, rest = values(model.trainable_variables), values(model.non_trainable_variables)

    def sparse(config):
        return hx.sparsify(model.stateless_call, weights_argnums=(0, 1), config=config)

    def call():
        one = {"token_ids": TOKENS[:, :1], "padding_mask": TOKENS[:, :1] > 0}
        return (trainable, rest, one), {}

    return Run(jax.jit(model.stateless_call), sparse, call, (0, 1))


def generating(kind, settings):
    model = model_of(kind, settings)
    model.compile(sampler="greedy")
    compiled = compiled_of(model)
    dense = compiled.cell_contents

    def sparse(config):
        compiled.cell_contents = hx.sparsify(dense, weights_argnums=2, config=config)
        return compiled.cell_contents

    def call():
        parts = model.sampler.variables, model.trainable_variables, model.non_trainable_variables
        return (inputs(), None, tuple(map(values, parts))), {}

    return Run(dense, sparse, call, (2,), lambda made: np.asarray(made[0]["token_ids"]))


def compiled_of(model):
    """The cell of ``compiled_generate_function``, which ``generate`` calls."""
    wrapped = model.make_generate_function()
    return dict(zip(wrapped.__code__.co_freevars, wrapped.__closure__, strict=True))["compiled_generate_function"]


# Of the prompt the cache alone is read: its last block and its head are not computed.
CASES = [
    Stack("KerasHub", "stateless_call", "Gemma", partial(stateless, "Gemma", GEMMA), L, 1),
    Stack(
        "KerasHub",
        "compiled_generate_function",
        "Gemma",
        partial(generating, "Gemma", GEMMA),
        2 * L - 1,
        1,
        lines=3,
    ),
    Stack(
        "KerasHub",
        "compiled_generate_function",
        "Llama",
        partial(generating, "Llama", LLAMA),
        2 * L - 1,
        1,
        lines=3,
    ),
]
