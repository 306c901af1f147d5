"""Reading chosen rows of a matrix, in groups of neighbours that are one slab of contiguous values each.

A matrix is stored row after row, ``rows [n, d]``; an ``index`` counts groups of ``group_size`` rows. One of one axis is
shared by all tokens, one of two axes holds each token's own choice.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hire_xform.lowering.xla.in_line import loop
from hire_xform.lowering.xla.narrow_reads import read_part

__all__ = ["block_of", "check_rows", "each_token", "slabs_of"]

# Up to this many bytes the chosen rows are gathered at once. The copy is made in parallel, the same buffer serves every
# layer of a step, and there is no inner loop: a loop inside a scan over layers would first copy the layer's *whole*
# matrix out of the stack (measured on CPU: 0.3 ms against 5.5 ms for 512 of 8,192 rows of 8 KiB). Beyond it, the
# memory matters more and the rows are walked in blocks.
_WHOLE_BYTES = 64 * 2**20
_BLOCK_BYTES = 2**20
# Up to this many tokens with their own rows are spelled out one by one, for the same reason; more are looped over.
_UNROLLED_TOKENS = 16


def block_of(rows: Any, index: jax.Array, group_size: int) -> int:
    """How many entries of ``index`` are gathered together."""
    entry = group_size * rows.shape[1] * rows.dtype.itemsize
    return index.shape[0] if index.shape[0] * entry <= _WHOLE_BYTES else max(1, _BLOCK_BYTES // entry)


def each_token(fun: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, index: jax.Array) -> jax.Array:
    """``fun(x[t : t + 1], index[t])`` for every token, stacked again."""
    if x.shape[0] <= _UNROLLED_TOKENS:
        return jnp.concatenate([fun(x[t : t + 1], index[t]) for t in range(x.shape[0])])
    return loop(lax.map, lambda pair: fun(pair[0][None], pair[1])[0], (x, index))


def check_rows(name: str, rows: Any, index: jax.Array, group_size: int, tokens: int) -> None:
    """Raises the error for rows and an index that do not fit each other, or the tokens."""
    if rows.ndim != 2:
        raise ValueError(f"{name}: rows has shape {rows.shape}; expected [n, d]")
    if group_size < 1 or rows.shape[0] % group_size:
        raise ValueError(f"{name}: group_size={group_size} does not divide the {rows.shape[0]} rows")
    if index.ndim not in (1, 2) or (index.ndim == 2 and index.shape[0] != tokens):
        raise ValueError(f"{name}: index has shape {index.shape}; expected [K] or [{tokens}, K]")
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(f"{name}: index has dtype {index.dtype}; expected integers")


def slabs_of(rows: jax.Array, index: jax.Array, group_size: int) -> jax.Array:
    """``[K * g, d]``: the chosen groups, one after the other."""
    n, d = rows.shape
    slabs = rows.reshape(n // group_size, group_size, d) if group_size > 1 else rows
    taken = _gather_where_they_lie(slabs, index)
    return taken.reshape(index.shape[0] * group_size, d)


def _gather(slabs: jax.Array, index: jax.Array) -> jax.Array:
    slab = tuple(range(1, slabs.ndim))
    numbers = lax.GatherDimensionNumbers(offset_dims=slab, collapsed_slice_dims=(0,), start_index_map=(0,))
    starts = lax.expand_dims(index, (1,))
    return lax.gather(slabs, starts, numbers, (1, *slabs.shape[1:]), mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS)


def _gather_where_they_lie(slabs: jax.Array, index: jax.Array) -> jax.Array:
    """``slabs[index]``, on TPU in a loop of two steps.

    XLA's TPU backend takes a gather for one that reads its whole operand, and where that fits into VMEM it fetches all
    of it ahead. What a loop reads it leaves in HBM (seen in programs compiled for v5e; ``test_tpu_compiler.py``).
    """
    plainly = functools.partial(read_part, _gather)
    if index.shape[0] < 2:
        return plainly(slabs, index)

    def in_two_steps(slabs: jax.Array, index: jax.Array) -> jax.Array:
        count = index.shape[0]
        if count % 2:
            index = lax.concatenate([index, lax.slice_in_dim(index, count - 1, count)], 0)
        _, taken = loop(lax.scan, lambda carry, half: (carry, _gather(slabs, half)), None, index.reshape(2, -1))
        return lax.slice_in_dim(lax.collapse(taken, 0, 2), 0, count)

    return lax.platform_dependent(slabs, index, tpu=in_two_steps, default=plainly)
