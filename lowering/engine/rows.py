"""Exact products that read only the chosen rows of a matrix.

A matrix is stored row after row, ``rows [n, d]``. Rows may be chosen in groups of ``g`` neighbours, read as one slab of
``g * d`` contiguous values: ``index`` then counts groups. An ``index`` of one axis is shared by all tokens, one of two
axes holds each token's own choice.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from hire_xform.lowering.xla.blocks import fold_row_blocks, map_row_blocks
from hire_xform.lowering.xla.narrow_reads import read_part, sliced_on_cpu
from hire_xform.lowering.xla.skinny_dot import skinny_dot, skinny_dot_transposed, wide_dtype

__all__ = ["combine_rows", "select_rows_dot"]
# Up to this many bytes the chosen rows are gathered at once. The copy is made in parallel, the same buffer serves every
# layer of a step, and there is no inner loop: a loop inside a scan over layers would first copy the layer's *whole*
# matrix out of the stack (measured on CPU: 0.3 ms against 5.5 ms for 512 of 8,192 rows of 8 KiB). Beyond it, the
# memory matters more and the rows are walked in blocks.
_WHOLE_BYTES = 64 * 2**20
_BLOCK_BYTES = 2**20
# Slabs that one step of `_walk_rows` adds up.
_ROWS_A_STEP = 8
# Up to this many tokens with their own rows are spelled out one by one, for the same reason; more are looped over.
_UNROLLED_TOKENS = 16


def _block(rows: jax.Array, index: jax.Array, group_size: int) -> int:
    """How many entries of ``index`` are gathered together."""
    entry = group_size * rows.shape[1] * rows.dtype.itemsize
    return index.shape[0] if index.shape[0] * entry <= _WHOLE_BYTES else max(1, _BLOCK_BYTES // entry)


def _each_token(fun: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, index: jax.Array) -> jax.Array:
    """``fun(x[t : t + 1], index[t])`` for every token, stacked again."""
    if x.shape[0] <= _UNROLLED_TOKENS:
        return jnp.concatenate([fun(x[t : t + 1], index[t]) for t in range(x.shape[0])])
    return lax.map(lambda pair: fun(pair[0][None], pair[1])[0], (x, index))


def _check(name: str, rows: jax.Array, index: jax.Array, group_size: int, tokens: int) -> None:
    if rows.ndim != 2:
        raise ValueError(f"{name}: rows has shape {rows.shape}; expected [n, d]")
    if group_size < 1 or rows.shape[0] % group_size:
        raise ValueError(f"{name}: group_size={group_size} does not divide the {rows.shape[0]} rows")
    if index.ndim not in (1, 2) or (index.ndim == 2 and index.shape[0] != tokens):
        raise ValueError(f"{name}: index has shape {index.shape}; expected [K] or [{tokens}, K]")
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(f"{name}: index has dtype {index.dtype}; expected integers")


def _slabs(rows: jax.Array, index: jax.Array, group_size: int) -> jax.Array:
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
    of it ahead. What a loop reads it leaves in HBM (seen in programs compiled for v5e by ``test_tpu_compiler.py``).
    """
    plainly = functools.partial(read_part, _gather)
    if index.shape[0] < 2:
        return plainly(slabs, index)

    def in_two_steps(slabs: jax.Array, index: jax.Array) -> jax.Array:
        count = index.shape[0]
        if count % 2:
            index = lax.concatenate([index, lax.slice_in_dim(index, count - 1, count)], 0)
        _, taken = lax.scan(lambda carry, half: (carry, _gather(slabs, half)), None, index.reshape(2, -1))
        return lax.slice_in_dim(lax.collapse(taken, 0, 2), 0, count)

    return lax.platform_dependent(slabs, index, tpu=in_two_steps, default=plainly)


def select_rows_dot(
    x: jax.Array,
    rows: jax.Array,
    index: jax.Array,
    *,
    group_size: int = 1,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    magnitudes: bool = False,
) -> jax.Array:
    """``x @ rows[index].T`` with only those rows read.

    Args:
      x: ``[T, d]``.
      rows: ``[n, d]``, of a floating dtype that may be narrower than that of ``x``.
      index: ``[K]`` or ``[T, K]`` int; counts groups of ``group_size`` rows. Must be in bounds.
      group_size: neighbours read as one slab, a divisor of ``n``.
      preferred_element_type: dtype of the result; None is the operands' common dtype. Sums run in f32 at least.
      magnitudes: the same of ``|x|`` and of the rows' magnitudes.

    Returns:
      ``[T, K * group_size]``.

    Raises:
      ValueError, TypeError: shapes or dtypes do not fit.
    """
    _check("select_rows_dot", rows, index, group_size, x.shape[0])
    out_dtype = jnp.result_type(x.dtype, rows.dtype) if preferred_element_type is None else preferred_element_type
    common = wide_dtype(x.dtype, rows.dtype)
    x = jnp.abs(x.astype(common)) if magnitudes else x.astype(common)

    def shared(x: jax.Array, index: jax.Array) -> jax.Array:
        def products(part: jax.Array) -> jax.Array:
            slabs = _slabs(rows, part, group_size).astype(common)
            out = skinny_dot(x, jnp.abs(slabs) if magnitudes else slabs)
            return out.T.reshape(part.shape[0], group_size, x.shape[0])

        out = map_row_blocks(products, _block(rows, index, group_size), index)
        return out.reshape(index.shape[0] * group_size, x.shape[0]).T

    if index.ndim == 1:
        return shared(x, index).astype(out_dtype)
    return _each_token(shared, x, index).astype(out_dtype)


