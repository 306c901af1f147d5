"""The decode steps of ``tests/models.py``, in plain JAX."""

from functools import partial

import jax
import jax.numpy as jnp
import models
import numpy as np
from case import Case
from jax.sharding import Mesh, PartitionSpec

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


def build_mapped(model):
    """The decode step as the body of a shard_map that cuts the tokens, over the devices there are of one axis."""
    fun, arguments = build(model)
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    whole, cut = PartitionSpec(), PartitionSpec("data")
    cache = {"k": PartitionSpec(None, "data"), "v": PartitionSpec(None, "data"), "pos": whole}
    mapped = jax.shard_map(fun, mesh=mesh, in_specs=(whole, cache, cut, whole), out_specs=(cut, cache))
    return mapped, arguments


CASES += [
    Case(
        "plain JAX",
        "decoder",
        f"shard_map of {LABELS[m.name][1]}",
        partial(build_mapped, m),
        m.ffn,
        m.vocab,
        m.refusals,
    )
    for m in models.MODELS
    if m.name in ("scanned", "indexed", "remat_unrolled")
]
