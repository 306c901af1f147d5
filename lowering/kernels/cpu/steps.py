"""The native steps as functions of arrays. Shapes and results are those of the portable forms; see ``steps.h``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["combine_rows", "fine_scores", "largest", "products", "scores", "select_rows_dot"]


def _f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def scores(x: jax.Array, q: jax.Array, scale: jax.Array, bits: int) -> jax.Array:
    """As ``quantized_scores`` of ``lowering/predict/quantized.py``; integer products are exact, so scores are its."""
    return jax.ffi.ffi_call("hire_scores", _f32(x.shape[0], q.shape[0]))(x, q, scale, bits=np.int64(bits))


def fine_scores(x: jax.Array, q: jax.Array, scale: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """As ``fine_scores`` there: each token in two limbs of 8 bits, and the tokens as they are kept.

    What ``lowering/prove/bounds.py`` assumes holds: products of integers are exact, each limb's sum, the two scales and
    the addition are rounded once, and the tokens that are kept are those that were multiplied.
    """
    shapes = _f32(x.shape[0], q.shape[0]), _f32(*x.shape)
    kept_scores, kept = jax.ffi.ffi_call("hire_fine_scores", shapes)(x, q, scale, bits=np.int64(bits))
    return kept_scores, kept


def products(x: jax.Array, rows: jax.Array) -> jax.Array:
    """``x @ rows.T``, f32 ``[T, n]``, of rows in f32, bf16, f16 or int8; sums run in f32."""
    return jax.ffi.ffi_call("hire_products", _f32(x.shape[0], rows.shape[0]))(x, rows)


def select_rows_dot(x: jax.Array, rows: jax.Array, index: jax.Array, group: int, magnitudes: bool = False) -> jax.Array:
    """As ``select_rows_dot`` of ``lowering/engine/rows.py``, for ``x`` in f32: f32 ``[T, K * group]``.

    Each product is a sum of f32 products in some order, rounded at each addition or, with FMA, less often: what proofs
    say of sums in f32 in any order holds. An index out of range is an error.
    """
    call = jax.ffi.ffi_call("hire_select_rows_dot", _f32(x.shape[0], index.shape[-1] * group))
    return call(x, rows, index, group=np.int64(group), magnitudes=magnitudes)


def combine_rows(h: jax.Array, rows: jax.Array, index: jax.Array, group: int) -> jax.Array:
    """As ``combine_rows`` there, for ``h`` in f32: f32 ``[T, d]``. The order of sums hangs on shapes alone."""
    return jax.ffi.ffi_call("hire_combine_rows", _f32(h.shape[0], rows.shape[1]))(h, rows, index, group=np.int64(group))


def largest(scores: jax.Array, k: int, shards: int = 1) -> tuple[jax.Array, jax.Array]:
    """As ``da_top_k`` for f32 scores whose last axis the shards divide."""
    shape = (*scores.shape[:-1], shards * -(-k // shards))
    out = _f32(*shape), jax.ShapeDtypeStruct(shape, jnp.int32)
    values, indices = jax.ffi.ffi_call("hire_largest", out)(scores, shards=np.int64(shards))
    return values, indices
