"""Where values stand that are not below zero: blocks count theirs, and number them after those of the blocks before."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from hire_xform.lowering.kernels.gpu.calls import call, padded
from hire_xform.lowering.kernels.gpu.shapes import COUNTED

__all__ = ["open_rows"]


def open_rows(values: jax.Array, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """As ``open_rows`` of ``lowering/primitives``, of f32 ``[n]``."""
    n = values.shape[0]
    blocks = -(-n // COUNTED)
    out, grid = jax.ShapeDtypeStruct((blocks,), jnp.int32), (blocks,)
    counts = call(functools.partial(_count, n=n), "count_open_rows", out, grid, values, warps=4, interpret=interpret)
    found = jax.ShapeDtypeStruct((n,), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    kernel = functools.partial(_number, n=n, blocks=blocks)
    index, count = call(kernel, "open_rows", found, grid, values, counts, warps=4, interpret=interpret)
    return index, count[0]


def _open(values_ref: Any, n: int) -> tuple[jax.Array, jax.Array]:
    """The rows of a program, and which of them are open."""
    row = pl.program_id(0) * COUNTED + jnp.arange(COUNTED)
    values = triton.load(values_ref.at[row], mask=row < n, other=-1.0)
    return row, ((values >= 0.0) | (values != values)).astype(jnp.int32)


def _count(values_ref: Any, counts_ref: Any, *, n: int) -> None:
    counts_ref[pl.program_id(0)] = jnp.sum(_open(values_ref, n)[1])


def _number(values_ref: Any, counts_ref: Any, index_ref: Any, count_ref: Any, *, n: int, blocks: int) -> None:
    block = jnp.arange(padded(blocks))
    counts = triton.load(counts_ref.at[block], mask=block < blocks, other=0)
    before, total = jnp.sum(jnp.where(block < pl.program_id(0), counts, 0)), jnp.sum(counts)
    row, is_open = _open(values_ref, n)
    until = before + jnp.cumsum(is_open)
    # Those that are not open are numbered behind all that are: there zeros have to stand.
    place = jnp.where(is_open == 1, until - 1, total + row - until)
    triton.store(index_ref.at[place], row * is_open, mask=row < n)
    count_ref[0] = total
