"""The decode steps of ``tests/models.py``, in plain JAX."""

from functools import partial

import jax.numpy as jnp
import models
from case import Case

LABELS = {
    "unrolled": ("decoder", "layers unrolled"),
    "tied": ("decoder, tied head", "layers unrolled"),
    "scanned": ("decoder", "lax.scan"),
    "scanned_tied": ("decoder, tied head", "lax.scan"),
    "jitted_layers": ("decoder", "jitted layers"),
    "jit_scan_jit": ("decoder", "jit of scan of jit"),
    "remat_scan": ("decoder", "scan of checkpoint"),
    "remat_unrolled": ("decoder", "checkpoint of jit"),
    "indexed": ("decoder", "fori_loop, w[i]"),
    "taken": ("decoder", "fori_loop, jnp.take(w, i)"),
    "while_indexed": ("decoder", "while_loop, dynamic_index_in_dim(w, i)"),
    "generate": ("generation, greedy", "while_loop"),
    "generate_carrying": ("generation, greedy", "while_loop that carries the weights"),
    "generate_jit_scan": ("generation, greedy", "while_loop of jit of scan of jit"),
    "generate_sampling": ("generation, sampled", "while_loop until all have ended"),
    "conditional": ("decoder", "FFN in a cond"),
    "custom_jvp": ("decoder", "FFN in a custom_jvp"),
    "custom_vjp": ("decoder", "FFN in a custom_vjp"),
}


def build(model):
    tokens = jnp.asarray([3, 5, 8], jnp.int32)
    return model.step, (model.make_params(), models.make_cache(3), tokens, jnp.zeros(models.D))


CASES = [
    Case("plain JAX", *LABELS[model.name], partial(build, model), model.ffn, model.vocab, model.refusals)
    for model in models.MODELS
]