def combine_rows(
    h: jax.Array,
    rows: jax.Array,
    index: jax.Array,
    *,
    group_size: int = 1,
    preferred_element_type: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """``h @ rows[index]`` with only those rows read.

    Args:
      h: ``[T, K * group_size]``.
      rows: ``[n, d]``, of a floating dtype that may be narrower than that of ``h``.
      index: ``[K]`` or ``[T, K]`` int; counts groups of ``group_size`` rows. Must be in bounds.
      group_size: neighbours read as one slab, a divisor of ``n``.
      preferred_element_type: dtype of the result; None is the operands' common dtype. Sums run in f32 at least.

    Returns:
      ``[T, d]``.

    Raises:
      ValueError, TypeError: shapes or dtypes do not fit.
    """
    _check("combine_rows", rows, index, group_size, h.shape[0])
    if h.shape[1] != index.shape[-1] * group_size:
        raise ValueError(
            f"combine_rows: h has shape {h.shape}; expected [T, {index.shape[-1] * group_size}] for this index"
        )
    out_dtype = jnp.result_type(h.dtype, rows.dtype) if preferred_element_type is None else preferred_element_type
    common = wide_dtype(h.dtype, rows.dtype)
    h = h.astype(common)

    def in_rows(h: jax.Array, index: jax.Array) -> jax.Array:
        return _walk_rows(h, rows, index, group_size)

    def gathered(h: jax.Array, index: jax.Array) -> jax.Array:
        def share(part: jax.Array, h_part: jax.Array) -> jax.Array:
            h_part = h_part.reshape(-1, h.shape[0]).T
            return skinny_dot_transposed(h_part, _slabs(rows, part, group_size).astype(common))

        h_groups = h.T.reshape(index.shape[0], group_size, h.shape[0])
        return fold_row_blocks(share, _block(rows, index, group_size), index, h_groups)

    if index.ndim == 2:
        return _each_token(gathered, h, index).astype(out_dtype)
    if index.shape[0] % _ROWS_A_STEP or not sliced_on_cpu(rows.dtype):
        return gathered(h, index).astype(out_dtype)
    return lax.platform_dependent(h, index, cpu=in_rows, default=gathered).astype(out_dtype)


def _walk_rows(h: jax.Array, rows: jax.Array, index: jax.Array, group_size: int) -> jax.Array:
    """``h @ rows[index]`` a few rows at a time, each added where it lies: XLA's CPU backend fuses a step into one pass.

    No copy of the chosen rows is made. Measured on a CPU, f32, 512 of 8,192 rows of 8 KiB: 0.34 ms on one core, where
    gathering and multiplying takes 0.43 ms on two and 0.76 ms on one.
    """
    tokens, d = h.shape[0], rows.shape[1]
    starts = (index * group_size).reshape(-1, _ROWS_A_STEP)
    shares = h.reshape(tokens, -1, _ROWS_A_STEP * group_size)

    def step(total: jax.Array, one: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        begins, share = one
        for slab in range(_ROWS_A_STEP):
            begin = lax.index_in_dim(begins, slab, keepdims=False)
            start = (begin, lax.full_like(begin, 0))
            taken = lax.dynamic_slice(rows, start, (group_size, d), allow_negative_indices=False).astype(total.dtype)
            for row in range(group_size):
                at = slab * group_size + row
                total = total + lax.slice_in_dim(share, at, at + 1, axis=1) * lax.slice_in_dim(taken, row, row + 1)
        return total, None

    # Inside a shard_map, zeros that vary over the manual axes that any operand does.
    dtype = jnp.promote_types(h.dtype, jnp.float32)
    zero = functools.reduce(lax.add, [lax.full_like(a, 0, dtype, (tokens, d)) for a in (h, rows, index)])
    return lax.scan(step, zero, (starts, jnp.moveaxis(shares, 1, 0)))[0]
