"""Qwix: int8 weights of a Flax module, by its own post-training quantisation."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.speed.cases import Case, Weights, model
from benchmarks.speed.peers import INT8, Kernel, Left, Settings
from benchmarks.speed.peers.on_jax import OPS, columns_of, copies, kernel, nbytes, placed
from hire_xform.lowering.xla.huge_pages import on_huge_pages


def missing() -> str | None:
    """What to install."""
    found = importlib.util.find_spec("qwix") and importlib.util.find_spec("flax")
    return None if found else "pip install 'hire-xform[peers]'"


def _module(case: Case) -> Any:
    from flax import linen as nn

    class Model(nn.Module):
        """The case's model, of ``nn.Dense``."""

        @nn.compact
        def __call__(self, rest: dict[str, Any], x: jax.Array) -> jax.Array:
            def product(x: jax.Array, name: str) -> jax.Array:
                shape = case.shapes[name]
                features = shape[1] if name.endswith("down") else shape[0]
                return nn.Dense(features, use_bias=False, name=name.replace(".", "_"))(x)

            return model(case, OPS, product, rest, x)

    return Model()


def kernels(weights: Weights, settings: Settings) -> Iterator[Kernel | Left]:
    """Weights alone in 8 bits, and inputs too."""
    import qwix

    case = weights.case
    # Of whole steps and of several tokens there is no more to learn: it is far from memory's speed at one.
    if case.stored != "float32" or case.kind == "step" or case.tokens > 1:
        return
    for name, inputs in (("Qwix int8 weights", None), ("Qwix int8 weights and inputs", jnp.int8)):
        reason = settings.short_of(5 * case.elements)
        if reason:
            yield Left(name, reason)
            continue
        rule = qwix.QuantizationRule(weight_qtype=jnp.int8, act_qtype=inputs)
        quantized = qwix.quantize_model(_module(case), qwix.PtqProvider([rule]))
        rest = {**weights.biases, **weights.cache}
        shapes = jax.eval_shape(quantized.init, jax.random.key(0), rest, weights.inputs[0])["params"]
        full = {key.replace(".", "_"): {"kernel": columns_of(key, w)} for key, w in placed(weights).items()}
        packed = jax.block_until_ready(qwix.quantize_params(full, shapes))
        del full
        on_huge_pages(packed)
        step = jax.jit(lambda params, rest, x, quantized=quantized: quantized.apply({"params": params}, rest, x))
        read = nbytes(packed)
        yield kernel(name, step, copies(packed, read, settings), weights, read, INT8)
