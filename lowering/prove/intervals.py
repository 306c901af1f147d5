"""Intervals that hold what a program computes in floating point, whatever it fuses and however it rounds.

An interval is two arrays between which a value of the dense program lies. Sums, products, quotients and roots that are
rounded to nearest rise with what goes into them, so that the ends of an interval, computed alike, enclose the result;
:func:`rounded` then moves both ends outwards by more than one rounding in the result's dtype. That covers a compiler
that leaves a rounding out (a fused multiply and add, 16 bits kept in f32) and operations that are off by some units in
the last place. In 16 bits a rounding is half of the last place, so that each one that a compiler may make on the way
counts: a power is made of products, a quotient by a constant is a product with its inverse, one over a root is made of
the root, a logistic function of an exponential, a sum and a quotient. What is exactly zero stays so: zero times
anything finite, the larger of zero and less.

A NaN at either end means that nothing is known: of what overflows, of a quotient by what may be zero, of a root of what
may be negative. No comparison with it holds, so it proves nothing.

Truth values are intervals of bool: ``low`` where it is certain, ``high`` where it is possible.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hire_xform.lowering.prove.bounds import U

__all__ = [
    "Interval",
    "absolute",
    "added",
    "both",
    "chosen_of",
    "either",
    "equal",
    "greater",
    "interval",
    "larger",
    "multiplied",
    "narrowed",
    "negated",
    "negative",
    "point",
    "power",
    "quotient",
    "root",
    "rounded",
    "rounded_up",
    "sloped",
    "smaller",
]

# A few units in the last place of f32, which some operations on some platforms are off by.
_UNITS = 8.0 * U
# What an approximation of a bounded function (tanh, logistic, erf) may be off by; they are good to some 1e-6.
_APPROXIMATION = 2.0**-14


class Interval(NamedTuple):
    """Two f32 arrays (or two of bool) that broadcast against each other; arithmetic is that of f32."""

    low: Any
    high: Any

    def __add__(self, other: Any) -> Interval:
        """The sum."""
        return added(self, interval(other), jnp.float32)

    def __radd__(self, other: Any) -> Interval:
        """The sum."""
        return added(self, interval(other), jnp.float32)

    def __sub__(self, other: Any) -> Interval:
        """The difference."""
        return added(self, negative(interval(other)), jnp.float32)

    def __mul__(self, other: Any) -> Interval:
        """The product."""
        return multiplied(self, interval(other), jnp.float32)

    def __rmul__(self, other: Any) -> Interval:
        """The product."""
        return multiplied(self, interval(other), jnp.float32)

    def __rtruediv__(self, other: Any) -> Interval:
        """The quotient."""
        return quotient(interval(other), self, jnp.float32)

    @property
    def zero(self) -> jax.Array:
        """Where it is exactly zero."""
        return (self.low == 0.0) & (self.high == 0.0)

    @property
    def decided(self) -> jax.Array:
        """Where a truth value is certain, either way."""
        return self.low == self.high

    @property
    def magnitude(self) -> jax.Array:
        """The largest absolute value in it; NaN where nothing is known."""
        return jnp.maximum(jnp.abs(self.low), jnp.abs(self.high))

    def map(self, fun: Callable[[Any], Any]) -> Interval:
        """Both ends moved alike, as by a gather."""
        return Interval(fun(self.low), fun(self.high))


def point(value: Any) -> Interval:
    """What is known exactly: a number, or an array of f32, 16 bits or bool."""
    value = jnp.asarray(value)
    value = value if value.dtype == jnp.bool_ else value.astype(jnp.float32)
    return Interval(value, value)


def interval(value: Any) -> Interval:
    """The interval itself, or that of a number or an array."""
    return value if isinstance(value, Interval) else point(value)


def _relative(dtype: Any, units: float = _UNITS) -> float:
    kind = jnp.finfo(dtype)
    return units + (0.51 * float(kind.eps) if kind.bits < 32 else 0.0)


def rounded(value: Interval, dtype: Any, floor: Any = None, times: int = 1) -> Interval:
    """What a result in this interval may be after it is rounded to a dtype; where it may overflow, nothing is known.

    Args:
      value: the interval of the result before rounding, its ends computed in f32.
      dtype: f32, bf16 or f16.
      floor: what the result is not below, whatever is rounded; None for no such thing.
      times: how often it may be rounded on the way, each time by a share of it; three at most.
    """
    kind = jnp.finfo(dtype)
    # (1 + eps / 2)^3 is less than 1 + 3 * 0.51 eps.
    relative = times * _relative(dtype)
    least, most = float(kind.tiny), float(kind.max) / 4.0
    low = value.low - jnp.abs(value.low) * relative - least
    high = value.high + jnp.abs(value.high) * relative + least
    low = low if floor is None else jnp.maximum(low, floor)
    known = (jnp.abs(low) <= most) & (jnp.abs(high) <= most)
    return Interval(jnp.where(known, low, jnp.nan), jnp.where(known, high, jnp.nan))


def rounded_up(upper: Any, dtype: Any) -> jax.Array:
    """An upper bound of a value, f32, as one of the value and of what it is rounded to in a dtype.

    What is at most zero stays so. Of f32 nothing is added: an equation that is replayed on a bound rounds as it does.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        return jnp.ceil(upper)
    kind = jnp.finfo(dtype)
    if kind.bits >= 32:
        return upper
    off = jnp.abs(upper) * float(kind.eps) + float(kind.tiny)
    above = jnp.where(upper > 0.0, upper + off, jnp.minimum(upper + off, 0.0))
    return jnp.where(above <= float(kind.max) / 4.0, above, jnp.nan)


