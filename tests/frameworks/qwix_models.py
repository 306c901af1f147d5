"""Qwix: models of Flax whose weights it keeps in few bits, as its users quantise them after training."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import linen_models as linen
import nnx_models
import qwix
from case import Case
from flax import nnx

D, M, V, L = linen.D, linen.M, linen.V, linen.L

EIGHT = {"weight_qtype": jnp.int8}
FOUR_IN_GROUPS = {"weight_qtype": jnp.int4, "tile_size": 8}


def provider(modules=".*", **kind):
    return qwix.PtqProvider([qwix.QuantizationRule(module_path=modules, **kind)])


def decoder(kind=EIGHT, modules=".*", **options):
    """A decode step of integers and scales, which take the place of the kernels."""
    model = linen.Decoder(**options)
    params, cache = linen.initial(model, linen.PROMPT)
    quantised = qwix.quantize_model(model, provider(modules, **kind))
    # Of layers that are not scanned: those of a stack are quantised one by one.
    plain = qwix.quantize_model(linen.Decoder(**{**options, "layers": linen.unrolled}), provider(modules, **kind))
    shapes = jax.eval_shape(plain.init, jax.random.key(0), linen.PROMPT)["params"]
    whole = {name: tree for name, tree in params.items() if name != "layers"}
    made = qwix.quantize_params(whole, {name: shapes[name] for name in whole})
    if "layers" in params:
        made["layers"] = jax.vmap(lambda one: qwix.quantize_params(one, shapes["layer_0"]))(params["layers"])
    return linen.decode_step(quantised), (made, cache, linen.TOKENS)


def of_nnx(kind=EIGHT, **options):
    """The same of NNX, whose parameters are quantised with the model."""
    model = qwix.quantize_model(nnx_models.decoder(**options), provider(**kind), linen.TOKENS)
    graph, params, cache = nnx.split(model, nnx.Param, ...)
    return partial(nnx_models.graph_first, graph), (params, cache, linen.TOKENS)


def of(model, nesting, build, ffn, vocab, refusals, **rest):
    return Case("Qwix", model, nesting, build, ffn, vocab, refusals, **rest)


CASES = [
    of("decoder, int8", "Linen", decoder, L, 1, 4 * L),
    of("decoder, SwiGLU, int8", "Linen, nn.scan", partial(decoder, ffn=linen.SwigluFfn, layers=linen.scanned), 1, 1, 4),
    of("decoder, SwiGLU, int4 in groups", "Linen", partial(decoder, FOUR_IN_GROUPS, ffn=linen.SwigluFfn), L, 1, 4 * L),
    of("decoder, nn.Einsum FFN, int8", "Linen", partial(decoder, ffn=linen.EinsumFfn), L, 1, 4 * L),
    of("decoder, DenseGeneral FFN, int8", "Linen", partial(decoder, ffn=linen.HeadedFfn), L, 1, 4 * L),
    of("decoder, only FFNs in int8", "Linen", partial(decoder, modules=".*ReluFfn.*"), L, 1, 4 * L),
    of("decoder, int8", "NNX", of_nnx, L, 1, 4 * L),
    of("decoder, ReLU, int4 in groups", "NNX", partial(of_nnx, FOUR_IN_GROUPS), L, 1, 4 * L),
    # Activations are quantised at run time: what multiplies them is no product of floating-point data.
    of(
        "decoder, int8 times int8",
        "Linen",
        partial(decoder, {"weight_qtype": jnp.int8, "act_qtype": jnp.int8}),
        L,
        1,
        6 * L + 1,
        missed=("its activations are quantised at run time",) * (L + 1),
    ),
]
