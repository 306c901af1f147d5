"""tpu-inference: its Llama and its head as the runner calls them, over flat leaves, and its loop over decoding steps.

Model, functions, configuration and loop are tpu-inference's and vLLM's own. Two things stand in for what only a TPU
has: ``one_token_attention`` for the ragged paged attention kernel, and no options for the TPU's compiler.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from stack import Run, Stack, randomised
from tpu_inference.distributed.jax_parallel_state import init_pp_distributed_environment
from tpu_inference.kernels.ragged_paged_attention.v3 import kernel as paged
from tpu_inference.layers.common import attention_interface
from tpu_inference.layers.common.attention_metadata import AttentionMetadata
from tpu_inference.layers.common.sharding import MESH_AXIS_NAMES_2D
from tpu_inference.layers.jax.sample.sampling import sample
from tpu_inference.layers.jax.sample.sampling_metadata import TPUSupportedSamplingMetadata
from tpu_inference.models.common import model_loader
from tpu_inference.runner import decode_loop
from tpu_inference.runner.kv_cache import create_kv_caches
from transformers import LlamaConfig
from vllm.config import LoadConfig, ModelConfig, VllmConfig

import hire_xform as hx

D, M, V, L, H = 32, 96, 160, 2, 16
# Pages of keys and values that a sequence has, and tokens in each; the loop decodes into the second one.
PAGES, PAGE, STEPS = 4, 4, 6
TOKENS = jnp.asarray([5, 9], jnp.int32)
LAYERS = tuple((f"layer.{i}", i) for i in range(L))
MESH = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), MESH_AXIS_NAMES_2D)


def one_token_attention(q, k, v, cache, lengths, pages, *_, sm_scale, **options):
    """What ``ref_ragged_paged_attention`` computes of one token a sequence, in shapes that a trace has.

    The kernel copies as many pages as a value says, which neither of Pallas' interpreters takes; the reference slices
    by values.
    """
    sequences, heads = q.shape[0], k.shape[1]
    pages, at = pages.reshape(sequences, -1), lengths - 1
    page = jnp.take_along_axis(pages, at[:, None] // cache.shape[1], 1)[:, 0]
    cache = cache.at[page, at % cache.shape[1]].set(paged.merge_kv(k, v))
    held = cache[pages].reshape(sequences, pages.shape[1] * cache.shape[1], -1, cache.shape[-1])
    keys, values = (held[:, :, i : 2 * heads : 2, : q.shape[-1]].repeat(q.shape[1] // heads, 2) for i in (0, 1))
    scores = jnp.einsum("shd,skhd->shk", q, keys) * sm_scale
    scores = jnp.where(jnp.arange(keys.shape[1]) < lengths[:, None, None], scores, jnp.finfo(q.dtype).min)
    return jnp.einsum("shk,skhd->shd", jax.nn.softmax(scores), values), cache


# The stand-ins. The options are XLA's for TPUs, which its CPU backend refuses.
attention_interface.ragged_paged_attention = one_token_attention
model_loader.get_step_fn_compiler_options = decode_loop.get_step_fn_compiler_options = dict
decode_loop.get_sampling_compiler_options = dict
DECODE_CORE = decode_loop._get_decode_core()


def loaded(tied=False):
    """What ``TPUModelRunner.load_model`` keeps of a small Llama, with random weights."""
    init_pp_distributed_environment("", 0, 1, None, need_pp=False)
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(
            architectures=["LlamaForCausalLM"], vocab_size=V, hidden_size=D, intermediate_size=M, num_hidden_layers=L,
            num_attention_heads=2, num_key_value_heads=1, head_dim=H, tie_word_embeddings=tied,
        ).save_pretrained(folder)  # fmt: skip
        model = ModelConfig(model=folder, skip_tokenizer_init=True, dtype="float32", max_model_len=PAGES * PAGE)
        config = VllmConfig(model_config=model, load_config=LoadConfig(load_format="dummy"))
        with jax.set_mesh(MESH):
            made = model_loader.get_model(config, jax.random.PRNGKey(0), MESH)
    return SimpleNamespace(**{**vars(made), "state_leaves": randomised(made.state_leaves)})


def caches():
    names = [name for name, _ in LAYERS]
    return create_kv_caches(2 * PAGES, PAGE, 1, H, MESH, names, cache_dtype=jnp.float32)


def attended(length=1):
    """Two sequences of this many tokens, the last of which is to be decoded from."""
    return AttentionMetadata(
        input_positions=jnp.full(2, length - 1, jnp.int32),
        block_tables=jnp.arange(2 * PAGES, dtype=jnp.int32)[::-1],
        seq_lens=jnp.full(2, length, jnp.int32),
        query_start_loc=jnp.arange(3, dtype=jnp.int32),
        request_distribution=jnp.full(3, 2, jnp.int32),
    )


def model_arguments(leaves):
    given = attended()
    return leaves, caches(), TOKENS, given, None, given.input_positions, LAYERS, None, None, True, True


def head_arguments(leaves):
    return leaves, jnp.asarray(np.random.default_rng(0).normal(size=(2, D)), jnp.float32), None


def model():
    """The step of the model, which the runner keeps as ``model_fn``."""
    runner = loaded()
    dense = runner.model_fn

    def sparse(config):
        options = {"static_argnums": (6, 9, 10), "donate_argnums": 1}
        options["compiler_options"] = model_loader.get_step_fn_compiler_options()
        runner.model_fn = hx.sparsify(runner.model.step_fn_no_options, config=config, **options)
        return runner.model_fn

    return Run(dense, sparse, lambda: (model_arguments(runner.state_leaves), {}), (0,))


def head(tied=False):
    """What the runner keeps as ``compute_logits_fn``."""
    runner = loaded(tied)
    dense = runner.compute_logits_fn

    def sparse(config):
        stated = replace(config, rules=(*config.rules, hx.Rule("*", vocab=config.vocab)))
        runner.compute_logits_fn = hx.sparsify(dense, config=stated)
        return runner.compute_logits_fn

    return Run(
        dense, sparse, lambda: (head_arguments(runner.state_leaves), {}), (0,), lambda logits: jnp.argmax(logits, -1)
    )


def loop(tied=False):
    """``continue_decode``, which decodes several tokens in one program."""
    runner = loaded(tied)

    def sparse(config):
        core = hx.sparsify(DECODE_CORE, weights_argnames="state", config=config)
        decode_loop._get_decode_core = lambda: core
        return core

    return Run(DECODE_CORE, sparse, lambda: ((), loop_arguments(runner)), ("state",), lambda made: np.asarray(made[6]))


def loop_arguments(runner):
    """Those that ``continue_decode`` calls its program with, itself called as the runner does."""
    given = {}

    def core(**arguments):
        given.update(arguments)
        return [jnp.zeros(())] * 11

    state = decode_loop.TpuSamplingState(TOKENS, jnp.ones(2, bool), attended(), jnp.zeros((), jnp.int32))
    decode_loop._get_decode_core = lambda: core
    decode_loop.continue_decode(
        runner.state_leaves, runner.model.step_fn_no_options, runner.compute_logits_fn, sample, state, caches(),
        jnp.asarray(STEPS), STEPS, (3,), 0, jax.random.PRNGKey(0), mesh=MESH,
        sampling_metadata=TPUSupportedSamplingMetadata(), layer_name_to_kvcache_index=LAYERS,
    )  # fmt: skip
    return given


CASES = [
    Stack("tpu-inference", "model_fn", "Llama", model, L, 0, 3, 0),
    Stack("tpu-inference", "compute_logits_fn", "Llama", head, 0, 1, 2),
    Stack("tpu-inference", "compute_logits_fn", "Llama, tied", partial(head, True), 0, 1, 2),
    Stack("tpu-inference", "continue_decode", "Llama", loop, L, 1, 2),
    Stack("tpu-inference", "continue_decode", "Llama, tied", partial(loop, True), L, 1, 2),
]
