"""The published Flax models of `transformers`, from small random configurations; nothing is downloaded.

Weights are arguments (``params=``), as in every example of that library. A decode step takes one token and the cache
that ``init_cache`` makes; ``generate`` is the library's own loop.
"""

import os
from functools import partial

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from case import Case
from transformers.models.t5 import modeling_flax_t5

# The Flax models are no longer maintained, which each of them says once.
transformers.utils.logging.set_verbosity_error()


class OlderNumpy:
    """``jax.numpy`` with the name that an argument of ``clip`` had when T5 was written; it is gone since."""

    def __getattr__(self, name):
        return getattr(jnp, name)

    @staticmethod
    def clip(x, a_max):
        return jnp.clip(x, max=a_max)


modeling_flax_t5.jnp = OlderNumpy()

D, M, V, L, BATCH, PROMPT, LENGTH = 32, 80, 131, 2, 2, 4, 8
SOURCE = 5  # tokens an encoder reads

SMALL = {
    "GPT2": {"n_embd": D, "n_inner": M, "n_layer": L, "n_head": 2, "n_positions": 16},
    "GPTJ": {"n_embd": D, "n_inner": M, "n_layer": L, "n_head": 2, "n_positions": 16, "rotary_dim": 8},
    "GPTNeo": {
        "hidden_size": D,
        "intermediate_size": M,
        "num_layers": L,
        "attention_types": [[["global", "local"], 1]],
        "num_heads": 2,
        "max_position_embeddings": 16,
    },
    "OPT": {
        "hidden_size": D,
        "ffn_dim": M,
        "num_hidden_layers": L,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "word_embed_proj_dim": D,
    },
    "Bloom": {"hidden_size": D, "n_layer": L, "n_head": 2},
    "Llama": {
        "hidden_size": D,
        "intermediate_size": M,
        "num_hidden_layers": L,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 16,
    },
    "T5": {
        "d_model": D,
        "d_ff": M,
        "d_kv": 8,
        "num_heads": 4,
        "num_layers": L,
        "num_decoder_layers": L,
        "decoder_start_token_id": 0,
    },
    "Bart": {
        "d_model": D,
        "encoder_layers": L,
        "decoder_layers": L,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": M,
        "decoder_ffn_dim": M,
        "max_position_embeddings": 16,
    },
    "Bert": {
        "hidden_size": D,
        "intermediate_size": M,
        "num_hidden_layers": L,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
    },
}
SMALL["Whisper"] = {**SMALL["Bart"], "max_source_positions": SOURCE, "max_target_positions": 16, "num_mel_bins": 4}
del SMALL["Whisper"]["max_position_embeddings"]
SMALL["Mistral"] = SMALL["Llama"]
SMALL["Gemma"] = {**SMALL["Llama"], "head_dim": 16, "max_position_embeddings": 32}
HEADS = {
    "Whisper": "ForConditionalGeneration",
    "GPT2": "LMHeadModel",
    "Bert": "ForMaskedLM",
    "T5": "ForConditionalGeneration",
    "Bart": "ForConditionalGeneration",
}


def make(family, **changes):
    """The published model, without weights."""
    options = {key: changes.pop(key) for key in ("gradient_checkpointing", "dtype") if key in changes}
    config = getattr(transformers, f"{family}Config")(**{"vocab_size": V, **SMALL[family], **changes})
    published = getattr(transformers, f"Flax{family}{HEADS.get(family, 'ForCausalLM')}")
    return published(config, _do_init=False, **options)


