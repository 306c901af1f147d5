"""Mean and second moment of all hidden units from precomputed ones, with proved bounds, without computing a unit.

With ``c`` the mean of the rows w of W ``[m, d]`` and ``G = (W - c)' (W - c) / m``, the units ``h = W x`` have the mean
``c . x`` and the variance ``x' G x``. Of both, ``C`` and ``S`` are kept. With u = 2^-24, n an upper bound of |x|, and
``|.|`` of a matrix that of Frobenius:

- C is made by halving (halves are added, then halves of that): each entry is within ``b u`` of its mean absolute value,
  b the number of halvings and a little, so ``|C - c| <= b u r`` with r^2 the mean of ``|w|^2``.
- ``(W - C)' (W - C) / m`` is ``G + (c - C) (c - C)'``. A row less C is rounded by u of it; blocks of 64 rows are
  multiplied, within ``64 u``, and added eight at a time, then eight of those, within ``8 u`` at each of e levels: all
  times products of two columns' norms, which add up to the trace t of G. So ``|S - G| <= (80 + 8 e) u t + |c - C|^2``.
- ``C . x`` is computed within ``slack(d) |C| n``, ``S x`` within ``slack(d) |S| n`` (no norm of a matrix is larger than
  that of Frobenius), and ``x . (S x)`` within ``slack(d) n |S x|``.

So the mean of the exact units is within ``(|C - c| + slack(d) |C|) n`` of the computed one and their variance within
``(|S - G| + slack(d) |S|) n^2 + slack(d) n |S x|``. Nothing cancels, since S is centred; but where the variance is so
small against ``|S| n^2`` that its bounds reach zero, its root is not known (``lowering/prove/intervals.py``).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hire_xform.lowering.primitives.ranks import Moments, moments_bytes
from hire_xform.lowering.prove.bounds import U, norm, slack, tiny
from hire_xform.lowering.prove.intervals import Interval, rounded
from hire_xform.lowering.xla.in_line import loop

__all__ = ["UnitMoments", "bounded_moments", "bounded_moments_bytes", "pack_bounded_moments"]

_BLOCK, _FAN = 64, 8
# What is lost to zero in a square, a product or a sum of them.
_LOST = 2.0**-118


class UnitMoments(NamedTuple):
    """What is known of all units of each token, without computing one.

    Attributes:
      computed_mean, computed_variance: f32 ``[T, 1]``; the variance is at least zero.
      mean, variance: those of the exact products, ``[T, 1]``.
      error: f32 ``[T, 1]``, above the root mean square over the units of what dense products, in f32 and any order of
        summation, are off by.
    """

    computed_mean: jax.Array
    computed_variance: jax.Array
    mean: Interval
    variance: Interval
    error: jax.Array


def pack_bounded_moments(rows: jax.Array) -> Moments:
    """Mean row and centred second moment of ``rows [m, d]`` (f32 or 16 bits), and how far off they can be.

    Returns:
      ``mean`` f32 ``[d]``, ``gram`` f32 ``[d, d]`` and ``constants`` f32 ``[5]``: of the mean row its error and its
      norm, of the matrix likewise, and the root mean square of the rows' norms. NaN or infinite where an entry is.
    """
    wide = rows.astype(jnp.float32)
    m = wide.shape[0]
    mean = _halved(wide) / m
    centred = wide - mean
    gram = _gram(centred) / m
    row = _root_mean_square(wide)
    mean_error = (math.log2(m) + 4.0) * U * row + _LOST
    levels = math.ceil(math.log(max(m / _BLOCK, 1.0), _FAN))
    gram_error = (_BLOCK + 16.0 + _FAN * levels) * U * jnp.square(_root_mean_square(centred))
    gram_error = (gram_error + jnp.square(mean_error)) * (1.0 + 8.0 * U) + _LOST
    return {
        "mean": mean,
        "gram": gram,
        "constants": jnp.stack([mean_error, norm(mean), gram_error, norm(norm(gram)), row]),
    }


def bounded_moments_bytes(d: int) -> int:
    """Bytes of the moments of rows of ``d`` columns and of their bounds, all read once per token step."""
    return moments_bytes(d) + 20


def _root_mean_square(rows: jax.Array) -> jax.Array:
    """An upper bound of the root mean square of the norms of rows."""
    return norm(norm(rows)) / math.sqrt(rows.shape[0]) * (1.0 + 4.0 * U)


def _halved(rows: jax.Array) -> jax.Array:
    """The sum of rows: the second half is added to the first, until one is left."""
    while rows.shape[0] > 1:
        half = (rows.shape[0] + 1) // 2
        rows = rows[:half].at[: rows.shape[0] - half].add(rows[half:])
    return rows[0]


def _gram(rows: jax.Array) -> jax.Array:
    """``rows' rows``, f32: of blocks of rows, which are added eight at a time."""
    n, d = rows.shape
    if n <= _BLOCK:
        return lax.dot_general(rows, rows, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)
    part = _BLOCK * _FAN ** (math.ceil(math.log(n / _BLOCK, _FAN) - 1e-9) - 1)
    count = math.ceil(n / part)
    parts = lax.pad(rows, jnp.float32(0), ((0, count * part - n, 0), (0, 0, 0))).reshape(count, part, d)
    # The first part starts the sum: zeros would lack the manual axes that the parts vary over inside a shard_map.
    return loop(lax.scan, lambda total, one: (total + _gram(one), None), _gram(parts[0]), parts[1:])[0]


def bounded_moments(x: jax.Array, packed: Moments, *, input_bits: int = 24) -> UnitMoments:
    """Mean and variance over the rows w of ``w . x``, and bounds of both.

    Args:
      x: ``[T, d]``, f32 or 16 bits.
      packed: from :func:`pack_bounded_moments`.
      input_bits: significant bits that the dense products keep of f32 inputs.
    """
    x = x.astype(jnp.float32)
    d = x.shape[1]
    mean_error, mean_size, gram_error, gram_size, row = packed["constants"]
    # The matrix on the left and tokens behind it: the fast form for few tokens.
    mixed = lax.dot_general(packed["gram"], x, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST).T
    mean = jnp.sum(x * packed["mean"], axis=1, keepdims=True)
    variance = jnp.sum(x * mixed, axis=1, keepdims=True)
    length = norm(x)[:, None]
    of_mean = (mean_error + slack(d) * mean_size) * length + tiny(d)
    of_variance = (gram_error + slack(d) * gram_size) * length * length + slack(d) * length * norm(mixed)[:, None]
    of_variance = of_variance * (1.0 + 16.0 * U) + tiny(d) * (1.0 + length)
    exact = rounded(Interval(variance - of_variance, variance + of_variance), jnp.float32)
    return UnitMoments(
        mean,
        jnp.maximum(variance, 0.0),
        rounded(Interval(mean - of_mean, mean + of_mean), jnp.float32),
        Interval(jnp.maximum(exact.low, 0.0), exact.high),
        slack(d, input_bits) * row * length * (1.0 + 8.0 * U) + tiny(d),
    )
