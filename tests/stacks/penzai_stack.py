"""penzai: a decoding step of a model that keeps its cache in variables, and a model without a cache."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from penzai import pz
from penzai.models.transformer import sampling_mode
from penzai.models.transformer.variants import llamalike_common
from stack import Run, Stack, randomised

import hire_xform as hx

D, M, V, L = 32, 96, 160, 2


def model_of(**options):
    config = llamalike_common.LlamalikeTransformerConfig(
        num_kv_heads=1,
        query_head_multiplier=2,
        embedding_dim=D,
        projection_dim=16,
        mlp_hidden_dim=M,
        num_decoder_blocks=L,
        vocab_size=V,
        mlp_variant="swiglu",
        tie_embedder_and_logits=False,
        **options,
    )
    return llamalike_common.build_llamalike_transformer(config, init_base_rng=jax.random.key(0))


def step(**options):
    cached = sampling_mode.KVCachingTransformerLM.from_uncached(model_of(**options), cache_len=16, batch_axes={"b": 2})
    model, variables = pz.unbind_variables(cached, freeze=True)
    params = randomised([v for v in variables if isinstance(v, pz.ParameterValue)])
    state = [v for v in variables if not isinstance(v, pz.ParameterValue)]
    token = pz.nx.wrap(jnp.asarray([[5], [9]], jnp.int32)).tag("b", "seq")

    def decode(params, state, token):
        params, state = (tuple(v.unfreeze_as_copy() for v in part) for part in (params, state))
        bound = pz.bind_variables(model, (*params, *state))
        logits = bound(token)
        best = pz.nx.nmap(jnp.argmax)(logits.untag("vocabulary"))
        return best, [v.freeze() for v in state]

    def sparse(config):
        return hx.sparsify(decode, config=config)

    def call():
        return (params, state, token), {}

    return Run(jax.jit(decode), sparse, call, (0,), lambda made: made[0].unwrap("b", "seq"))


CASES = [
    Stack("penzai", "KVCachingTransformerLM", "Llama", step, L, 1, 8),
    Stack("penzai", "KVCachingTransformerLM", "Llama, layer stack", partial(step, use_layer_stack=True), 1, 1, 8),
]
