"""Products with, and sums of, chosen rows: each slab of rows is copied from HBM to VMEM once, and nothing else is.

Rows of int8 are multiplied as bfloat16, which holds them; what they are times is put to tokens or to sums.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hire_xform.lowering.kernels.folding import folded
from hire_xform.lowering.kernels.results import result
from hire_xform.lowering.kernels.tpu.placing import in_hbm
from hire_xform.lowering.kernels.tpu.shapes import AHEAD, MOST_TOKENS, bytes_of_slabs, rows_a_step
from hire_xform.lowering.kernels.tpu.slabs import PARAMS, Slabs, stream

__all__ = ["combine_rows", "dot", "select_rows_dot", "summed", "terms"]


def select_rows_dot(
    x: jax.Array, rows: jax.Array, index: jax.Array, group: int, magnitudes: bool, scale: jax.Array | None = None
) -> jax.Array:
    """As ``select_rows_dot`` of ``lowering/primitives``, f32 ``[T, K * group]``.

      With a ``scale`` the rows are int8 times that: of each row, ``[n / r, 1]``, or of each column, ``[n / r, d]``, of
    which all that are chosen then have one row.
    """
    given = () if scale is None else (scale,)

    def step(x: jax.Array, rows: jax.Array, index: jax.Array, *scale: jax.Array) -> jax.Array:
        return _by_index(functools.partial(_select, group=group, magnitudes=magnitudes), x, rows, index, *scale)

    return folded(step, x, rows, index, *given)


def combine_rows(
    h: jax.Array, rows: jax.Array, index: jax.Array, group: int, scale: jax.Array | None = None
) -> jax.Array:
    """As ``combine_rows`` there, f32 ``[T, d]``; with a ``scale`` as above."""
    given = () if scale is None else (scale,)

    def step(h: jax.Array, rows: jax.Array, index: jax.Array, *scale: jax.Array) -> jax.Array:
        return _by_index(functools.partial(_combine, group=group), h, rows, index, *scale)

    return folded(step, h, rows, index, *given)


def _by_index(
    fun: Callable[..., jax.Array], x: jax.Array, rows: jax.Array, index: jax.Array, *scale: jax.Array
) -> jax.Array:
    """``fun`` of tokens that share an index, as many at a time as a kernel takes; one by one where each has its own."""
    tokens = x.shape[0]
    if index.ndim == 1 and tokens <= MOST_TOKENS:
        return fun(x, rows, index, *scale)
    if index.ndim == 1:
        missing = -tokens % MOST_TOKENS
        parts = jnp.pad(x, ((0, missing), (0, 0))).reshape(-1, MOST_TOKENS, x.shape[1])
        made = lax.map(lambda part: fun(part, rows, index, *scale), parts)
        return made.reshape(tokens + missing, -1)[:tokens]
    if tokens <= MOST_TOKENS:
        return jnp.concatenate([fun(x[t : t + 1], rows, index[t], *scale) for t in range(tokens)])
    return lax.map(lambda one: fun(one[0][None], rows, one[1], *scale)[0], (x, index))


def _select(
    x: jax.Array, rows: jax.Array, index: jax.Array, *scale: jax.Array, group: int, magnitudes: bool
) -> jax.Array:
    tokens, wanted = x.shape[0], index.shape[0] * group
    of_columns, of_rows = _scales(scale, rows, index, group)
    x = x if of_columns is None else x.astype(jnp.float32) * of_columns
    x = jnp.abs(x) if magnitudes else x
    left = terms(x, rows.dtype)
    step_rows = rows_a_step(group)

    def use(step: jax.Array, block: jax.Array, left: Any, out: Any) -> None:
        block = jnp.abs(block) if magnitudes else block
        made = dot(left[...], block, ((1,), (1,)))
        at = pl.ds(pl.multiple_of(step * step_rows, step_rows), step_rows)
        out[:, at] = summed(made, tokens)

    size = -(-wanted // step_rows) * step_rows
    made = _call(use, left, rows, index, group, (tokens, size), "hire_select_rows_dot")[:, :wanted]
    if of_rows is not None:
        made *= jnp.abs(of_rows) if magnitudes else of_rows
    return made


def _combine(h: jax.Array, rows: jax.Array, index: jax.Array, *scale: jax.Array, group: int) -> jax.Array:
    tokens, given = h.shape
    of_columns, of_rows = _scales(scale, rows, index, group)
    h = h if of_rows is None else h.astype(jnp.float32) * of_rows
    step_rows = rows_a_step(group)
    missing = -given % step_rows
    left = jnp.pad(terms(h, rows.dtype), ((0, 0), (0, missing)))

    def use(step: jax.Array, block: jax.Array, left: Any, out: Any) -> None:
        at = pl.ds(pl.multiple_of(step * step_rows, step_rows), step_rows)
        out[...] += summed(dot(left[:, at], block, ((1,), (0,))), tokens)

    made = _call(use, left, rows, index, group, (tokens, rows.shape[1]), "hire_combine_rows")
    return made if of_columns is None else made * of_columns


def _scales(
    scale: Sequence[jax.Array], rows: jax.Array, index: jax.Array, group: int
) -> tuple[jax.Array | None, jax.Array | None]:
    """What integers are times, f32: of all columns, ``[1, d]``, or of the chosen rows, ``[1, K * group]``; or None."""
    if not scale:
        return None, None
    (own,) = scale
    together = rows.shape[0] // own.shape[0]
    if own.shape[1] > 1:
        # All rows that are chosen have the same one.
        one = (
            own
            if own.shape[0] == 1
            else own.at[lax.div(index[:1] * group, jnp.int32(together))].get(mode="promise_in_bounds")
        )
        return one.astype(jnp.float32), None
    if group % together == 0:
        taken = own.reshape(-1, group // together).at[index].get(mode="promise_in_bounds")
    else:
        taken = own.at[lax.div(index * group, jnp.int32(together))].get(mode="promise_in_bounds")
    taken = jnp.broadcast_to(taken[:, :, None], (*taken.shape, group // taken.shape[1]))
    return None, taken.reshape(1, -1).astype(jnp.float32)


def terms(x: jax.Array, dtype: Any) -> jax.Array:
    """Tokens as the matrix unit multiplies them with rows of a dtype, without a loss.

    Rows of 16 and 8 bits take tokens of 16 bits: those of 32 are the sum of three.
    """
    if jnp.dtype(dtype) == jnp.float32:
        return x.astype(jnp.float32)
    if x.dtype == jnp.bfloat16:
        return x
    parts, rest = [], x.astype(jnp.float32)
    for _ in range(3):
        # The upper half of its bits, and of a NaN all: not a cast there and back, which XLA would drop.
        upper = lax.bitcast_convert_type(rest, jnp.uint32) & jnp.uint32(0xFFFF0000)
        part = jnp.where(rest == rest, lax.bitcast_convert_type(upper, jnp.float32), rest)
        parts.append(part.astype(jnp.bfloat16))
        rest = jnp.where(jnp.abs(part) < jnp.inf, rest - part, 0.0)
    return jnp.concatenate(parts)


def summed(made: jax.Array, tokens: int) -> jax.Array:
    """The products of tokens, from those of their terms: the small ones first."""
    parts = [made[i : i + tokens] for i in range(0, made.shape[0], tokens)]
    return functools.reduce(lax.add, reversed(parts))


def dot(a: jax.Array, b: jax.Array, contracted: tuple[tuple[int], tuple[int]]) -> jax.Array:
    """A product of terms of tokens and rows, f32."""
    precision = lax.Precision.HIGHEST if b.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (contracted, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _call(
    use: Callable[..., None],
    left: jax.Array,
    rows: jax.Array,
    index: jax.Array,
    group: int,
    out_shape: tuple[int, int],
    name: str,
) -> jax.Array:
    """A kernel that has ``use(step, block, left, out)`` called with the chosen rows, ``rows_a_step`` at a time."""
    slabs = Slabs(index.shape[0], group, rows.shape[1], rows.dtype)

    def kernel(
        index_ref: Any, which_ref: Any, left_ref: Any, rows_ref: Any, out_ref: Any, held: Any, sent: Any
    ) -> None:
        def one(step: Any, slot: Any) -> None:
            use(step, slabs.block(held, which_ref, step, slot), left_ref, out_ref)

        out_ref[...] = jnp.zeros_like(out_ref)
        stream(slabs, [rows_ref], [index_ref], held, sent, [one])

    which = slabs.which(index)
    whole = pl.BlockSpec(memory_space=pltpu.VMEM)
    moved = bytes_of_slabs(slabs.count, group, slabs.d, rows.dtype)
    return pl.pallas_call(
        kernel,
        name=name,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(),
            in_specs=[whole, whole, pl.BlockSpec(memory_space=pltpu.HBM)],
            out_specs=whole,
            scratch_shapes=[slabs.held(), pltpu.SemaphoreType.DMA((AHEAD,))],
        ),
        compiler_params=PARAMS,
        out_shape=result(out_shape, jnp.float32),
        cost_estimate=pl.CostEstimate(
            flops=2 * left.shape[0] * slabs.count * group * slabs.d,
            bytes_accessed=moved + left.nbytes + which.nbytes + index.nbytes + 4 * math.prod(out_shape),
            transcendentals=0,
        ),
    )(index, which, left, in_hbm(rows))
