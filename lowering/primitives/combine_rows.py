"""``hire_combine_rows``: exact sums of only the chosen rows of a matrix."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from hire_xform.lowering.primitives.kernels import bind_step, step_primitive
from hire_xform.lowering.primitives.stored_rows import StoredRows, as_operands, rows_at
from hire_xform.lowering.xla.blocks import fold_row_blocks
from hire_xform.lowering.xla.in_line import loop
from hire_xform.lowering.xla.narrow_reads import sliced_on_cpu
from hire_xform.lowering.xla.skinny_dot import skinny_dot_transposed, wide_dtype
from hire_xform.lowering.xla.slabs import block_of, check_rows, each_token

__all__ = ["combine_rows", "combine_rows_p", "combine_stored_rows_p"]

# Slabs that one step of `_walk_rows` adds up.
_ROWS_A_STEP = 8


def combine_rows(
    h: jax.Array,
    rows: jax.Array | StoredRows,
    index: jax.Array,
    *,
    group_size: int = 1,
    preferred_element_type: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """``h @ rows[index]`` with only those rows read.

    Args:
      h: ``[T, K * group_size]``.
      rows: ``[n, d]``, floats or integers, maybe narrower than ``h``; or such times scales.
      index: ``[K]`` or ``[T, K]`` int; counts groups of ``group_size`` rows. Must be in bounds.
      group_size: neighbours read as one slab, a divisor of ``n``.
      preferred_element_type: dtype of the result; None is the operands' common dtype. Sums run in f32 at least.

    Returns:
      ``[T, d]``.

    Raises:
      ValueError, TypeError: shapes or dtypes do not fit.
    """
    check_rows("combine_rows", rows, index, group_size, h.shape[0])
    if h.shape[1] != index.shape[-1] * group_size:
        raise ValueError(
            f"combine_rows: h has shape {h.shape}; expected [T, {index.shape[-1] * group_size}] for this index"
        )
    out_dtype = jnp.result_type(h.dtype, rows.dtype) if preferred_element_type is None else preferred_element_type

    def portable(h: jax.Array, rows: jax.Array | StoredRows, index: jax.Array) -> list[jax.Array]:
        return [_portable(h, rows, index, group_size).astype(out_dtype)]

    settings = {"group_size": group_size, "out_dtype": jnp.dtype(out_dtype)}
    if isinstance(rows, StoredRows):
        arrays, together, told = as_operands(rows)
        form = lambda h, index, *arrays: portable(h, together(*arrays), index)  # noqa: E731
        return bind_step(combine_stored_rows_p, form, h, index, *arrays, **settings, **told)[0]
    return bind_step(combine_rows_p, portable, h, rows, index, **settings)[0]


def _portable(h: jax.Array, rows: jax.Array | StoredRows, index: jax.Array, group_size: int) -> jax.Array:
    common = wide_dtype(h.dtype, rows.dtype)
    h = h.astype(common)

    def gathered(h: jax.Array, index: jax.Array) -> jax.Array:
        def share(part: jax.Array, h_part: jax.Array) -> jax.Array:
            h_part = h_part.reshape(-1, h.shape[0]).T
            return skinny_dot_transposed(h_part, rows_at(rows, part, group_size).astype(common))

        h_groups = h.T.reshape(index.shape[0], group_size, h.shape[0])
        return fold_row_blocks(share, block_of(rows, index, group_size), index, h_groups)

    if index.ndim == 2:
        return each_token(gathered, h, index)
    if isinstance(rows, StoredRows) or index.shape[0] % _ROWS_A_STEP or not sliced_on_cpu(rows.dtype):
        return gathered(h, index)
    in_rows = functools.partial(_walk_rows, rows=rows, group_size=group_size)
    return lax.platform_dependent(h, index, cpu=lambda h, index: in_rows(h, index=index), default=gathered)


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
    return loop(lax.scan, step, zero, (starts, jnp.moveaxis(shares, 1, 0)))[0]


# A kernel: rule(h, rows, index, *, group_size, out_dtype) -> what combine_rows returns.
combine_rows_p = step_primitive("hire_combine_rows")
# A kernel: rule(h, index, values, *others, group_size, out_dtype, operations, shared) -> the same, of rows that are
# stored in few bits, as `StoredRows` has them.
combine_stored_rows_p = step_primitive("hire_combine_stored_rows")
