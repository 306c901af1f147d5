"""``hire_select_rows_dot``: exact products with only the chosen rows of a matrix."""

import jax
import jax.numpy as jnp

from hire_xform.lowering.primitives.kernels import bind_step, step_primitive
from hire_xform.lowering.primitives.stored_rows import StoredRows, as_operands, rows_at
from hire_xform.lowering.xla.blocks import map_row_blocks
from hire_xform.lowering.xla.skinny_dot import skinny_dot, wide_dtype
from hire_xform.lowering.xla.slabs import block_of, check_rows, each_token

__all__ = ["select_rows_dot", "select_rows_dot_p", "select_stored_rows_dot_p"]


def select_rows_dot(
    x: jax.Array,
    rows: jax.Array | StoredRows,
    index: jax.Array,
    *,
    group_size: int = 1,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    magnitudes: bool = False,
) -> jax.Array:
    """``x @ rows[index].T`` with only those rows read.

    Args:
      x: ``[T, d]``.
      rows: ``[n, d]``, floats or integers, maybe narrower than ``x``; or such times scales.
      index: ``[K]`` or ``[T, K]`` int; counts groups of ``group_size`` rows. Must be in bounds.
      group_size: neighbours read as one slab, a divisor of ``n``.
      preferred_element_type: dtype of the result; None is the operands' common dtype. Sums run in f32 at least.
      magnitudes: the same of ``|x|`` and of the rows' magnitudes.

    Returns:
      ``[T, K * group_size]``.

    Raises:
      ValueError, TypeError: shapes or dtypes do not fit.
    """
    check_rows("select_rows_dot", rows, index, group_size, x.shape[0])
    out_dtype = jnp.result_type(x.dtype, rows.dtype) if preferred_element_type is None else preferred_element_type

    def portable(x: jax.Array, rows: jax.Array | StoredRows, index: jax.Array) -> list[jax.Array]:
        return [_portable(x, rows, index, group_size, magnitudes).astype(out_dtype)]

    settings = {"group_size": group_size, "out_dtype": jnp.dtype(out_dtype), "magnitudes": magnitudes}
    if isinstance(rows, StoredRows):
        arrays, together, told = as_operands(rows)
        form = lambda x, index, *arrays: portable(x, together(*arrays), index)  # noqa: E731
        return bind_step(select_stored_rows_dot_p, form, x, index, *arrays, **settings, **told)[0]
    return bind_step(select_rows_dot_p, portable, x, rows, index, **settings)[0]


def _portable(
    x: jax.Array, rows: jax.Array | StoredRows, index: jax.Array, group_size: int, magnitudes: bool
) -> jax.Array:
    common = wide_dtype(x.dtype, rows.dtype)
    x = jnp.abs(x.astype(common)) if magnitudes else x.astype(common)

    def shared(x: jax.Array, index: jax.Array) -> jax.Array:
        def products(part: jax.Array) -> jax.Array:
            slabs = rows_at(rows, part, group_size).astype(common)
            out = skinny_dot(x, jnp.abs(slabs) if magnitudes else slabs)
            return out.T.reshape(part.shape[0], group_size, x.shape[0])

        out = map_row_blocks(products, block_of(rows, index, group_size), index)
        return out.reshape(index.shape[0] * group_size, x.shape[0]).T

    if index.ndim == 1:
        return shared(x, index)
    return each_token(shared, x, index)


# A kernel: rule(x, rows, index, *, group_size, out_dtype, magnitudes) -> what select_rows_dot returns.
select_rows_dot_p = step_primitive("hire_select_rows_dot")
# A kernel: rule(x, index, values, *others, group_size, out_dtype, magnitudes, operations, shared) -> the same, of rows
# that are stored in few bits, as `StoredRows` has them.
select_stored_rows_dot_p = step_primitive("hire_select_stored_rows_dot")
