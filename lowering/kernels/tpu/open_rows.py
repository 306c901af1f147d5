"""Where values stand that are not below zero: numbered all at once, and found for as many as there are."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hire_xform.lowering.kernels.tpu.numbering import as_row, iota, numbered, places_of
from hire_xform.lowering.kernels.tpu.shapes import LANES, rows_of_lanes

__all__ = ["open_rows"]


def open_rows(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As ``open_rows`` of ``lowering/primitives``, of f32 ``[n]``."""
    n = values.shape[0]
    rows = rows_of_lanes(n)
    whole = pl.BlockSpec((1, rows * LANES), lambda i: (0, 0))
    index, count = pl.pallas_call(
        functools.partial(_kernel, n=n),
        name="hire_open_rows",
        grid=(1,),
        in_specs=[whole],
        out_specs=[whole, pl.BlockSpec((1, 1), lambda i: (0, 0))],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, rows * LANES), (1, 1))],
        scratch_shapes=[pltpu.VMEM((rows, LANES), jnp.bfloat16), pltpu.VMEM((1, rows), jnp.float32)],
        cost_estimate=pl.CostEstimate(flops=20 * n, bytes_accessed=4 * (n + rows * LANES + 1), transcendentals=0),
    )(values[None])
    return index[0, :n], count[0, 0]


def _kernel(values: Any, index: Any, count: Any, numbers: Any, ends: Any, *, n: int) -> None:
    """See the head of this file.

    Args:
      values: f32 ``[1, rows * 128]``, of which the first ``n`` count.
      index, count: what is found, ``[1, rows * 128]`` and ``[1, 1]``.
      numbers, ends: as ``places_of`` has them.
      n: how many values.
    """
    rows = numbers.shape[0]
    tile = min(rows, LANES)

    def number(part: int, before: jax.Array) -> jax.Array:
        # NaNs are open, too.
        here = values[:, part * tile * LANES : (part + 1) * tile * LANES].reshape(tile, LANES)
        place = (part * tile + iota((tile, LANES), 0)) * LANES + iota((tile, LANES), 1)
        within, until = numbered(~(here < 0.0) & (place < n))
        numbers[part * tile : (part + 1) * tile] = within.astype(jnp.bfloat16)
        ends[:, part * tile : (part + 1) * tile] = as_row(before + until)[:, :tile]
        return before + until[tile - 1 :]

    total = jnp.zeros((1, 1), jnp.float32)
    for part in range(rows // tile):
        total = number(part, total)
    count[...] = total.astype(jnp.int32)
    index[...] = jnp.zeros_like(index)

    def find(part: jax.Array, _: None) -> None:
        wanted = part * LANES + iota((LANES, 1), 0)
        place = jnp.where(wanted < count[...], places_of(wanted, numbers, ends)[2], 0)
        index[:, pl.ds(pl.multiple_of(part * LANES, LANES), LANES)] = as_row(place)

    lax.fori_loop(0, lax.div(jnp.max(total).astype(jnp.int32) + (LANES - 1), LANES), find, None)