def random_params(model, seed=0):
    """Weights of the model's shapes: matrices of about unit gain, vectors near what the model starts them at."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        name = path[-1].key
        scale = leaf.shape[-1 if name == "embedding" else 0] ** -0.5 if len(leaf.shape) > 1 else 0.1
        start = 1.0 if name in ("scale", "weight") and len(leaf.shape) == 1 else 0.0
        return jnp.asarray(start + scale * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, dict(model.params_shape_tree))


def some_tokens(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).integers(3, V, shape), jnp.int32)


def partly_filled(cache, seed=2):
    """A cache of these shapes with ``PROMPT`` tokens in it."""
    rng = np.random.default_rng(seed)

    def one(leaf):
        return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) if leaf.shape else jnp.asarray(PROMPT, leaf.dtype)

    return jax.tree.map(one, cache)


def forward(family, **changes):
    """All tokens of a prompt at once."""
    model = make(family, **changes)

    def run(params, input_ids):
        return model(input_ids, params=params).logits

    return run, (random_params(model), some_tokens(BATCH, PROMPT))


def decode(family, positions=True, **changes):
    """One token, with the keys and values of those before it."""
    model = make(family, **changes)

    def step(params, cache, token, position):
        mask = jnp.ones((BATCH, LENGTH), "i4")
        more = {"position_ids": position} if positions else {}
        out = model(token, attention_mask=mask, params=params, past_key_values=cache, **more)
        return out.logits, out.past_key_values

    cache = partly_filled(jax.eval_shape(lambda: model.init_cache(BATCH, LENGTH)))
    return step, (random_params(model), cache, some_tokens(BATCH, 1), jnp.full((BATCH, 1), PROMPT, jnp.int32))


def model_itself(family, **changes):
    """No function around the model: its own call, weights as its fourth argument."""
    model = make(family, **changes)
    return model, (some_tokens(BATCH, PROMPT), None, None, random_params(model))


def trained_step(family, **changes):
    """With dropout, as in training; T5 has one on the hidden units."""
    model = make(family, **changes)

    def run(params, input_ids, key):
        return model(input_ids, decoder_input_ids=input_ids, params=params, dropout_rng=key, train=True).logits

    return run, (random_params(model), some_tokens(BATCH, PROMPT), jax.random.PRNGKey(0))


def sixteen_bit(family, **changes):
    """Weights and computation in bfloat16."""
    model = make(family, dtype=jnp.bfloat16, **changes)

    def run(params, input_ids):
        return model(input_ids, params=params).logits

    return run, (model.to_bf16(random_params(model)), some_tokens(BATCH, PROMPT))


def apply_module(family, **changes):
    """The Linen module alone, cache as a mutable collection."""
    model = make(family, **changes)

    def step(params, cache, token, position):
        mask = jnp.ones((BATCH, LENGTH), "i4")
        out, changed = model.module.apply(
            {"params": params, "cache": cache}, token, mask, position, mutable=["cache"], return_dict=False
        )
        return out[0], changed["cache"]

    _, args = decode(family, **changes)
    return step, args


def encode_decode(family, **changes):
    """Encoder and decoder in one call."""
    model = make(family, **changes)

    def run(params, input_ids, decoder_input_ids):
        return model(input_ids, decoder_input_ids=decoder_input_ids, params=params).logits

    return run, (random_params(model), some_tokens(BATCH, SOURCE), some_tokens(BATCH, PROMPT))


def decode_from_encoded(family, positions=False, **changes):
    """One token of the decoder, given what the encoder made."""
    model = make(family, **changes)

    def step(params, encoded, cache, token):
        more = {"decoder_position_ids": jnp.full((BATCH, 1), PROMPT)} if positions else {}
        out = model.decode(
            token,
            (encoded,),
            decoder_attention_mask=jnp.ones((BATCH, LENGTH), "i4"),
            past_key_values=cache,
            params=params,
            **more,
        )
        return out.logits, out.past_key_values

    encoded = jnp.asarray(np.random.default_rng(3).normal(size=(BATCH, SOURCE, D)), jnp.float32)
    cache = partly_filled(jax.eval_shape(lambda e: model.init_cache(BATCH, LENGTH, (e,)), encoded))
    return step, (random_params(model), encoded, cache, some_tokens(BATCH, 1))


def generate(family, options=(), **changes):
    """The library's own loop: a prompt, then three more tokens."""
    model = make(family, **changes)
    how = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1, **dict(options)}

    def run(params, input_ids):
        return model.generate(input_ids, params=params, **how).sequences

    return run, (random_params(model), some_tokens(BATCH, PROMPT))


def generate_itself(family, **changes):
    """No function around ``generate``: its own call, weights as its fifth argument."""
    model = make(family, **changes)
    how = transformers.GenerationConfig(max_new_tokens=3, pad_token_id=0, eos_token_id=1)
    return model.generate, (some_tokens(BATCH, PROMPT), how, None, True, random_params(model))


def case(model, nesting, build, family, ffn, vocab, refusals, **changes):
    about = {key: changes.pop(key) for key in ("weights", "jit", "tolerance") if key in changes}
    about["options"] = about.pop("jit", ())
    return Case("transformers", model, nesting, partial(build, family, **changes), ffn, vocab, refusals, **about)


# Refusals: GPT-2 and BLOOM have one product for query, key and value and one for the output of attention; all others
# have four, and their decoders four more to what was encoded.
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
SAMPLING = (("do_sample", True), ("top_k", 20), ("top_p", 0.9), ("temperature", 0.7))
PREFILL, STEP, LOOP = "prompt", "one token, cache", "generate"

