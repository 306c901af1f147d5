"""The model: its weights in the layouts that users have, and a step of it or of a part of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.gpu.sizes import Sizes
from hire_xform.lowering.predict.few_bits import quantize

NOISE, BIAS, EPSILON = 0.05, -1.6, 1e-6
Product = Callable[[jax.Array, Any, str], jax.Array]


def depth_of(sizes: Sizes, part: str) -> int:
    """How many blocks a part has."""
    return {"head": 0, "ffn": sizes.blocks, "step": sizes.layers}[part]


def shapes_of(sizes: Sizes, part: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Matrices by name, a row for each output, but ``down`` a row for each unit."""
    d, m = sizes.d, sizes.m
    found: dict[str, tuple[int, int]] = {}
    for i in range(depth_of(sizes, part)):
        if part == "step":
            found |= {f"{i}.{name}": (d, d) for name in "qkvo"}
        found |= {f"{i}.up": (m, d), f"{i}.down": (m, d)}
    if part != "ffn":
        found["head"] = sizes.vocab, d
    return {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in found.items()}


def make_weights(sizes: Sizes, part: str) -> dict[str, jax.Array]:
    """Of rank d / 8 and a little noise, so that small predictors are good ones: no time hangs on it, agreement does."""
    shapes = shapes_of(sizes, part).items()
    return {name: _matrix(i, *one.shape, name.rpartition(".")[2]) for i, (name, one) in enumerate(shapes)}


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _matrix(number: jax.Array, rows: int, columns: int, name: str) -> jax.Array:
    """One for all layers: a program that makes every matrix would take long to compile."""
    keys = jax.random.split(jax.random.key(number), 3)
    matrix = jax.random.normal(keys[0], (rows, columns)) * (NOISE * columns**-0.5)
    if name in ("up", "head"):
        rank = columns // 8
        left = jax.random.normal(keys[1], (rows, rank))
        matrix += left @ jax.random.normal(keys[2], (rank, columns)) * (rank * columns) ** -0.5
    else:
        matrix *= (rows / columns if name == "down" else 1.0) ** -0.5 / NOISE
    return matrix.astype(jnp.bfloat16)


def rows_form(x: jax.Array, w: jax.Array, name: str) -> jax.Array:
    """A product with weights as :func:`shapes_of` has them."""
    return x @ w if name.endswith("down") else x @ w.T


def columns_form(x: jax.Array, w: jax.Array, name: str) -> jax.Array:
    """The same of weights with a column for each output; but the head has rows: it is looked up, too."""
    return x @ w.T if name == "head" else x @ w


def int8_form(x: jax.Array, w: Any, name: str) -> jax.Array:
    """Weights in int8 with a scale for each output, widened by the program, as users write it."""
    q, scale = w
    return (x @ q.astype(jnp.bfloat16).T) * scale.astype(jnp.bfloat16)


def columns_of(w: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The other layout."""
    return {k: v if k.endswith("down") or k == "head" else v.T for k, v in w.items()}


def int8_of(w: dict[str, jax.Array]) -> dict[str, Any]:
    """In int8."""
    return {k: _int8(v.T if k.endswith("down") else v) for k, v in w.items()}


@jax.jit
def _int8(matrix: jax.Array) -> Any:
    return quantize(matrix, 127)


def norm(x: jax.Array) -> jax.Array:
    """Root mean square."""
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + EPSILON)).astype(x.dtype)


def inputs(sizes: Sizes, tokens: int, count: int) -> list[jax.Array]:
    """Some, for so many tokens, as :func:`norm` leaves them."""
    drawn = np.random.default_rng(0).standard_normal((count, tokens, sizes.d), np.float32)
    drawn /= np.sqrt(np.mean(drawn * drawn, -1, keepdims=True) + EPSILON)
    return [jnp.asarray(one, jnp.bfloat16) for one in drawn]


def one_step(sizes: Sizes, part: str, product: Product) -> Callable[..., Any]:
    """A step of the model: weights and tokens ``[T, d]`` to what is looked at, and the tokens of the next step."""

    def attention(w: Any, x: jax.Array, i: int, cache: jax.Array) -> jax.Array:
        tokens, heads, width = x.shape[0], sizes.heads, sizes.d // sizes.heads
        q, k, v = (product(x, w[f"{i}.{name}"], f"{i}.{name}").reshape(tokens, heads, width) for name in "qkv")
        keys = jnp.concatenate([jnp.broadcast_to(cache, (tokens, *cache.shape)), k[:, None]], 1)
        values = jnp.concatenate([jnp.broadcast_to(cache, (tokens, *cache.shape)), v[:, None]], 1)
        weights = jax.nn.softmax(jnp.einsum("thw,tchw->thc", q, keys).astype(jnp.float32) * width**-0.5, -1)
        mixed = jnp.einsum("thc,tchw->thw", weights.astype(x.dtype), values)
        return product(mixed.reshape(tokens, sizes.d), w[f"{i}.o"], f"{i}.o")

    def step(w: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        cache = jnp.full((sizes.context, sizes.heads, sizes.d // sizes.heads), 0.1, x.dtype)
        for i in range(depth_of(sizes, part)):
            if part == "step":
                x = x + attention(w, norm(x), i, cache)
            hidden = jax.nn.relu(product(norm(x), w[f"{i}.up"], f"{i}.up") + jnp.asarray(BIAS, x.dtype))
            x = x + product(hidden, w[f"{i}.down"], f"{i}.down")
        if part == "ffn":
            return x, norm(x)
        ids = jnp.argmax(product(norm(x), w["head"], "head"), -1)
        table = w["head"][0] if isinstance(w["head"], tuple) else w["head"]
        return ids, norm(table[ids].astype(jnp.float32)).astype(x.dtype)

    return step


def looped(step: Callable[..., Any], times: int) -> Callable[..., Any]:
    """So many steps, one after the other, in one program."""

    def loop(w: Any, x: jax.Array) -> jax.Array:
        return lax.scan(lambda x, _: (step(w, x)[1], None), x, None, length=times)[0]

    return loop
