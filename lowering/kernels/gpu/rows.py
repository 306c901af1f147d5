"""Exact products with chosen rows, and sums of them: each row is read once, from where it lies, and nothing is copied.

Products and sums are in f32, each rounded once; tensor cores, which do not round sums so, are not used. Rows may be
int8 times a scale in f32, ``[n / r, d / c]``, each entry of which is for ``r`` rows and ``c`` columns.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from hire_xform.lowering.kernels.folding import folded
from hire_xform.lowering.kernels.gpu.calls import as_float, call, padded, row_of

__all__ = ["combine_rows", "select_rows_dot"]

# Of products: chosen rows that a program takes, and columns at a time. Few rows, so that few chosen ones keep all
# multiprocessors busy; long pieces, so that enough is on its way.
_ROWS, _COLUMNS = 2, 2048
# Of sums: columns of a program, and rows that it has on their way at a time.
_WIDTH, _DEEP = 256, 32
# How many programs keep all multiprocessors busy: four on each of the 132 of an H100.
_PROGRAMS = 528


def select_rows_dot(
    x: jax.Array,
    rows: jax.Array,
    index: jax.Array,
    group: int,
    magnitudes: bool = False,
    scale: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """As ``select_rows_dot`` of ``lowering/primitives``: f32 ``[T, K * group]``."""

    def step(x: jax.Array, rows: jax.Array, index: jax.Array, *scale: jax.Array) -> jax.Array:
        own = index.ndim == 2
        chosen, d = index.shape[-1] * group, rows.shape[1]
        # A token with rows of its own is a program's only one.
        tokens = 1 if own else x.shape[0]
        columns = min(_COLUMNS, padded(d))
        kernel = functools.partial(
            _products,
            group=group,
            chosen=chosen,
            d=d,
            n=rows.shape[0],
            tokens=tokens,
            columns=columns,
            own=own,
            magnitudes=magnitudes,
        )
        out = jax.ShapeDtypeStruct((x.shape[0], chosen), jnp.float32)
        grid = (-(-chosen // _ROWS), x.shape[0] if own else 1)
        operands = x, rows, index.ravel(), *scale
        return call(kernel, "select_rows_dot", out, grid, *operands, warps=4, interpret=interpret)

    return folded(step, x, rows, index, *_given(scale))


def _products(
    x_ref: Any,
    rows_ref: Any,
    index_ref: Any,
    *refs: Any,
    group: int,
    chosen: int,
    d: int,
    n: int,
    tokens: int,
    columns: int,
    own: bool,
    magnitudes: bool,
) -> None:
    *scale_refs, out_ref = refs
    which = pl.program_id(1)
    slot = pl.program_id(0) * _ROWS + jnp.arange(_ROWS)
    inside = slot < chosen
    row = row_of(index_ref, which * (chosen // group), slot, group, inside)

    def step(block: Any, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        column = block * columns + jnp.arange(columns)
        there = column < d
        mask = inside[:, None] & there[None, :]
        weights = as_float(triton.load(rows_ref.at[row[:, None], column[None, :]], mask=mask, other=0))
        for ref in scale_refs:
            weights = weights * _scales(ref, row, column, inside, there, n, d)
        weights = jnp.abs(weights) if magnitudes else weights
        made = []
        for token, total in enumerate(totals):
            values = as_float(triton.load(x_ref.at[_of(token, which, own), column], mask=there, other=0))
            values = jnp.abs(values) if magnitudes else values
            made.append(total + jnp.sum(weights * values[None, :], axis=1))
        return tuple(made)

    totals = tuple(jnp.zeros((_ROWS,), jnp.float32) for _ in range(tokens))
    totals = lax.fori_loop(0, -(-d // columns), step, totals)
    for token, total in enumerate(totals):
        triton.store(out_ref.at[_of(token, which, own), slot], total, mask=inside)


def combine_rows(
    h: jax.Array,
    rows: jax.Array,
    index: jax.Array,
    group: int,
    scale: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """As ``combine_rows`` of ``lowering/primitives``: f32 ``[T, d]``.

    The chosen rows are dealt out in equal parts, whose sums are added up after.
    """

    def step(h: jax.Array, rows: jax.Array, index: jax.Array, *scale: jax.Array) -> jax.Array:
        own = index.ndim == 2
        chosen, d = index.shape[-1] * group, rows.shape[1]
        tokens = 1 if own else h.shape[0]
        width = min(_WIDTH, padded(d))
        blocks = -(-d // width)
        parts = _parts(chosen, h.shape[0], blocks * (h.shape[0] if own else 1), rows.dtype.itemsize)
        deep = min(_DEEP, padded(chosen))
        share = -(-chosen // (parts * deep)) * deep
        parts = -(-chosen // share)
        kernel = functools.partial(
            _sums,
            group=group,
            chosen=chosen,
            d=d,
            n=rows.shape[0],
            tokens=tokens,
            width=width,
            share=share,
            deep=deep,
            own=own,
        )
        out = jax.ShapeDtypeStruct((parts, h.shape[0], d), jnp.float32)
        grid = (blocks, parts, h.shape[0] if own else 1)
        made = call(kernel, "combine_rows", out, grid, h, rows, index.ravel(), *scale, warps=2, interpret=interpret)
        return made[0] if parts == 1 else made.sum(axis=0)

    return folded(step, h, rows, index, *_given(scale))


def _parts(chosen: int, tokens: int, programs: int, itemsize: int) -> int:
    """In how many parts rows are dealt out: to keep the GPU busy, with sums a quarter of the rows' bytes at most."""
    busy = -(-_PROGRAMS // programs)
    small = chosen * itemsize // (16 * tokens)
    return max(1, min(busy, small, -(-chosen // _DEEP)))


def _sums(
    h_ref: Any,
    rows_ref: Any,
    index_ref: Any,
    *refs: Any,
    group: int,
    chosen: int,
    d: int,
    n: int,
    tokens: int,
    width: int,
    share: int,
    deep: int,
    own: bool,
) -> None:
    *scale_refs, out_ref = refs
    part, which = pl.program_id(1), pl.program_id(2)
    column = pl.program_id(0) * width + jnp.arange(width)
    there = column < d

    def step(block: Any, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        slot = part * share + block * deep + jnp.arange(deep)
        inside = slot < chosen
        row = row_of(index_ref, which * (chosen // group), slot, group, inside)
        mask = inside[:, None] & there[None, :]
        weights = as_float(triton.load(rows_ref.at[row[:, None], column[None, :]], mask=mask, other=0))
        for ref in scale_refs:
            weights = weights * _scales(ref, row, column, inside, there, n, d)
        made = []
        for token, total in enumerate(totals):
            factors = as_float(triton.load(h_ref.at[_of(token, which, own), slot], mask=inside, other=0))
            made.append(total + jnp.sum(weights * factors[:, None], axis=0))
        return tuple(made)

    totals = tuple(jnp.zeros((width,), jnp.float32) for _ in range(tokens))
    totals = lax.fori_loop(0, share // deep, step, totals)
    for token, total in enumerate(totals):
        triton.store(out_ref.at[part, _of(token, which, own), column], total, mask=there)


def _scales(ref: Any, row: Any, column: Any, inside: Any, there: Any, n: int, d: int) -> jax.Array:
    """The scales of a block's entries: as a column, a row, or all of them, as few as there are."""
    high, wide = ref.shape
    row, column = (row // (n // high))[:, None], (column // (d // wide))[None, :]
    inside, there = inside[:, None], there[None, :]
    if wide == 1:
        return triton.load(ref.at[row, 0 * row], mask=inside, other=0)
    if high == 1:
        return triton.load(ref.at[0 * column, column], mask=there, other=0)
    return triton.load(ref.at[row + 0 * column, column + 0 * row], mask=inside & there, other=0)


def _of(token: int, which: Any, own: bool) -> Any:
    """Which token, as an index: a program's only one, or one of all."""
    return which if own else jnp.int32(token)


def _given(scale: jax.Array | None) -> list[jax.Array]:
    return [] if scale is None else [scale]