CASES = [
    case("GPT-2, tied head", PREFILL, forward, "GPT2", L, 1, 2 * L, **TIED),
    case("GPT-2, tied head", STEP, decode, "GPT2", L, 1, 2 * L, **TIED),
    case("GPT-2", STEP, decode, "GPT2", L, 1, 2 * L, **UNTIED),
    case("GPT-2, tied head", LOOP, generate, "GPT2", 2 * L, 2, 2 * 2 * L, **TIED),
    case("OPT, tied head", PREFILL, forward, "OPT", L, 1, 4 * L, **TIED),
    case("OPT, tied head", STEP, decode, "OPT", L, 1, 4 * L, **TIED),
    case("OPT", STEP, decode, "OPT", L, 1, 4 * L, **UNTIED),
    case("OPT", "module.apply", apply_module, "OPT", L, 1, 4 * L, **UNTIED),
    # As OPT-350M: norms after, embeddings narrower than the model, with a projection on either side of the layers.
    case(
        "OPT, projected embeddings",
        STEP,
        decode,
        "OPT",
        L,
        1,
        4 * L + 2,
        do_layer_norm_before=False,
        word_embed_proj_dim=16,
        **TIED,
    ),
    case("OPT", LOOP, generate, "OPT", 2 * L, 2, 2 * 4 * L, **UNTIED),
    case("OPT", "generate, beams", generate, "OPT", 2 * L, 2, 2 * 4 * L, options=(("num_beams", 2),), **UNTIED),
    case("OPT", "generate, sampling", generate, "OPT", 2 * L, 2, 2 * 4 * L, options=SAMPLING, **UNTIED),
    case("OPT", "the model itself", model_itself, "OPT", L, 1, 4 * L, weights=3, **UNTIED),
    case(
        "OPT",
        "model.generate itself",
        generate_itself,
        "OPT",
        2 * L,
        2,
        2 * 4 * L,
        weights=4,
        jit=(("static_argnums", (1, 3)),),
        **UNTIED,
    ),
    case("OPT, bfloat16", PREFILL, sixteen_bit, "OPT", L, 1, 4 * L, tolerance=4e-2, **TIED),
    case("Llama, bfloat16", PREFILL, sixteen_bit, "Llama", L, 1, 4 * L, tolerance=4e-2),
    case("Llama", PREFILL, forward, "Llama", L, 1, 4 * L),
    case("Llama", STEP, decode, "Llama", L, 1, 4 * L),
    case("Mistral", STEP, decode, "Mistral", L, 1, 4 * L),
    case("Gemma, tied head", PREFILL, forward, "Gemma", L, 1, 4 * L, **TIED),
    case("Gemma, tied head", STEP, decode, "Gemma", L, 1, 4 * L, **TIED),
    case("Gemma", STEP, decode, "Gemma", L, 1, 4 * L, **UNTIED),
    case("GPT-J", STEP, decode, "GPTJ", L, 1, 4 * L, **UNTIED),
    case("GPT-Neo, tied head", STEP, decode, "GPTNeo", L, 1, 4 * L, **TIED),
    case("BLOOM, tied head", STEP, decode, "Bloom", L, 1, 2 * L, positions=False, **TIED),
    # The head of BERT is a product of its own (no block: a norm follows it), then the vocabulary.
    case("BERT, tied head", PREFILL, forward, "Bert", L, 1, 4 * L + 1, **TIED),
    case("BERT", PREFILL, forward, "Bert", L, 1, 4 * L + 1, **UNTIED),
    case("T5, ReLU, tied head", PREFILL, encode_decode, "T5", 2 * L, 1, 12 * L, feed_forward_proj="relu", **TIED),
    case("T5, ReLU, tied head", STEP, decode_from_encoded, "T5", L, 1, 8 * L, feed_forward_proj="relu", **TIED),
    case("T5, gated GELU", STEP, decode_from_encoded, "T5", L, 1, 8 * L, feed_forward_proj="gated-gelu", **UNTIED),
    case(
        "T5, gated GELU",
        "prompt, nn.remat",
        encode_decode,
        "T5",
        2 * L,
        1,
        12 * L,
        feed_forward_proj="gated-gelu",
        gradient_checkpointing=True,
        **UNTIED,
    ),
    case("T5, ReLU, tied head", LOOP, generate, "T5", L + L, 1, 4 * L + 8 * L, feed_forward_proj="relu", **TIED),
    case("T5, ReLU", "dropout", trained_step, "T5", 2 * L, 1, 12 * L, feed_forward_proj="relu", **UNTIED),
    case("Whisper, tied head", STEP, decode_from_encoded, "Whisper", L, 1, 8 * L, positions=True, **TIED),
    case("BART, tied head", STEP, decode_from_encoded, "Bart", L, 1, 8 * L, positions=True, **TIED),
]
