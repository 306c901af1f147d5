"""A search for a number among rising ones, of which both lie in intervals: which places it can end at.

A binary search for v ends at a place i where the entry before it was found to be below v, unless i is 0, and the entry
at i was found not to be, unless there is none. So i is at least the first entry that is not below for certain, and at
most one more than the last that may be below; whether the entries do rise, rounded as they are, does not matter.

A draw by the inverse of the sums looks for ``s (p_0 + .. + p_n)``, with s uniform, among the running sums of shares
``p_i = e_i / Z``. As intervals of their own the two know little of each other: Z, the same in all, would count in each,
and so would the terms that are in both sums. With C the sum of the terms up to an entry and R that of the rest, the
entry is below where ``C < s (C + R)``, whatever Z is; that is linear in C, so that it holds for all C of an interval
where it holds at its ends. Each sum, of the program and of these ends, is off by what ``reductions.py`` says, and each
quotient by a share of itself and by what may be flushed to zero. Derived here.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax

from hire_xform.lowering.prove.bounds import U
from hire_xform.lowering.prove.intervals import Interval
from hire_xform.lowering.prove.reductions import lost_in_sums

__all__ = ["are_below", "are_below_a_share", "place_found"]

# Quotients, and the product with s: each is rounded twice at most, by units as in `intervals.rounded`.
_ROUNDED = 32.0 * U
_LEAST = 2.0**-120
# Divisors, their product, and the sum of what is divided lie well inside of what f32 holds.
_MOST = 2.0**60


def are_below(entries: Interval, sought: Interval, or_equal: bool) -> Interval:
    """Which entries ``[..., n]`` are below a number ``[..., 1]``, or not above it."""
    if or_equal:
        return Interval(entries.high <= sought.low, ~(entries.low > sought.high))
    return Interval(entries.high < sought.low, ~(entries.low >= sought.high))


def are_below_a_share(terms: Interval, share: Interval, divisors: Sequence[Interval]) -> Interval:
    """Which running sums of quotients are below a share of their total, or equal to it, truth values ``[..., n]``.

    Args:
      terms: ``[..., n]``, what is divided, in f32.
      share: ``[..., 1]``.
      divisors: the same for all terms of a row, of any shapes; the terms are divided by one after the other.
    """
    n = terms.low.shape[-1]
    low, high = (lax.cumsum(end, axis=end.ndim - 1) for end in terms)
    rest_low, rest_high = (_behind(end) for end in terms)
    off, total = _ROUNDED * (len(divisors) + 1.0), high[..., -1:]
    lost = lax.cumsum(lost_in_sums(terms.high, total, n, jnp.float32), axis=terms.high.ndim - 1)
    known = jnp.all(terms.low >= 0.0) & jnp.all(high < _MOST)
    least, most = jnp.float32(1.0), jnp.float32(1.0)
    for divisor in divisors:
        low_end, high_end = jnp.min(divisor.low), jnp.max(divisor.high)
        known &= (low_end > 1.0 / _MOST) & (high_end < _MOST)
        least, most = least * jnp.minimum(low_end, 1.0), most * jnp.maximum(high_end, 1.0)
    known &= (least > 1.0 / _MOST) & (most < _MOST)
    known = known & (share.low >= 0.0) & (share.high <= 1.0)
    flushed = (n + 2.0) * _LEAST * most * (len(divisors) + 1.0)

    def surely(at: jnp.ndarray, below: bool) -> jnp.ndarray:
        if below:
            sums = (at + rest_low) * (1.0 - off) - lost[..., -1:]
            return at * (1.0 + off) + lost + flushed < share.low * sums
        sums = (at + rest_high) * (1.0 + off) + lost[..., -1:]
        return at * (1.0 - off) - lost - flushed > share.high * sums

    below, above = (known & surely(low, way) & surely(high, way) for way in (True, False))
    return Interval(below, ~above)


def _behind(terms: jnp.ndarray) -> jnp.ndarray:
    """The sums of all terms behind each."""
    sums = lax.cumsum(terms, axis=terms.ndim - 1, reverse=True)
    return jnp.concatenate([sums[..., 1:], jnp.zeros_like(sums[..., :1])], axis=-1)


def place_found(below: Interval) -> Interval:
    """Where a search ends, ``[...]``, given which entries ``[..., n]`` are below what is sought."""
    n = below.low.shape[-1]
    place = jnp.arange(n, dtype=jnp.float32)
    first = jnp.min(jnp.where(below.low, float(n), place), axis=-1)
    last = jnp.max(jnp.where(below.high, place + 1.0, 0.0), axis=-1)
    return Interval(first, last)
