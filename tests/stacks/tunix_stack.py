"""tunix: the sampler's decode loop, and one step of it, on its own models."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import qwix
from flax import nnx
from stack import Run, Stack, randomised
from tunix.generate import sampler as sampler_lib
from tunix.models.gemma3 import model as gemma3
from tunix.models.llama3 import model as llama3

import hire_xform as hx

D, M, V, L, H, STEPS = 32, 96, 160, 2, 16, 12


class Words:
    """A tokenizer of numbers."""

    def encode(self, text, **_):
        return [int(word) for word in text.split()]

    def decode(self, ids, **_):
        return " ".join(map(str, ids))

    def bos_id(self):
        return 1

    def eos_id(self):
        return 2

    def pad_id(self):
        return 0


def llama(**options):
    config = llama3.ModelConfig(
        num_layers=L, vocab_size=V, embed_dim=D, hidden_dim=M, num_heads=2, head_dim=H, num_kv_heads=1,
        rope_theta=10_000, norm_eps=1e-5, **options,
    )  # fmt: skip
    return llama3.Llama3(config, rngs=nnx.Rngs(0))


def gemma():
    config = gemma3.ModelConfig(
        num_layers=L, num_embed=V, embed_dim=D, hidden_dim=M, num_heads=2, head_dim=H, num_kv_heads=1,
        sliding_window_size=8, param_dtype=jnp.float32,
    )  # fmt: skip
    return gemma3.Gemma3(config, rngs=nnx.Rngs(0))


def with_adapters(make):
    """LoRA on the products of the blocks and of attention, as tunix's examples have it."""
    model = make()
    found = ".*q_proj|.*kv_einsum|.*gate_proj|.*up_proj|.*down_proj"
    provider = qwix.LoraProvider(module_path=found, rank=4, alpha=2.0)
    return qwix.apply_lora_to_model(model, provider, **model.get_model_input())


def sampler_of(model):
    nnx.update(model, randomised(nnx.state(model, nnx.Param)))
    nnx.update(model, randomised(nnx.state(model, nnx.LoRAParam), seed=1))
    cache = sampler_lib.CacheConfig(cache_size=16, num_layers=L, num_kv_heads=1, head_dim=H)
    sampler = sampler_lib.Sampler(model, Words(), cache)
    sampler.eos_ids = jnp.array([2])
    return sampler


def prefilled(sampler):
    """The state after a prompt."""
    prompt = jnp.asarray([[1, 5, 9, 14], [0, 1, 30, 7]], jnp.int32)
    state = sampler.init_sample_state(
        prompt, total_sampling_steps=STEPS, include_logits=False, forbidden_token_ids=None, temperature=0.0,
        top_p=None, top_k=None, seed=jax.random.PRNGKey(0), beam_size=None,
    )  # fmt: skip
    return sampler._compiled_prefill_fn(sampler._flattened_transformer_state, state)


def decode(make):
    sampler = sampler_of(make())

    dense = sampler._compiled_decode_fn

    def sparse(config):
        sampler._compiled_decode_fn = hx.sparsify(dense, config=config)
        return sampler._compiled_decode_fn

    def call():
        return (sampler._flattened_transformer_state, prefilled(sampler)), {}

    return Run(dense, sparse, call, (0,), lambda state: state.token_buffer)


def one_step(make):
    sampler = sampler_of(make())

    def sparse(config):
        return hx.sparsify(sampler._sample_step, config=config)

    def call():
        return (sampler._flattened_transformer_state, prefilled(sampler)), {}

    return Run(jax.jit(sampler._sample_step), sparse, call, (0,), lambda state: state.token_buffer)


CASES = [
    Stack("tunix", "Sampler._decode_fn", "llama3", partial(decode, llama), L, 1),
    Stack("tunix", "Sampler._decode_fn", "gemma3", partial(decode, gemma), L, 1),
    Stack("tunix", "Sampler._decode_fn", "llama3, LoRA", partial(decode, partial(with_adapters, llama)), L, 1),
    Stack("tunix", "Sampler._sample_step", "llama3, tied", partial(one_step, partial(llama, weight_tying=True)), L, 1),
]
