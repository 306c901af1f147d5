"""MaxText: the engine's decoding step, its layers scanned or unrolled."""

from __future__ import annotations

import os
from functools import partial

import jax
import jax.numpy as jnp
import maxtext
import numpy as np
from maxtext.configs import pyconfig
from maxtext.inference.maxengine import maxengine
from stack import Run, Stack, randomised

import hire_xform as hx

D, M, V, L = 32, 96, 160, 2
SETTINGS = {
    "run_name": "test",
    "per_device_batch_size": 2.0,
    "enable_checkpointing": False,
    "skip_jax_distributed_system": True,
    "attention": "dot_product",
    "max_prefill_predict_length": 4,
    "max_target_length": 16,
    "base_num_decoder_layers": L,
    "base_emb_dim": D,
    "base_mlp_dim": M,
    "base_num_query_heads": 2,
    "base_num_kv_heads": 2,
    "head_dim": 16,
    "vocab_size": V,
    "dtype": "float32",
    "weight_dtype": "float32",
}

if not jax.tree_util.all_leaves([maxengine.engine_api.ResultTokens(data=jnp.ones(1))]):
    pass  # JetStream's own
else:
    # What stands in for it where JetStream is not installed is no tree of arrays.
    fields = "tokens_idx", "valid_idx", "length_idx", "samples_per_slot"
    jax.tree_util.register_dataclass(maxengine.engine_api.ResultTokens, ["data", "log_prob"], fields)


def step(**options):
    base = os.path.join(os.path.dirname(maxtext.__file__), "configs", "base.yml")
    engine = maxengine.MaxEngine(pyconfig.initialize(["decode", base], **SETTINGS, **options))
    params = randomised(engine.load_params(rng=jax.random.PRNGKey(0)))

    dense = engine._generate_jit

    def sparse(config):
        engine._generate_jit = hx.sparsify(dense, config=config)
        return engine._generate_jit

    def call():
        state = engine.init_decode_state(rng=jax.random.PRNGKey(1))
        state["tokens"] = jnp.asarray([[5], [9]], jnp.int32)
        return (params, state), {"rng": jax.random.PRNGKey(2)}

    return Run(dense, sparse, call, (0,), lambda made: np.asarray(made[0]["tokens"]))


CASES = [
    Stack("MaxText", "MaxEngine._generate_jit", "Llama, scanned", partial(step, scan_layers=True), 1, 1),
    Stack("MaxText", "MaxEngine._generate_jit", "Llama, unrolled", partial(step, scan_layers=False), L, 1),
    Stack("MaxText", "MaxEngine._generate_jit", "Llama, fused MLP", partial(step, fused_mlp=True), 1, 1),
]
