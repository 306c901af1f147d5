"""What the TPU's kernels serve, move and hold: sizes alone, so that Pallas is not imported for them."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import primitives

from hire_xform.lowering.primitives.stored_rows import scaled_in

__all__ = [
    "AHEAD",
    "LANES",
    "MOST_TOKENS",
    "block_served",
    "bytes_of_slabs",
    "open_rows_served",
    "rows_a_step",
    "rows_of_lanes",
    "rows_served",
    "scores_in_two_served",
    "scores_served",
    "stored_rows_served",
    "top_k_served",
]

LANES = 128
# Tokens of one call; more, as `vmap` makes them, are taken so many at a time.
MOST_TOKENS = 16
# Steps of rows that are in VMEM or on their way.
AHEAD = 4
# What a kernel may hold in VMEM: XLA gives it 16 MiB unless asked, of 64 MiB and more that chips have.
VMEM = 12 * 2**20
# Chosen slabs, whose numbers are kept in scalar memory.
_MOST_SLABS = 8192
_FLOATS = frozenset({jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)})
# What a kernel may do between products and sums, on which values, and calls of it.
_POINTWISE = frozenset(
    getattr(primitives, f"{name}_p")
    for name in (
        *(
            "abs",
            "add",
            "broadcast_in_dim",
            "convert_element_type",
            "div",
            "eq",
            "exp",
            "ge",
            "gt",
            "integer_pow",
            "le",
            "logistic",
            "lt",
        ),
        *("max", "min", "mul", "ne", "neg", "select_n", "sqrt", "square", "sub", "tanh"),
    )
)
_CALLS = frozenset(p for name in ("custom_jvp_call", "jit") if (p := getattr(primitives, f"{name}_p", None)))
_HELD = _FLOATS | {jnp.dtype(bool), jnp.dtype(jnp.int32)}


def rows_a_step(group: int) -> int:
    """Rows that are multiplied together: whole slabs, and whole registers of what is made of them."""
    return math.lcm(LANES, group)


def bytes_of_slabs(count: int, group: int, d: int, dtype: Any) -> int:
    """Bytes that are read for so many slabs of rows: a single row of 16 bits brings its neighbour along."""
    size = jnp.dtype(dtype).itemsize
    return count * max(4, group * size) * d


def rows_served(x: Any, rows: Any, index: Any, *, group_size: int, **settings: Any) -> bool:
    """Whether chosen rows are read by a kernel: whole tiles of lanes and sublanes, in words of 32 bits."""
    dtype = jnp.dtype(rows.dtype)
    return dtype in _FLOATS and _slabs_served(x, rows, index, group_size)


def stored_rows_served(
    x: Any, index: Any, values: Any, *others: Any, operations: Any, shared: Any, group_size: int, **settings: Any
) -> bool:
    """Rows of int8 times one scale of each row or of each column, in slabs of whole words, or single ones.

    The scale is multiplied in f32; no such site is certified.
    """
    if jnp.dtype(values.dtype) != jnp.int8 or len(others) != 1 or others[0].ndim != 2:
        return False
    exact = scaled_in(operations, _FLOATS) in _FLOATS
    (n, d), (high, wide) = values.shape, others[0].shape
    together = n // high
    of_columns = wide == d and (high == 1 or (shared[0] and index.ndim == 1))
    of_rows = wide == 1 and (group_size % together == 0 or together % group_size == 0)
    return exact and (of_columns or of_rows) and _slabs_served(x, values, index, group_size)


def _slabs_served(x: Any, rows: Any, index: Any, group: int) -> bool:
    dtype, (n, d) = jnp.dtype(rows.dtype), rows.shape
    if jnp.dtype(x.dtype) not in _FLOATS or jnp.dtype(index.dtype) != jnp.int32:
        return False
    if 0 in x.shape or x.shape[0] > MOST_TOKENS or not 0 < index.shape[-1] <= _MOST_SLABS:
        return False
    tiles = d % LANES == 0 and n % (32 // dtype.itemsize) == 0
    slabs = group == 1 or (group * dtype.itemsize) % 4 == 0
    return tiles and slabs and rows_bytes_held(x.shape[0], index.shape[-1], group, d, dtype) <= VMEM


def block_served(index: Any, *arrays: Any, form: Any, group_size: int) -> bool:
    """Whether the chosen units of a block are one kernel's: matrices of one width, and what may stand between them."""
    ups = form.ups
    (x, *others), rows = arrays[:ups], arrays[ups : 2 * ups + 1]
    if index.ndim != 1 or len({(each.shape[1], jnp.dtype(each.dtype)) for each in rows}) > 1:
        return False
    if any(each.shape[0] != x.shape[0] for each in others):
        return False
    if not all(rows_served(*own, index, group_size=group_size) for own in zip((x, *others), rows, strict=False)):
        return False
    d, dtype, tokens = rows[0].shape[1], jnp.dtype(rows[0].dtype), x.shape[0]
    if not rows_served(x, rows[-1], index, group_size=group_size):
        return False
    wanted = index.shape[0] * group_size
    held = rows_bytes_held(tokens, index.shape[0], group_size, d, dtype)
    beside = 4 * max(8, tokens) * wanted * (ups + len(form.beside))
    return _pointwise(form, (tokens, wanted)) and held + beside <= VMEM


