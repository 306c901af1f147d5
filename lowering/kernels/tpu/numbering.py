"""Numbering what is set of a mask, and finding by their numbers where it stands: products with ones, and comparisons.

A mask of many numbers is seen as rows of 128. Counts are made by products with triangles of ones, whose sums are exact.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hire_xform.lowering.kernels.tpu.shapes import LANES

__all__ = ["as_row", "dot", "iota", "numbered", "ones", "places_of"]


def numbered(mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For each entry of ``[r, 128]`` how many up to it are set in its row, and for each row how many up to its end."""
    rows = mask.shape[0]
    within = dot(ones(mask), ones(iota((LANES, LANES), 0) <= iota((LANES, LANES), 1)))
    until = dot(ones(iota((rows, rows), 1) <= iota((rows, rows), 0)), within.astype(jnp.bfloat16))
    return within, until[:, LANES - 1 :]


def places_of(wanted: jax.Array, numbers: Any, ends: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where those with some numbers stand.

    Args:
      wanted: the numbers, from 0 on, int32 ``[128, 1]``.
      numbers: for each entry how many up to it are set in its row, bf16 ``[rows, 128]``.
      ends: for each row how many are set up to its end, f32 ``[1, rows]``.

    Returns:
      For each a one where its row is, bf16 ``[128, rows]``; its lane there, and its place of all, int32 ``[128, 1]``.
    """
    rows = numbers.shape[0]
    wanted = wanted.astype(jnp.float32)
    over = ends[...] <= wanted
    row = jnp.sum(over.astype(jnp.int32), axis=1, keepdims=True)
    number = wanted - jnp.max(jnp.where(over, ends[...], 0.0), axis=1, keepdims=True)
    # Rows are taken by a product with ones; its inputs, of 8 bits at most, are exact in bfloat16.
    taken = ones(iota((LANES, rows), 1) == row)
    lane = jnp.sum((dot(taken, numbers[...]) <= number).astype(jnp.int32), axis=1, keepdims=True)
    return taken, lane, row * LANES + lane


def as_row(column: jax.Array) -> jax.Array:
    """``[r, 1]``, r up to 128, as ``[1, 128]``: zeros behind it."""
    rows = column.shape[0]
    return jnp.sum(jnp.where(iota((rows, LANES), 0) == iota((rows, LANES), 1), column, 0), axis=0, keepdims=True)


def iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    """Along an axis, int32."""
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def ones(mask: jax.Array) -> jax.Array:
    """Of a mask, bf16."""
    return mask.astype(jnp.float32).astype(jnp.bfloat16)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product of matrices, f32."""
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
