"""Intervals of what takes an axis as a whole: sums, running sums, largest entries, exponentials, counts, orders.

With u half of the last place of a dtype, each addition is off by at most u of its result, and by no more than the
smaller of its operands, as the larger one itself could be the result. So the sum of n terms, in any order and with any
grouping, is off by at most ``sum of min(u M, |a_i|)``, M the sum of their magnitudes, times ``1 + O(n u)``. Call terms
of at least u M large. Of additions in a tree, those of two parts that both hold a large term are fewer than there are
large terms, and each loses u M (one more stands for a result that is rounded again); where just one part does, at most
the other is lost, and these parts have no term in common; and where none does, u of what is added each time, n times
at most. Derived here. It is never more than the ``n u M`` of Higham, Accuracy and Stability of Numerical Algorithms,
section 4.2, and a half to a third of that where the terms are a vocabulary's exponentials, most of which are small.
Each of n running sums is off by as much of the terms that are in it. The ends of an interval are summed here with such
an error of their own, and are moved outwards by that, too, and by what may be flushed to zero in each term. Where
``n u`` is above 1/8, as of thousands of terms added in 16 bits, nothing is known.

The i-th largest of some values rises with each of them, so that the i-th largest of the lower ends and that of the
upper ones hold it, whichever entry it is. *Which* entry it is is known where exactly i others are above it for certain
and no more than i can be: so ties are never taken for decided.

Whole numbers are held in f32, exact below 2^24; at or above it nothing is known. A NaN at either end means, as
elsewhere, that nothing is known, and spreads to all that is made of the axis.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hire_xform.lowering.prove.bounds import U
from hire_xform.lowering.prove.intervals import Interval, narrowed
from hire_xform.lowering.xla.in_line import as_called

__all__ = [
    "Held",
    "Order",
    "counted",
    "exponential",
    "hull",
    "in_order",
    "largest",
    "located",
    "logarithm",
    "lost_in_sums",
    "positions",
    "running",
    "sorted_entries",
    "summed",
    "taken",
    "taken_where_known",
    "whole",
]

# What an exponential or a logarithm may be off by, as a share: 64 u, where good ones are off by two or three.
_FUNCTION = 64.0 * U
# Below it a divisor or an argument may be flushed to zero.
_LEAST = 2.0**-120
_WHOLE = 2.0**24
# Shares of rounding above which nothing is said.
_MOST = 0.125


def whole(value: Interval) -> Interval:
    """An interval of whole numbers, computed exactly unless they are too large for it."""
    known = (jnp.abs(value.low) < _WHOLE) & (jnp.abs(value.high) < _WHOLE)
    return value.map(lambda end: jnp.where(known, end, jnp.nan))


def exponential(a: Interval, dtype: Any) -> Interval:
    """``exp``: never below zero, and zero of minus infinity."""
    low, high = jnp.exp(a.low) * (1.0 - _FUNCTION) - _LEAST, jnp.exp(a.high) * (1.0 + _FUNCTION) + _LEAST
    high = jnp.where(a.high == -jnp.inf, 0.0, high)
    made = Interval(jnp.maximum(low, 0.0), high)
    made = made.map(lambda end: jnp.where(made.high < float(jnp.finfo(dtype).max) / 4.0, end, jnp.nan))
    return narrowed(made, dtype) if jnp.finfo(dtype).bits < 32 else made


def logarithm(a: Interval, dtype: Any) -> Interval:
    """``log``: minus infinity of zero and of what may be flushed to it, unknown of what may be negative."""
    inside = a.map(lambda end: jnp.where(a.low >= 0.0, end, jnp.nan))
    low, high = (jnp.log(end) for end in inside)
    low, high = low - _off(low), jnp.where(inside.high == 0.0, -jnp.inf, high + _off(high))
    made = Interval(jnp.where(inside.low < _LEAST, -jnp.inf, low), high)
    if jnp.finfo(dtype).bits < 32:
        eps = float(jnp.finfo(dtype).eps)
        made = Interval(made.low - _size(made.low) * eps, made.high + _size(made.high) * eps)
    return made


def _off(end: Any) -> Any:
    return _FUNCTION * (1.0 + _size(end))


def _size(end: Any) -> Any:
    return jnp.where(jnp.isinf(end), 0.0, jnp.abs(end))


def lost_in_sums(terms: Any, total: Any, n: int, dtype: Any) -> Any:
    """What each term adds to how far a sum may be from one computed here, as at the head of this file.

    Args:
      terms: their magnitudes, n of each sum.
      total: the sums of these, computed in f32.
      n: how many.
      dtype: what the program adds up in.
    """
    u = float(jnp.finfo(dtype).eps) / 2.0
    if n * u > _MOST:
        return jnp.full_like(terms, jnp.nan)
    # The program's sum, and that of an end here.
    lost = jnp.minimum(u * total, terms) + jnp.minimum(U * total, terms)
    return 1.01 * (1.0 + 7.0 * n * u) * lost + _LEAST


def _spread(low: Any, high: Any, off: Any, sizes: Any, dtype: Any, signed: Any) -> Interval:
    low, high = low - off, high + off
    low = jnp.where(signed, low, jnp.maximum(low, 0.0))
    known = jnp.isfinite(sizes) & (sizes < float(jnp.finfo(dtype).max) / 4.0)
    return Interval(jnp.where(known, low, jnp.nan), jnp.where(known, high, jnp.nan))


def summed(a: Interval, axes: tuple[int, ...], dtype: Any) -> Interval:
    """The sum along axes, in any order."""
    n = 1
    for axis in axes:
        n *= a.low.shape[axis]
    low, high = (jnp.sum(end, axis=axes) for end in a)
    sizes = jnp.sum(a.magnitude, axis=axes, keepdims=True)
    off = jnp.sum(lost_in_sums(a.magnitude, sizes, n, dtype), axis=axes)
    return _spread(low, high, off, jnp.squeeze(sizes, axes), dtype, jnp.any(a.low < 0.0, axis=axes))


def running(a: Interval, axis: int, reverse: bool, dtype: Any) -> Interval:
    """The running sums along an axis, each in any order."""
    sizes = jnp.sum(a.magnitude, axis=axis, keepdims=True)
    lost = lost_in_sums(a.magnitude, sizes, a.low.shape[axis], dtype)
    low, high, off = (lax.cumsum(end, axis=axis, reverse=reverse) for end in (*a, lost))
    return _spread(low, high, off, sizes, dtype, jnp.any(a.low < 0.0, axis=axis, keepdims=True))


def counted(a: Interval, axes: tuple[int, ...]) -> Interval:
    """The sum of whole numbers."""
    made = a.map(lambda end: jnp.sum(end, axis=axes))
    safe = jnp.sum(a.magnitude, axis=axes) < _WHOLE
    return made.map(lambda end: jnp.where(safe, end, jnp.nan))


def largest(a: Interval, axes: tuple[int, ...]) -> Interval:
    """The largest along axes; exact."""
    bad = jnp.any(jnp.isnan(a.low) | jnp.isnan(a.high), axis=axes)
    return a.map(lambda end: jnp.where(bad, jnp.nan, jnp.max(end, axis=axes)))


def _unknown_spreads(a: Interval, axis: int, made: Interval) -> Interval:
    bad = jnp.any(jnp.isnan(a.low) | jnp.isnan(a.high), axis=axis, keepdims=True)
    return made.map(lambda end: jnp.where(bad, jnp.nan, end))


def sorted_entries(a: Interval, axis: int, k: int | None = None) -> Interval:
    """Entries along an axis in ascending order, or the k largest in descending order."""

    def one(end: Any) -> Any:
        if k is None:
            return lax.sort(end, dimension=axis)
        return jnp.moveaxis(lax.top_k(jnp.moveaxis(end, axis, -1), k)[0], -1, axis)

    return _unknown_spreads(a, axis, a.map(one))


def located(a: Interval, axis: int) -> Interval:
    """The place of the largest along an axis, of equal ones the first: decided, or anything."""
    low, high = (jnp.moveaxis(end.astype(jnp.float32), axis, -1) for end in a)
    low, high = jnp.where(jnp.isnan(low), -jnp.inf, low), jnp.where(jnp.isnan(high), jnp.inf, high)
    best = jnp.argmax(low, axis=-1, keepdims=True)
    floor = jnp.take_along_axis(low, best, axis=-1)
    place = jnp.arange(low.shape[-1])
    ahead = jnp.where(place > best, floor >= high, floor > high) | (place == best)
    sure = jnp.all(ahead, axis=-1) & jnp.isfinite(floor[..., 0])
    at = best[..., 0].astype(jnp.float32)
    return Interval(jnp.where(sure, at, 0.0), jnp.where(sure, at, low.shape[-1] - 1.0))


class Order(NamedTuple):
    """Which entries stand where after they are put in order, along the last axis: a permutation that is not certain.

    Attributes:
      keys: what is put in order, the largest first, ``[..., n]``.
      start, step, held: place j has the rank ``start + step * j``, for each j below ``held``.
    """

    keys: Interval
    start: int
    step: int
    held: int

    def cut(self, start: int, step: int, held: int) -> Order:
        """Some of its places."""
        return self._replace(start=self.start + self.step * start, step=self.step * step, held=held)

    @property
    def full(self) -> bool:
        """Whether all entries are there."""
        return self.held == self.keys.low.shape[-1]

    def at(self, places: Interval) -> Interval:
        """The entries at some places, ``[..., m]``: decided, or not known."""
        n = self.keys.low.shape[-1]
        known = (places.low == places.high) & (places.low >= 0) & (places.low < self.held)
        place = jnp.where(known, places.low, 0.0).astype(jnp.int32)
        rank = self.start + self.step * place
        low, high = self.keys
        ahead = 1 + max(self.start, self.start + self.step * (self.held - 1))
        first = lax.top_k(low, ahead)[1]
        entry = jnp.take_along_axis(first, rank, axis=-1)
        own_low, own_high = (jnp.take_along_axis(end, entry, axis=-1)[..., None] for end in (low, high))
        others = jnp.arange(n) != entry[..., None]
        above = jnp.sum((low[..., None, :] > own_high) & others, axis=-1)
        maybe = jnp.sum(~(high[..., None, :] < own_low) & others, axis=-1)
        sure = known & (above == rank) & (maybe == rank)
        sure &= ~jnp.any(jnp.isnan(low) | jnp.isnan(high), axis=-1, keepdims=True)
        found = jnp.where(sure, entry.astype(jnp.float32), jnp.nan)
        return Interval(found, found)


# What a step of a chain may make.
Held = Interval | Order


def positions(order: Order) -> Interval:
    """For each entry the least and the largest place that it can have, ``[..., n]``.

    They may be beyond the last one of an order that is cut short. Of one that is cut at its beginning, or in steps,
    nothing is known.
    """
    low, high = order.keys
    n = low.shape[-1]
    flat_low, flat_high = low.reshape(-1, n), high.reshape(-1, n)

    def ranks(low: Any, high: Any) -> tuple[Any, Any]:
        surely = n - jnp.searchsorted(jnp.sort(low), high, side="right")
        maybe = n - jnp.searchsorted(jnp.sort(high), low, side="left") - 1
        return surely, maybe

    with as_called():  # searches are loops
        first, last = jax.vmap(ranks)(flat_low, flat_high)
    bad = jnp.any(jnp.isnan(flat_low) | jnp.isnan(flat_high), axis=-1, keepdims=True)
    first, last = jnp.where(bad, 0, first), jnp.where(bad, n - 1, last)
    first, last = (end.reshape(low.shape).astype(jnp.float32) for end in (first, last))
    if order.step == -1 and order.start == n - 1:
        first, last = n - 1.0 - last, n - 1.0 - first
    elif (order.start, order.step) != (0, 1):
        first, last = jnp.zeros_like(first), jnp.full_like(last, n - 1.0)
    return Interval(first, last)


def in_order(values: Interval, order: Order) -> Interval:
    """What may stand at each place of an order of other keys: ``[..., n]`` entries at the places that are held.

    Each entry goes to all places that it can have: to two overlapping blocks of as many as a power of two has, and
    from larger blocks to the halves of them.
    """
    n = values.low.shape[-1]
    span = positions(order._replace(start=0, step=1, held=n))
    first, last = (end.reshape(-1, n).astype(jnp.int32) for end in span)
    level = 31 - lax.clz(last - first + 1)
    rows = jnp.arange(first.shape[0])[:, None]
    truth, values = values.low.dtype == jnp.bool_, values.map(lambda end: end.astype(jnp.float32))
    unknown = jnp.isnan(values.low) | jnp.isnan(values.high)
    low, high = (
        jnp.where(unknown, fill, end).reshape(-1, n) for end, fill in zip(values, (-jnp.inf, jnp.inf), strict=True)
    )
    levels = n.bit_length()
    made = []
    for end, fill, least in ((low, jnp.inf, True), (high, -jnp.inf, False)):
        table = jnp.full((levels, *end.shape), fill)
        for at in (first, last - (1 << level) + 1):
            there = table.at[level, rows, at]
            table = there.min(end) if least else there.max(end)
        meet = jnp.minimum if least else jnp.maximum
        held = table[levels - 1]
        for number in range(levels - 2, -1, -1):
            half = 1 << number
            behind = jnp.concatenate([jnp.full_like(held[:, :half], fill), held[:, : n - half]], axis=1)
            held = meet(table[number], meet(held, behind))
        made.append(held.reshape(values.low.shape))
    places = order.start + order.step * jnp.arange(order.held)
    low, high = (jnp.take(end, places, axis=-1) for end in made)
    if truth:
        return Interval(low > 0.5, high > 0.5)
    return Interval(jnp.where(high < jnp.inf, low, jnp.nan), jnp.where(high < jnp.inf, high, jnp.nan))


def hull(values: Interval, places: Interval) -> Interval:
    """What may stand at uncertain places: from values ``[..., n]`` and places ``[..., m]``, ``[..., m]``.

    Of places that may lie outside of the values nothing is known. The least and the largest of a range come from two
    overlapping blocks of as many entries as a power of two has, of a table with all such blocks.
    """
    n = values.low.shape[-1]
    lead = jnp.broadcast_shapes(values.low.shape[:-1], places.low.shape[:-1])
    truth = values.low.dtype == jnp.bool_
    unknown = jnp.isnan(values.low.astype(jnp.float32)) | jnp.isnan(values.high.astype(jnp.float32))
    low = jnp.where(unknown, -jnp.inf, values.low.astype(jnp.float32))
    high = jnp.where(unknown, jnp.inf, values.high.astype(jnp.float32))
    inside = (places.low >= 0) & (places.high <= n - 1) & (places.low <= places.high)
    first = jnp.where(inside, places.low, 0.0).astype(jnp.int32)
    last = jnp.where(inside, places.high, 0.0).astype(jnp.int32)
    first, last = (jnp.broadcast_to(end, (*lead, end.shape[-1])) for end in (first, last))
    tables = [(low, high)]
    for level in range(max(n - 1, 0).bit_length()):
        far = 1 << level
        behind = [
            jnp.concatenate([end[..., far:], jnp.full_like(end[..., :far], fill)], axis=-1)
            for end, fill in zip(tables[-1], (jnp.inf, -jnp.inf), strict=True)
        ]
        tables.append((jnp.minimum(tables[-1][0], behind[0]), jnp.maximum(tables[-1][1], behind[1])))
    length = last - first + 1
    levels = 31 - lax.clz(length)
    found_low, found_high = jnp.full(length.shape, jnp.inf), jnp.full(length.shape, -jnp.inf)
    for number, (below, above) in enumerate(tables):
        below, above = (jnp.broadcast_to(end, (*lead, n)) for end in (below, above))
        size = 1 << number
        for at in (first, jnp.maximum(last - size + 1, 0)):
            here = jnp.minimum(at, n - 1)
            found_low = jnp.where(
                levels == number, jnp.minimum(found_low, jnp.take_along_axis(below, here, axis=-1)), found_low
            )
            found_high = jnp.where(
                levels == number, jnp.maximum(found_high, jnp.take_along_axis(above, here, axis=-1)), found_high
            )
    if truth:
        return Interval(inside & (found_low > 0.5), ~inside | (found_high > 0.5))
    known = inside & (found_high < jnp.inf)
    return Interval(jnp.where(known, found_low, jnp.nan), jnp.where(known, found_high, jnp.nan))


def taken(values: Interval | Order, places: Interval) -> Interval:
    """What is taken along the last axis at places that are not certain."""
    return values.at(places) if isinstance(values, Order) else hull(values, places)


def taken_where_known(values: Interval, places: Interval) -> Interval:
    """What is taken along the last axis, ``[..., m]``, at places that are decided; of others nothing is known."""
    known = places.low == places.high
    place = jnp.where(known, places.low, 0.0).astype(jnp.int32)
    low, high = (jnp.take_along_axis(end, place, axis=-1) for end in values)
    if low.dtype == jnp.bool_:
        return Interval(known & low, ~known | high)
    return Interval(jnp.where(known, low, jnp.nan), jnp.where(known, high, jnp.nan))