def _pointwise(form: Any, shape: tuple[int, int]) -> bool:
    """Whether what stands between products and sums is made of entries of one shape, in steps that a TPU has."""
    if len(form.products) != form.ups or len(form.sums) != 1 or form.sums[0].outvars != form.jaxpr.outvars:
        return False
    return all(_is_pointwise(eqn, shape) for eqn in form.between)


def _is_pointwise(eqn: Any, shape: tuple[int, int]) -> bool:
    own = [v.aval for v in (*eqn.invars, *eqn.outvars)]
    if not all(a.shape in ((), (1, shape[1]), shape) and jnp.dtype(a.dtype) in _HELD for a in own):
        return False
    if eqn.primitive in _CALLS:
        inner = next(eqn.params[name] for name in ("call_jaxpr", "jaxpr") if name in eqn.params)
        return not inner.consts and all(_is_pointwise(each, shape) for each in inner.jaxpr.eqns)
    return eqn.primitive in _POINTWISE


def rows_bytes_held(tokens: int, count: int, group: int, d: int, dtype: Any) -> int:
    """VMEM of either kernel of rows: what is on its way, what is at work, tokens, and what comes of them."""
    size, step = jnp.dtype(dtype).itemsize, rows_a_step(group)
    # Registers hold eight rows at least; tokens may be three terms each.
    thin = 4 * (max(8, 3 * tokens) + max(8, tokens)) * max(d, -(-count * group // step) * step)
    # Rows of 8 bits are made of 32, and then of 16.
    return (AHEAD * size + 4 + max(2, size)) * step * d + thin


# Bytes of rows that are scored together: enough that what a step of a grid costs is little beside.
_SCORED_BYTES = 2**20


def scored_together(n: int, width: int) -> int:
    """Rows of so many bytes that one step scores: whole registers, of which the last may lack some rows."""
    return min(max(LANES, _SCORED_BYTES // width // LANES * LANES), -(-n // LANES) * LANES)


def scores_served(x: Any, q: Any, scale: Any, *, bits: int) -> bool:
    """Whether quantised rows are scored by a kernel: whole lanes of them."""
    n, width = q.shape
    held = 4 * scored_together(n, width) * (width + 2 * max(8, x.shape[0]))
    lanes = width % LANES == 0 and x.shape[1] == width * (8 // bits)
    return 0 not in x.shape and x.shape[0] <= MOST_TOKENS and n >= LANES and lanes and held <= VMEM


def scores_in_two_served(x: Any, basis_q: Any, basis_scale: Any, q: Any, scale: Any) -> bool:
    """Whether scores of scores are one kernel's: each are served, and both are held at once."""
    (r, d), (n, _) = basis_q.shape, q.shape
    on_directions = jax.ShapeDtypeStruct((x.shape[0], r), jnp.float32)
    each = scores_served(x, basis_q, basis_scale, bits=8) and scores_served(on_directions, q, scale, bits=8)
    held = sum(4 * scored_together(*of) * (of[1] + 2 * max(8, x.shape[0])) for of in ((r, d), (n, r)))
    return each and held <= VMEM


def rows_of_lanes(n: int) -> int:
    """Rows of 128 that so many numbers are seen as: whole tiles of them."""
    rows = -(-n // LANES)
    return rows + -rows % (8 if rows <= LANES else LANES)


def open_rows_served(values: Any) -> bool:
    """Whether open rows are found by a kernel: all are kept in VMEM."""
    return jnp.dtype(values.dtype) == jnp.float32 and LANES <= values.shape[0] <= _MOST_SCORES


# What is chosen from at once, and how many: all is kept in VMEM.
_MOST_SCORES, _MOST_CHOSEN = 2**19, 1024


def top_k_served(scores: Any, *, k: int, shards: int) -> bool:
    """Whether the largest are found by a kernel: of f32, not too many."""
    n, own = scores.shape[-1] // shards, -(-k // shards)
    blocks = scores.size // max(1, n)
    few = 0 < blocks <= MOST_TOKENS and LANES <= n <= _MOST_SCORES and own <= min(n, _MOST_CHOSEN)
    return jnp.dtype(scores.dtype) == jnp.float32 and few
