"""The k largest of scores, exactly, without sorting them.

One program holds up to 16,384 scores in registers, as integers of the same order. It finds the k-th largest by counting
how many are at least as large as a guess, and numbers by a scan those above it and as many of its equals, the first
ones, as are wanted. Of more scores the largest of each group of neighbours is taken first: the k largest of all are
among the k groups whose largest are the k largest, of equal ones the first. At last each one's rank is how many others
come before it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from hire_xform.lowering.kernels.gpu.calls import call, padded
from hire_xform.lowering.kernels.gpu.shapes import neighbours
from hire_xform.lowering.kernels.keys import LOWEST, turned

__all__ = ["top_k"]

_HIGHEST = 2**31 - 1
# Of groups: scores that a program reads. Of ranks: those that a program finds, and how many it compares them with.
_READ, _RANKED, _COMPARED = 2048, 32, 128


def top_k(
    scores: jax.Array, k: int, shards: int, ordered: bool = True, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """As ``da_top_k`` of floating scores whose last axis the shards divide; not ``ordered``, as they stand."""
    *lead, n = scores.shape
    block, own = n // shards, -(-k // shards)
    values, index = _largest(scores.reshape(-1, block).astype(jnp.float32), own, ordered, interpret)
    index = index.reshape(*lead, shards, own) + (jnp.arange(shards, dtype=jnp.int32) * block)[:, None]
    return values.astype(scores.dtype).reshape(*lead, shards * own), index.reshape(*lead, shards * own)


def _largest(scores: jax.Array, k: int, ordered: bool, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """The best ``k`` of each row of f32 ``[B, n]``."""
    (count, n), group = scores.shape, neighbours(scores.shape[1], k)
    if group == 1:
        found = _chosen(scores, (), k, n, 1, interpret)
    else:
        groups = -(-n // group)
        high = _READ // group
        kernel = functools.partial(_maxima, n=n, groups=groups, group=group, high=high)
        made = jax.ShapeDtypeStruct((count, groups), jnp.int32)
        grid = (count, -(-groups // high))
        maxima = call(kernel, "largest_of_groups", made, grid, scores, warps=4, interpret=interpret)
        _, best = _chosen(maxima, (), k, groups, 1, interpret)
        found = _chosen(scores, (best,), k, k * group, group, interpret)
    if not ordered:
        return lax.bitcast_convert_type(turned(found[0][:, :k]), jnp.float32), found[1][:, :k]
    kernel, grid = functools.partial(_ranked, k=k), (count, -(-k // _RANKED))
    wide = grid[1] * _RANKED
    out = jax.ShapeDtypeStruct((count, wide), jnp.float32), jax.ShapeDtypeStruct((count, wide), jnp.int32)
    values, index = call(kernel, "by_rank", out, grid, *found, warps=4, interpret=interpret)
    return values[:, :k], index[:, :k]


def _chosen(
    scores: jax.Array, groups: tuple[jax.Array, ...], k: int, count: int, group: int, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """The best ``k`` of ``count`` entries of each row, in their order: as integers of that of scores, and their places.

    Args:
      scores: f32, or such integers, ``[B, n]``.
      groups: which groups the entries are in, ``[B, count / group]`` ascending; without them, all groups.
      k: how many.
      count: entries of a row.
      group: neighbours in a group.
      interpret: as in ``call``.
    """
    size, rows = padded(count), scores.shape[0]
    kernel = functools.partial(_choose, n=scores.shape[1], count=count, size=size, k=k, group=group)
    # The interpreter writes what is masked, too: as it was, but it has to have a place.
    out = (jax.ShapeDtypeStruct((rows, size if interpret else k), jnp.int32),) * 2
    warps = max(4, min(32, size // 256))
    keys, index = call(kernel, "largest", out, (rows,), scores, *groups, warps=warps, interpret=interpret)
    return keys, index


def _ordered(scores: jax.Array, inside: jax.Array) -> jax.Array:
    """Integers in the order of scores, NaNs the largest; those that do not count are below all."""
    keys = scores
    if scores.dtype != jnp.int32:
        keys = turned(lax.bitcast_convert_type(jnp.where(scores != scores, jnp.nan, scores), jnp.int32))
    return jnp.where(inside, keys, LOWEST)


def _maxima(scores_ref: Any, out_ref: Any, *, n: int, groups: int, group: int, high: int) -> None:
    which, own = pl.program_id(0), pl.program_id(1) * high + jnp.arange(high)
    place = own[:, None] * group + jnp.arange(group)[None, :]
    inside = place < n
    keys = _ordered(triton.load(scores_ref.at[which, place], mask=inside, other=0), inside)
    triton.store(out_ref.at[which, own], jnp.max(keys, axis=1), mask=own < groups)


def _choose(scores_ref: Any, *refs: Any, n: int, count: int, size: int, k: int, group: int) -> None:
    *group_refs, keys_ref, index_ref = refs
    which, slot = pl.program_id(0), jnp.arange(size)
    inside, place = slot < count, slot
    for ref in group_refs:
        shift = group.bit_length() - 1
        first = triton.load(ref.at[which, lax.shift_right_logical(slot, shift)], mask=inside, other=0)
        place = first * group + (slot & (group - 1))
        inside &= place < n
    keys = _ordered(triton.load(scores_ref.at[which, place], mask=inside, other=0), inside)
    kth = _kth(keys, inside, k)
    above, equal = keys > kth, inside & (keys == kth)
    missing = k - jnp.sum(above.astype(jnp.int32))
    # Both are numbered by one scan: no more than 2^15 are above, or equal.
    numbers = jnp.cumsum(above.astype(jnp.int32) + lax.shift_left(equal.astype(jnp.int32), 16))
    equals = lax.shift_right_logical(numbers, 16)
    chosen = above | (equal & (equals <= missing))
    until = (numbers & 0xFFFF) + jnp.minimum(equals, missing)
    at = jnp.where(chosen, until - 1, k + slot - until)
    triton.store(keys_ref.at[which, at], keys, mask=chosen)
    triton.store(index_ref.at[which, at], place, mask=chosen)


def _kth(keys: jax.Array, inside: jax.Array, k: int) -> jax.Array:
    """A number that ``k`` keys or more are not below, and fewer than ``k`` are above."""

    def not_below(least: jax.Array) -> jax.Array:
        return jnp.sum((keys >= least).astype(jnp.int32))

    def unsure(bounds: tuple[jax.Array, jax.Array]) -> jax.Array:
        return bounds[0] < bounds[1]

    def halved(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        tried = (low | high) - lax.shift_right_arithmetic(low ^ high, 1)
        found = not_below(tried)
        # Exactly as many: it is found.
        high = jnp.where(found == k, tried, jnp.where(found > k, high, tried - 1))
        return jnp.where(found >= k, tried, low), high

    low, high = jnp.min(jnp.where(inside, keys, _HIGHEST)), jnp.max(keys)
    # Of a block most units are often zero, and then it is one of these: nothing between is tried.
    lowest = not_below(low + 1) < k
    low, _ = lax.while_loop(unsure, halved, (low, jnp.where(lowest, low, high)))
    return low


def _ranked(keys_ref: Any, index_ref: Any, values_ref: Any, out_ref: Any, *, k: int) -> None:
    which, own = pl.program_id(0), pl.program_id(1) * _RANKED + jnp.arange(_RANKED)
    inside = own < k
    key = triton.load(keys_ref.at[which, own], mask=inside, other=LOWEST)

    def compared(block: Any, seen: jax.Array) -> jax.Array:
        other = block * _COMPARED + jnp.arange(_COMPARED)
        theirs = triton.load(keys_ref.at[which, other], mask=other < k, other=LOWEST)[None, :]
        first = (theirs > key[:, None]) | ((theirs == key[:, None]) & (other[None, :] < own[:, None]))
        return seen + first.astype(jnp.int32)

    seen = lax.fori_loop(0, -(-k // _COMPARED), compared, jnp.zeros((_RANKED, _COMPARED), jnp.int32))
    rank = jnp.where(inside, jnp.sum(seen, axis=1), own)
    value = lax.bitcast_convert_type(turned(key), jnp.float32)
    triton.store(values_ref.at[which, rank], value, mask=inside)
    triton.store(out_ref.at[which, rank], triton.load(index_ref.at[which, own], mask=inside, other=0), mask=inside)