def _exactly_zero(zero: Any, value: Interval) -> Interval:
    """Zero where it is certain. What is not known stays so: a NaN times zero is none."""
    known = zero & ~jnp.isnan(value.low) & ~jnp.isnan(value.high)
    return Interval(jnp.where(known, 0.0, value.low), jnp.where(known, 0.0, value.high))


def narrowed(a: Interval, dtype: Any) -> Interval:
    """A value rounded to 16 bits."""
    return _exactly_zero(a.zero, rounded(a, dtype, jnp.where(a.low >= 0.0, 0.0, -jnp.inf)))


def _floor(a: Interval, b: Interval) -> jax.Array:
    """What a sum or a product of two is not below: zero where neither is."""
    return jnp.where((a.low >= 0.0) & (b.low >= 0.0), 0.0, -jnp.inf)


def added(a: Interval, b: Interval, dtype: Any) -> Interval:
    """The sum of two.

    A compiler may make ``x + (c + d)`` of ``(x + c) + d``, where it knows c and d, and round ``c + d``: by a share of
    ``|c| + |d|``, which may be far more than both sums. What the lesser operand would round by is more than that, taken
    with what the sums do: ``|c| <= |x + c| + |x|``.
    """
    lost = _relative(dtype, 2.0 * U) * jnp.minimum(a.magnitude, b.magnitude)
    made = rounded(Interval(a.low + b.low - lost, a.high + b.high + lost), dtype, _floor(a, b))
    return _exactly_zero(a.zero & b.zero, made)


def negative(a: Interval) -> Interval:
    """Its negative."""
    return Interval(-a.high, -a.low)


def multiplied(a: Interval, b: Interval, dtype: Any) -> Interval:
    """The product of two independent values."""
    ends = [x * y for x in a for y in b]
    low, high = _extremes(ends)
    return _exactly_zero(a.zero | b.zero, rounded(Interval(low, high), dtype, _floor(a, b)))


def _extremes(ends: list[Any]) -> tuple[Any, Any]:
    low = jnp.minimum(jnp.minimum(ends[0], ends[1]), jnp.minimum(ends[2], ends[3]))
    high = jnp.maximum(jnp.maximum(ends[0], ends[1]), jnp.maximum(ends[2], ends[3]))
    return low, high


