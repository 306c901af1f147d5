"""The model of `benchmarks/tpu.py`: shapes of its weights, its decode step, and both over four chips."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hire_xform.dump.targets import Target

BF16, F32, INT8, UINT8, INT32 = jnp.bfloat16, jnp.float32, jnp.int8, jnp.uint8, jnp.int32
# The model: Llama 3.2 1B's shapes, with a ReLU at the gate, as HiRE's models have.
D, M, LAYERS, VOCAB, HEADS, KV_HEADS, WIDTH, CONTEXT = 2048, 8192, 16, 128256, 32, 8, 64, 1024


def weights(stacked: bool, int8: bool = False) -> dict[str, Any]:
    """Shapes of the model's, in bf16, layers stacked or a list of them; the head is the embedding.

    With ``int8`` matrices are int8, with a scale of each unit, and so is a head of its own, with one of each row. Of an
    int8 embedding XLA copies all to look up one row.
    """

    def layer(*stack: int) -> dict[str, Any]:
        shapes = {
            "q": (D, HEADS * WIDTH),
            "k": (D, KV_HEADS * WIDTH),
            "v": (D, KV_HEADS * WIDTH),
            "o": (HEADS * WIDTH, D),
            "gate": (D, M),
            "up": (D, M),
            "down": (M, D),
            "attention_norm": (D,),
            "ffn_norm": (D,),
        }
        return {name: kept((*stack, *shape), -2) for name, shape in shapes.items()}

    def kept(shape: tuple[int, ...], axis: int) -> Any:
        if not int8 or min(shape[-2:]) <= LAYERS or len(shape) == 1:
            return jax.ShapeDtypeStruct(shape, BF16)
        scale = tuple(1 if i == len(shape) + axis else n for i, n in enumerate(shape))
        return jax.ShapeDtypeStruct(shape, INT8), jax.ShapeDtypeStruct(scale, BF16)

    layers = layer(LAYERS) if stacked else [layer() for _ in range(LAYERS)]
    of = jax.ShapeDtypeStruct
    head = {"head": kept((VOCAB, D), -1)} if int8 else {}
    return {"layers": layers, "embedding": of((VOCAB, D), BF16), "norm": of((D,), BF16), **head}


def matrix(kept: Any) -> jax.Array:
    """A matrix as it is multiplied with."""
    return kept[0].astype(BF16) * kept[1] if isinstance(kept, tuple) else kept


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """RMS norm, in f32."""
    wide = x.astype(F32)
    return (wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-5)).astype(x.dtype) * scale


def rotated(x: jax.Array, position: jax.Array) -> jax.Array:
    """Rotary embeddings of ``[T, heads, WIDTH]`` at one position."""
    angles = position * 5e5 ** (-jnp.arange(0, WIDTH, 2) / WIDTH)
    first, second = jnp.split(x.astype(F32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def decode_step(w: dict[str, Any], cache: tuple[Any, Any], token: jax.Array, position: jax.Array) -> Any:
    """The next token of one sequence, and the cache with this one in it."""

    def attention(x: jax.Array, layer: dict[str, Any], number: jax.Array, keys: jax.Array, values: jax.Array) -> Any:
        q = rotated((x @ matrix(layer["q"])).reshape(KV_HEADS, HEADS // KV_HEADS, WIDTH), position)
        k = rotated((x @ matrix(layer["k"])).reshape(1, KV_HEADS, WIDTH), position)
        v = (x @ matrix(layer["v"])).reshape(1, KV_HEADS, WIDTH)
        # In place: all layers' keys and values are carried.
        keys = lax.dynamic_update_slice(keys, k[None], (number, position, 0, 0))
        values = lax.dynamic_update_slice(values, v[None], (number, position, 0, 0))
        own, mixed = (lax.dynamic_index_in_dim(a, number, keepdims=False) for a in (keys, values))
        logits = jnp.einsum("hgw,thw->hgt", q, own, preferred_element_type=F32) * WIDTH**-0.5
        logits = jnp.where(jnp.arange(CONTEXT) <= position, logits, -jnp.inf)
        mixed = jnp.einsum("hgt,thw->hgw", jax.nn.softmax(logits).astype(BF16), mixed)
        return mixed.reshape(1, -1) @ matrix(layer["o"]), keys, values

    def one(carry: Any, inputs: Any) -> Any:
        (x, keys, values), (layer, number) = carry, inputs
        mixed, keys, values = attention(norm(x, layer["attention_norm"]), layer, number, keys, values)
        x = x + mixed
        inner = norm(x, layer["ffn_norm"])
        gate, up, down = (matrix(layer[name]) for name in ("gate", "up", "down"))
        x = x + (jax.nn.relu(inner @ gate) * (inner @ up)) @ down
        return (x, keys, values), None

    carry: Any = w["embedding"][token], *cache
    if isinstance(w["layers"], list):
        for number, layer in enumerate(w["layers"]):
            carry, _ = one(carry, (layer, jnp.int32(number)))
    else:
        carry, _ = lax.scan(one, carry, (w["layers"], jnp.arange(LAYERS)))
    x, *kept = carry
    return jnp.argmax(norm(x, w["norm"]) @ matrix(w.get("head", w["embedding"])).T, axis=-1), tuple(kept)


def operands(stacked: bool, int8: bool) -> tuple[Any, ...]:
    """Shapes of a step's operands."""
    kept = jax.ShapeDtypeStruct((LAYERS, CONTEXT, KV_HEADS, WIDTH), BF16)
    return weights(stacked, int8), (kept, kept), jax.ShapeDtypeStruct((1,), INT32), jax.ShapeDtypeStruct((), INT32)


# Of each matrix, stacked, the axis that is split over chips: as Megatron has it, and the vocabulary.
SPLIT = {"q": 2, "k": 2, "v": 2, "o": 1, "gate": 2, "up": 2, "down": 1, "embedding": 0}
FOUR = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1"}


def on_four(chip: str, shapes: Any) -> Any:
    """Shapes of a step's operands over four chips: heads, units and rows of the vocabulary are split."""
    # It starts libtpu, which is told here that there is no TPU.
    Target("tpu", chip).device()
    devices = topologies.get_topology_desc(platform="tpu", topology_name=FOUR[chip]).devices[:4]
    mesh = Mesh(np.array(devices), ("model",), axis_types=(AxisType.Auto,))

    def place(path: Any, shape: Any) -> Any:
        axis = SPLIT.get(getattr(path[-1], "key", ""), 2 if shape.ndim == 4 else None)
        spec = PartitionSpec(*("model" if i == axis else None for i in range(shape.ndim)))
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, shapes)
