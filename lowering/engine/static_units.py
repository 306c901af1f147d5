"""Hidden units that are always computed: the first of a block's packed rows, read as one slice and never predicted.

Units that fire for almost every token are chosen for almost every token, whatever predicts them. Read always, they need
no predictor, and several tokens of a step share the reading (HiRE's overlap of active units, arXiv 2402.09360).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
from jax import lax

from hire_xform.lowering.primitives.stored_rows import StoredRows
from hire_xform.lowering.xla.narrow_reads import read_part
from hire_xform.lowering.xla.skinny_dot import skinny_dot, skinny_dot_transposed, wide_dtype

if TYPE_CHECKING:
    from hire_xform.lowering.engine.block import UpProduct

__all__ = ["static_units"]


def static_units(
    ups: Sequence[UpProduct],
    region: Callable[[list[jax.Array], Callable[[jax.Array], jax.Array]], jax.Array],
    down: jax.Array,
    first_row: jax.Array | int,
    count: int,
) -> jax.Array:
    """The part of a feed-forward block that its first ``count`` units make.

    Args:
      ups: the products into the units; predictors are not read.
      region: what the model does to the units; see ``ffn``.
      down: ``[m, d_out]``, or a taller matrix.
      first_row: where its rows begin.
      count: how many units, at least one.

    Returns:
      ``[T, d_out]`` in f32, or f64 for f64 weights.
    """
    hiddens = [skinny_dot(*_wide(up.x, _first(up.rows, up.first_row, count))).astype(up.dtype) for up in ups]
    activation = region(hiddens, lambda values: values[..., :count])
    return skinny_dot_transposed(*_wide(activation, _first(down, first_row, count)))


def _first(rows: jax.Array | StoredRows, first: jax.Array | int, count: int) -> jax.Array:
    if isinstance(rows, StoredRows):
        return rows.block(first, count)
    if isinstance(first, int):
        return lax.slice_in_dim(rows, first, first + count)
    return read_part(lambda rows, first: lax.dynamic_slice_in_dim(rows, first, count), rows, first)


def _wide(*operands: jax.Array) -> list[jax.Array]:
    dtype = wide_dtype(*(operand.dtype for operand in operands))
    return [operand.astype(dtype) for operand in operands]