def quotient(a: Interval, b: Interval, dtype: Any) -> Interval:
    """One over the other; nothing is known where the inverse of the other may be lost to zero."""
    apart = ((b.low > 0.0) | (b.high < 0.0)) & (b.magnitude <= 1.0 / float(jnp.finfo(dtype).tiny))
    divisor = b.map(lambda end: jnp.where(apart, end, jnp.nan))
    low, high = _extremes([x / y for x in a for y in divisor])
    return _exactly_zero(a.zero, rounded(Interval(low, high), dtype, _floor(a, b), times=2))


def larger(a: Interval, b: Interval) -> Interval:
    """The larger of two; exact."""
    return Interval(jnp.maximum(a.low, b.low), jnp.maximum(a.high, b.high))


def smaller(a: Interval, b: Interval) -> Interval:
    """The smaller of two; exact."""
    return Interval(jnp.minimum(a.low, b.low), jnp.minimum(a.high, b.high))


def absolute(a: Interval) -> Interval:
    """Its absolute value; exact."""
    return Interval(jnp.maximum(jnp.maximum(a.low, -a.high), 0.0), a.magnitude)


def power(a: Interval, exponent: int, dtype: Any) -> Interval:
    """A positive integer power of at most four, made of products."""
    even = exponent % 2 == 0
    base = absolute(a) if even else a
    made = Interval(base.low**exponent, base.high**exponent)
    return _exactly_zero(a.zero, rounded(made, dtype, 0.0 if even else None, times=exponent - 1))


def root(a: Interval, dtype: Any, inverse: bool = False) -> Interval:
    """The square root, or one over it."""
    inside = a.map(lambda end: jnp.where(a.low > 0.0 if inverse else a.low >= 0.0, end, jnp.nan))
    ends = inside.map(jnp.sqrt)
    if inverse:
        return rounded(Interval(1.0 / ends.high, 1.0 / ends.low), dtype, 0.0, times=2)
    return _exactly_zero(a.zero, rounded(ends, dtype, 0.0))


def sloped(fun: Callable[[Any], Any], a: Interval, dtype: Any, falls: bool = False, odd: bool = False) -> Interval:
    """A bounded function that only rises (or falls), known to be zero at zero where it is odd."""
    low, high = (a.high, a.low) if falls else (a.low, a.high)
    made = rounded(Interval(fun(low) - _APPROXIMATION, fun(high) + _APPROXIMATION), dtype, times=3)
    return _exactly_zero(a.zero, made) if odd else made


def greater(a: Interval, b: Interval, or_equal: bool = False) -> Interval:
    """Whether the one is above the other."""
    if or_equal:
        return Interval(a.low >= b.high, ~(a.high < b.low))
    return Interval(a.low > b.high, ~(a.high <= b.low))


def equal(a: Interval, b: Interval) -> Interval:
    """Whether two are equal."""
    certain = (a.low == a.high) & (b.low == b.high) & (a.low == b.low)
    return Interval(certain, ~((a.high < b.low) | (a.low > b.high)))


def negated(a: Interval) -> Interval:
    """Whether a truth value is false."""
    return Interval(~a.high, ~a.low)


def both(a: Interval, b: Interval) -> Interval:
    """Whether two truth values hold."""
    return Interval(a.low & b.low, a.high & b.high)


def either(a: Interval, b: Interval) -> Interval:
    """Whether one of two truth values holds."""
    return Interval(a.low | b.low, a.high | b.high)


def chosen_of(which: Interval, if_false: Interval, if_true: Interval) -> Interval:
    """One of two by a truth value; where that is not decided, what holds both."""
    if if_false.low.dtype == jnp.bool_:
        low, high = if_false.low & if_true.low, if_false.high | if_true.high
    else:
        low, high = jnp.minimum(if_false.low, if_true.low), jnp.maximum(if_false.high, if_true.high)
    low = jnp.where(which.low, if_true.low, jnp.where(which.high, low, if_false.low))
    return Interval(low, jnp.where(which.low, if_true.high, jnp.where(which.high, high, if_false.high)))
