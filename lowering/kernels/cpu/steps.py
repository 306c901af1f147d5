"""The native steps as functions of arrays. Shapes and results are those of the portable forms; see ``steps.h``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hire_xform.lowering.kernels.folding import folded
from hire_xform.lowering.primitives.stack_entry import StackEntry

__all__ = [
    "arg_max",
    "combine_rows",
    "fine_scores",
    "open_rows",
    "products",
    "quantized_scores",
    "select_rows_dot",
    "top_k",
]


def _f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _laid_out(rows: jax.Array | StackEntry) -> tuple[jax.Array, jax.Array]:
    """Rows as a kernel reads them, all of a stack's, and the number of the first one."""
    return rows.laid_out() if isinstance(rows, StackEntry) else (rows, jnp.int32(0))


def quantized_scores(x: jax.Array, q: jax.Array | StackEntry, scale: jax.Array, bits: int) -> jax.Array:
    """As ``quantized_scores`` of ``lowering/predict/few_bits.py``; integer products are exact, so scores are its."""

    def step(x: jax.Array, q: jax.Array, scale: jax.Array, first: jax.Array) -> Any:
        call = jax.ffi.ffi_call("hire_scores", _f32(x.shape[0], scale.shape[0]))
        return call(x, q, scale, first, bits=np.int64(bits))

    rows, first = _laid_out(q)
    return folded(step, x, rows, scale, first)


def fine_scores(x: jax.Array, q: jax.Array | StackEntry, scale: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """As ``fine_scores`` there: each token in two limbs of 8 bits, and the tokens as they are kept.

    What ``lowering/prove/bounds.py`` assumes holds: products of integers are exact, each limb's sum, the two scales and
    the addition are rounded once, and the tokens that are kept are those that were multiplied.
    """

    def step(x: jax.Array, q: jax.Array, scale: jax.Array, first: jax.Array) -> Any:
        shapes = _f32(x.shape[0], scale.shape[0]), _f32(*x.shape)
        return tuple(jax.ffi.ffi_call("hire_fine_scores", shapes)(x, q, scale, first, bits=np.int64(bits)))

    rows, first = _laid_out(q)
    return folded(step, x, rows, scale, first)


def products(x: jax.Array, rows: jax.Array | StackEntry) -> jax.Array:
    """``x @ rows.T``, f32 ``[T, n]``, of rows in f32, bf16, f16, float8 or int8; sums run in f32."""

    count = rows.shape[0]

    def step(x: jax.Array, rows: jax.Array, first: jax.Array) -> Any:
        return jax.ffi.ffi_call("hire_products", _f32(x.shape[0], count))(x, rows, first)

    return folded(step, x, *_laid_out(rows))


def select_rows_dot(
    x: jax.Array,
    rows: jax.Array,
    index: jax.Array,
    group: int,
    magnitudes: bool = False,
    scale: jax.Array | None = None,
) -> jax.Array:
    """As ``select_rows_dot`` of ``lowering/primitives``, for ``x`` in f32 or less: f32 ``[T, K * group]``.

    Rows of int8 and int4 may have a scale, f32 ``[n / r, d / c]``, each entry of which is for ``r`` rows and ``c``
    columns: one, all, or a multiple of 64. Weights are then the products, rounded to f32, as programs make them in f32.
    Each product with a token is a sum of f32 products in some order, rounded at each addition or, with FMA, less often:
    what proofs say of sums in f32 in any order holds. An index out of range is an error.
    """

    def step(x: jax.Array, rows: jax.Array, index: jax.Array, scale: jax.Array) -> Any:
        call = jax.ffi.ffi_call("hire_select_rows_dot", _f32(x.shape[0], index.shape[-1] * group))
        return call(x, rows, scale, index, group=np.int64(group), magnitudes=magnitudes)

    return folded(step, x.astype(jnp.float32), rows, index, _scale(scale))


def combine_rows(
    h: jax.Array, rows: jax.Array, index: jax.Array, group: int, scale: jax.Array | None = None
) -> jax.Array:
    """As ``combine_rows`` there, for ``h`` in f32 or less: f32 ``[T, d]``. The order of sums hangs on shapes alone.

    Rows of int8 and int4 may have a scale, as in :func:`select_rows_dot`.
    """

    def step(h: jax.Array, rows: jax.Array, index: jax.Array, scale: jax.Array) -> Any:
        call = jax.ffi.ffi_call("hire_combine_rows", _f32(h.shape[0], rows.shape[1]))
        return call(h, rows, scale, index, group=np.int64(group))

    return folded(step, h.astype(jnp.float32), rows, index, _scale(scale))


def _scale(scale: jax.Array | None) -> jax.Array:
    """A scale as the library takes it, where none is one of no numbers."""
    return jnp.zeros(0, jnp.float32) if scale is None else scale.astype(jnp.float32)


def top_k(scores: jax.Array, k: int, shards: int = 1, ordered: bool = True) -> tuple[jax.Array, jax.Array]:
    """As ``da_top_k`` for f32 scores whose last axis the shards divide; each in any order if not ``ordered``."""
    shape = (*scores.shape[:-1], shards * -(-k // shards))
    out = _f32(*shape), jax.ShapeDtypeStruct(shape, jnp.int32)
    call = jax.ffi.ffi_call("hire_largest", out, vmap_method="sequential")
    values, indices = call(scores, shards=np.int64(shards), ordered=ordered)
    return values, indices


def arg_max(values: jax.Array) -> jax.Array:
    """As ``arg_max`` of ``lowering/primitives``, for values in f32."""
    out = jax.ShapeDtypeStruct(values.shape[:-1], jnp.int32)
    # Examples are further leading axes.
    return jax.ffi.ffi_call("hire_arg_max", out, vmap_method="broadcast_all")(values)


def open_rows(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As ``open_rows`` there."""
    out = jax.ShapeDtypeStruct(values.shape, jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    index, count = jax.ffi.ffi_call("hire_open_rows", out, vmap_method="sequential")(values)
    return index, count
