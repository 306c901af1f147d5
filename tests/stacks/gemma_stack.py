"""gemma: the sampler's loop, and one step of it, on its own models."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from gemma import gm
from gemma.gm.nn import _transformer as gemma3
from gemma.gm.nn import config as config_lib
from gemma.gm.text import _sampler_loop, _sampling
from stack import Run, Stack, randomised

import hire_xform as hx

D, M, V, L, LENGTH = 32, 96, 160, 2, 16


class Small(gemma3.Transformer):
    """Gemma 3 of two layers."""

    config: config_lib.TransformerConfig = config_lib.TransformerConfig(
        num_embed=V,
        embed_dim=D,
        hidden_dim=M,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        final_logit_softcap=30.0,
        attention_types=(config_lib.AttentionType.GLOBAL,) * L,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attn_logits_soft_cap=None,
    )


def loop_of(model):
    return _sampler_loop.SamplerLoop(
        model=model,
        end_tokens=(1,),
        forbidden_tokens=(3,),
        sampling=_sampling.Greedy(),
        cache_length=LENGTH,
        special_tokens=gm.text.Gemma3Tokenizer.special_tokens,
    )


def params_of(model):
    return randomised(model.init(jax.random.key(0), tokens=jnp.ones((2, 1), jnp.int32))["params"])


def state_of(model):
    """The state before the first token."""
    return _sampler_loop.SamplingState(
        step=jnp.asarray(0, jnp.int32),
        done=jnp.zeros((2,), bool),
        last_token=jnp.asarray([5, 9], jnp.int32),
        last_token_pos=jnp.zeros((2,), jnp.int32),
        predicted_tokens=jnp.zeros((2, 8), jnp.int32),
        cache=model.init_cache(batch_size=2, dtype=jnp.float32, cache_length=LENGTH),
        rng=jax.random.PRNGKey(0),
        init_cache_length=jnp.asarray(0, jnp.int32),
        full_attention_mask=jnp.ones((2, LENGTH), bool),
    )


def step(model):
    loop, params = loop_of(model), params_of(model)

    def sparse(config):
        return hx.sparsify(loop._sample_step, weights_argnames="params", config=config)

    def call():
        return (state_of(model),), {"params": params}

    return Run(loop._sample_step, sparse, call, ("params",), lambda state: state.last_token)


def loop(model):
    loop, params = loop_of(model), params_of(model)

    dense = _sampler_loop.SamplerLoop._sample_loop

    def sparse(config):
        return hx.sparsify(dense, weights_argnames="params", config=config)

    def call():
        return (loop,), {"params": params, "state": state_of(model), "max_new_tokens": jnp.asarray(8)}

    return Run(dense, sparse, call, ("params",), lambda state: np.asarray(state.predicted_tokens))


CASES = [
    Stack("gemma", "SamplerLoop._sample_step", "Gemma 3", partial(step, Small(dtype=jnp.float32)), L, 1),
    Stack("gemma", "SamplerLoop._sample_loop", "Gemma 3", partial(loop, Small(dtype=jnp.float32)), L, 1),
]
