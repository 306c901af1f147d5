"""The k largest of scores, exactly, without sorting them: scores are read once and stay in VMEM until all is found.

The k-th largest is found digit by digit, from the top, by counting how many scores are at least as large. Those above
it, and as many of its equals as are wanted, the first ones, are numbered by products with triangles of ones; for each
number the row of 128 scores that has it, and the place in it, are found by comparing. Of the few that are left each
one's rank is how many others come before it. All of this is integers, so that ties, infinities and NaNs are as in
``da_top_k``.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hire_xform.lowering.kernels.keys import LOWEST, turned
from hire_xform.lowering.kernels.results import result
from hire_xform.lowering.kernels.tpu.numbering import as_row, dot, iota, numbered, places_of
from hire_xform.lowering.kernels.tpu.shapes import LANES, rows_of_lanes

__all__ = ["top_k"]


def top_k(scores: jax.Array, k: int, shards: int) -> tuple[jax.Array, jax.Array]:
    """As ``da_top_k`` of f32 scores whose last axis the shards divide."""
    *lead, n = scores.shape
    block, own = n // shards, -(-k // shards)
    values, index = _blocks(scores.reshape(-1, block), own)
    index = index.reshape(*lead, shards, own) + (jnp.arange(shards, dtype=jnp.int32) * block)[:, None]
    return values.reshape(*lead, shards * own), index.reshape(*lead, shards * own)


def _blocks(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The best ``k`` of each row of ``[B, n]``."""
    count, n = scores.shape
    rows = rows_of_lanes(n)
    size = -(-k // LANES) * LANES
    found = pl.BlockSpec((1, 1, size), lambda i: (i, 0, 0))
    values, index = pl.pallas_call(
        functools.partial(_kernel, n=n, k=k),
        name="hire_top_k",
        grid=(count,),
        # Of a last row that is not whole the rest may hold anything.
        in_specs=[pl.BlockSpec((1, 1, rows * LANES), lambda i: (i, 0, 0))],
        out_specs=[found, found],
        out_shape=[result((count, 1, size), dtype) for dtype in (jnp.float32, jnp.int32)],
        scratch_shapes=[
            pltpu.VMEM((rows, LANES), jnp.int32),
            pltpu.VMEM((rows, LANES), jnp.bfloat16),
            pltpu.VMEM((1, rows), jnp.float32),
            *[pltpu.VMEM((size, 1), jnp.int32)] * 2,
            pltpu.VMEM((1, size), jnp.int32),
        ],
        cost_estimate=pl.CostEstimate(
            flops=40 * count * rows * LANES, bytes_accessed=4 * count * n + 8 * count * size, transcendentals=0
        ),
    )(scores[:, None])
    return values[:, 0, :k], index[:, 0, :k]


def _kernel(
    scores: Any,
    values: Any,
    index: Any,
    keys: Any,
    numbers: Any,
    ends: Any,
    key: Any,
    place: Any,
    across: Any,
    *,
    n: int,
    k: int,
) -> None:
    """See the head of this file.

    Args:
      scores: f32 ``[1, 1, rows * 128]``, of which the first ``n`` count.
      values, index: what is found, ``[1, 1, size]``, the first ``k`` of it.
      keys: scores as integers of the same order.
      numbers: for each score how many up to it are chosen in its row.
      ends: for each row how many are chosen up to its end.
      key, place: of each of those chosen its key and where it stands, in that order.
      across: these keys, along lanes.
      n, k: how many scores, and how many are to be found.
    """
    keys[...] = _ordered(scores[0].reshape(keys.shape), n)
    kth = _kth(keys, k)
    _number(keys, kth, k, numbers, ends)
    size = key.shape[0]

    def collect(part: jax.Array, _: None) -> None:
        at = pl.ds(pl.multiple_of(part * LANES, LANES), LANES)
        wanted = part * LANES + iota((LANES, 1), 0)
        found, where = _collected(wanted, keys, numbers, ends)
        key[at] = jnp.where(wanted < k, found, LOWEST)
        place[at] = where
        across[:, at] = as_row(key[at])

    lax.fori_loop(0, size // LANES, collect, None)
    _by_rank(key, place, across, values, index)


def _ordered(scores: jax.Array, n: int) -> jax.Array:
    """Integers in the order of scores, NaNs the largest; those that do not count are below all."""
    raw = pltpu.bitcast(jnp.where(scores != scores, jnp.float32(jnp.nan), scores), jnp.int32)
    raw = turned(raw)
    if n == scores.size:
        return raw
    place = LANES * iota(raw.shape, 0) + iota(raw.shape, 1)
    return jnp.where(place < n, raw, LOWEST)


def _count(mask: jax.Array) -> jax.Array:
    return jnp.sum(jnp.sum(mask.astype(jnp.int32), axis=0, keepdims=True), axis=1, keepdims=True)


def _kth(keys: Any, k: int) -> jax.Array:
    """The k-th largest key, ``[1, 1]``."""
    # Counts wait for one another: of few keys several are made at once.
    bits = 4 if keys.shape[0] <= 64 else 2

    def digit(step: jax.Array, least: jax.Array) -> jax.Array:
        shift = 32 - bits * (step + 1)
        reached = least
        for value in range(1, 2**bits):
            tried = least + lax.shift_left(jnp.int32(value), shift)
            reached = jnp.where(_count(keys[...] >= tried) >= k, tried, reached)
        return reached

    return lax.fori_loop(0, 32 // bits, digit, jnp.full((1, 1), LOWEST, jnp.int32))


def _number(keys: Any, kth: jax.Array, k: int, numbers: Any, ends: Any) -> None:
    """Numbers the keys that are chosen: those above the k-th, and its equals as long as some are missing."""
    rows = keys.shape[0]
    tile = min(rows, LANES)
    missing = (k - _count(keys[...] > kth)).astype(jnp.float32)

    def some(part: Any, before: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        at = pl.ds(part * tile, tile)
        here, (equal_before, chosen_before) = keys[at], before
        within, until = numbered(here == kth)
        chosen = (here > kth) | ((here == kth) & (equal_before + until - within[:, LANES - 1 :] + within <= missing))
        equal_before += until[tile - 1 :]
        within, until = numbered(chosen)
        numbers[at] = within.astype(jnp.bfloat16)
        row = as_row(chosen_before + until)
        if tile == rows:
            ends[...] = row[:, :rows]
        else:
            ends[:, at] = row
        return equal_before, chosen_before + until[tile - 1 :]

    none = jnp.zeros((1, 1), jnp.float32)
    lax.fori_loop(0, rows // tile, some, (none, none))


def _collected(wanted: jax.Array, keys: Any, numbers: Any, ends: Any) -> tuple[jax.Array, jax.Array]:
    """The keys with these numbers, ``[128, 1]``, and where they stand."""
    rows, lane, place = places_of(wanted, numbers, ends)
    here, key = iota((LANES, LANES), 1) == lane, jnp.zeros((LANES, 1), jnp.int32)
    for shift in range(0, 32, 8):
        byte = (lax.shift_right_logical(keys[...], shift) & 255).astype(jnp.float32).astype(jnp.bfloat16)
        one = jnp.sum(jnp.where(here, dot(rows, byte), 0.0), axis=1, keepdims=True)
        key = key | lax.shift_left(one.astype(jnp.int32), shift)
    return key, place


def _by_rank(key: Any, place: Any, across: Any, values: Any, index: Any) -> None:
    """Puts those collected, the first of equal ones first, where their rank says."""
    size = key.shape[0]

    def some(part: jax.Array, made: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        at = pl.ds(pl.multiple_of(part * LANES, LANES), LANES)
        own, mine = key[at], part * LANES + iota((LANES, 1), 0)
        before = (across[...] > own) | ((across[...] == own) & (iota((1, size), 1) < mine))
        here = iota((1, size), 1) == jnp.sum(before.astype(jnp.int32), axis=1, keepdims=True)
        found, where = (jnp.sum(jnp.where(here, a, 0), axis=0, keepdims=True) for a in (own, place[at]))
        return made[0] + found, made[1] + where

    none = jnp.zeros((1, size), jnp.int32)
    found, where = lax.fori_loop(0, size // LANES, some, (none, none))
    values[0] = pltpu.bitcast(turned(found), jnp.float32)
    index[0] = where
