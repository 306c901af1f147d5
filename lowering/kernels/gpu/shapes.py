"""Which operands the kernels for GPUs serve, by shapes, dtypes and settings.

Where XLA's own code, by the program that its compiler makes for an H100, reads what has to be read once, writes down
none of it and is one kernel, it is left to do so.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from hire_xform.lowering.primitives.stored_rows import scaled_in

__all__ = [
    "COUNTED",
    "MOST_TOKENS",
    "fine_scores_served",
    "neighbours",
    "open_rows_served",
    "products_served",
    "scores_served",
    "stored_products_served",
    "stored_sums_served",
    "sums_served",
    "top_k_served",
]

# Each token multiplies and adds by itself, not in tensor cores, which do not round sums as proofs assume: up to so many
# that takes no longer than reading the rows does.
MOST_TOKENS = 8
# Rows shorter than so many columns leave most of a warp idle.
LEAST_COLUMNS = 128
# Of a matrix that is small beside the cache nothing is gained.
LEAST_BYTES = 1 << 20
# But scores of few rows are two kernels in the place of ten.
LEAST_SCORED = 1 << 16
# Offsets in it are 32 bits.
MOST_ENTRIES = 1 << 31
# Sums of one token's rows: of so many XLA may write down a product for each entry, which hangs on what is around them.
SPLIT_ROWS = 256
# Columns of a token that one program quantises.
MOST_COLUMNS = 32768
# Scores that one program finds the largest of, in registers.
MOST_SCORES = 16384
# Values that a program counts the open ones of; one program reads the counts of all blocks.
COUNTED = 1024
_FLOATS = frozenset({jnp.dtype(t) for t in (jnp.float32, jnp.bfloat16, jnp.float16)})


def scores_served(x: Any, q: Any, scale: Any, *, bits: int) -> bool:
    """Rows in 8 or 4 bits, of a few tokens."""
    return 0 < x.shape[0] <= 2 * MOST_TOKENS and _in_words(x, q)


def fine_scores_served(x: Any, q: Any, scale: Any, *, bits: int) -> bool:
    """The same of tokens in two limbs."""
    return 0 < x.shape[0] <= MOST_TOKENS and _in_words(x, q)


def neighbours(n: int, k: int) -> int:
    """How many neighbours make a group, where the ``k`` largest of ``n`` are found by groups; 1 where they are not.

    0 where neither the groups nor the ``k`` best of them can be held.
    """
    group = 1
    while -(-n // group) > MOST_SCORES:
        group *= 2
    if group == 1:
        return 1
    # Both are found by the same means: the fewer of the larger of them, the better.
    while 2 * group * 2 * group * k <= n:
        group *= 2
    return group if group * k <= MOST_SCORES else 0


def top_k_served(scores: Any, *, k: int, shards: int, ordered: bool = True) -> bool:
    """Floats of 32 bits at most, of which one program holds all, or all groups and all of the best groups."""
    dtype = jnp.dtype(scores.dtype)
    block = scores.shape[-1] // shards
    return (
        jnp.issubdtype(dtype, jnp.floating)
        and dtype.itemsize <= 4
        and math.prod(scores.shape) > 0
        and neighbours(block, -(-k // shards)) > 0
    )


def open_rows_served(values: Any) -> bool:
    """As many as there are counts of."""
    return jnp.dtype(values.dtype) == jnp.float32 and 0 < values.shape[0] <= COUNTED * MOST_SCORES


def products_served(x: Any, rows: Any, index: Any, **settings: Any) -> bool:
    """Several tokens that share their rows: XLA gathers these into memory. Those of one token it reads once."""
    return x.shape[0] > 1 and index.ndim == 1 and _rows_served(x, rows, index)


def sums_served(h: Any, rows: Any, index: Any, **settings: Any) -> bool:
    """The same, and such rows of one token as above; where tokens have rows of their own, each is one."""
    alone = h.shape[0] == 1 or index.ndim == 2
    return (h.shape[1] >= SPLIT_ROWS or not alone) and _rows_served(h, rows, index)


def stored_products_served(x: Any, index: Any, values: Any, *others: Any, operations: Any, **settings: Any) -> bool:
    """Rows of int8 times a scale, as above."""
    return _stored_served(values, others, operations) and products_served(x, values, index)


def stored_sums_served(h: Any, index: Any, values: Any, *others: Any, operations: Any, **settings: Any) -> bool:
    """Rows of int8 times a scale: XLA makes weights of them in memory, of one token as well."""
    return _stored_served(values, others, operations) and _rows_served(h, values, index)


def _rows_served(x: Any, rows: Any, index: Any) -> bool:
    known = jnp.dtype(x.dtype) in _FLOATS and jnp.dtype(rows.dtype) in _FLOATS | {jnp.dtype(jnp.int8)}
    return (
        known
        and 0 < x.shape[0] <= MOST_TOKENS
        and jnp.dtype(index.dtype) == jnp.int32
        and 0 not in index.shape
        and _fits(rows)
    )


def _stored_served(values: Any, others: Any, operations: Any) -> bool:
    """One scale in f32, after conversions that keep all of an int8."""
    if jnp.dtype(values.dtype) != jnp.int8 or len(others) != 1 or others[0].ndim != 2:
        return False
    return scaled_in(operations, _FLOATS) == jnp.float32


def _fits(rows: Any, least: int = LEAST_BYTES) -> bool:
    size = math.prod(rows.shape)
    return rows.shape[1] >= LEAST_COLUMNS and size < MOST_ENTRIES and size * rows.dtype.itemsize >= least


def _in_words(x: Any, q: Any) -> bool:
    """Rows of whole words, of 4 bytes."""
    return q.shape[1] % 4 == 0 and x.shape[1] <= MOST_COLUMNS and _fits(q, LEAST_SCORED)
