"""How far a program's sum over all hidden units can be from what their exact moments say: proved.

The program computes each unit h~ of h = w . x, makes a value v~ of it in some equations, and adds the values up. In
exact arithmetic, with what it takes from elsewhere (a mean, a number) as it is, v would be ``a t^2 + b t + c`` of
``t = h - mean(h)`` (``passes/match/sums.py``), whose sum mean and variance give. What is added to that, with norms that
are means over the units, ``|v|`` the root mean square or, of a square, the mean absolute value:

- a product is off by ``slack(d) |w| |x|``: their root mean square is ``UnitMoments.error``;
- a sum or difference is off by what its terms are, a product with a number by so many times that, a product of two by
  ``|v~ w~ - v w| <= |v~ - v| |w~| + |v| |w~ - w|`` (Cauchy and Schwarz), and each rounds by a unit in the last place of
  its own norm;
- ``|a t^2 + b t + c|`` is at most ``(b^2 var + c^2)^(1/2)`` without a, else ``|a| var + |b| var^(1/2) + |c|``;
- a sum of m terms in any order rounds by ``m u / (1 - m u)`` of their absolute values (Higham, section 4.2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import primitives as prims

from hire_xform.lowering.prove import intervals
from hire_xform.lowering.prove.intervals import Interval
from hire_xform.lowering.prove.moment_bounds import UnitMoments
from hire_xform.passes.match import sums
from hire_xform.passes.match.region import Apply, Region, Total, Up

_U = 2.0**-24
# What is lost to zero in an operation.
_LOST = 2.0**-118


def total_bounds(
    region: Region, total: Total, value: Callable[[int], Interval], moments: Mapping[int, UnitMoments]
) -> Interval:
    """Bounds of a sum over all units, as a dense program computes it, ``[T, 1]``.

    Args:
      region: the region.
      total: the sum.
      value: the bounds of an expression that is the same for all units.
      moments: of the products that are summed, by the number of their expression.
    """
    exprs, varies, operand = region.exprs, region.varies, total.operand
    known = moments[sums.product_summed(exprs, varies, operand)]
    exact = sums.total(exprs, varies, operand, value, lambda _: known.mean, known.variance, region.units)
    errors = _Errors(region, value, known)
    off = errors.of(operand)
    added = 1.1 * region.units * _unit(total.dtype)
    off = region.units * (off + added * (errors.norm(operand) + off)) * (1.0 + 32.0 * _U)
    return intervals.rounded(Interval(exact.low - off, exact.high + off), total.dtype)


def _unit(dtype: Any) -> float:
    """A rounding in a dtype, and some more in f32 for operations that are off by some units in the last place."""
    kind = jnp.finfo(dtype)
    return 4.0 * _U + (0.51 * float(kind.eps) if kind.bits < 32 else 0.0)


class _Errors:
    def __init__(self, region: Region, value: Callable[[int], Interval], known: UnitMoments):
        self.region, self.value, self.known = region, value, known

    def norm(self, number: int) -> jax.Array:
        """An upper bound of the norm of an expression's exact values."""
        poly = sums.polynomial(self.region.exprs, self.region.varies, number, self.value, lambda _: self.known.mean)
        square, slope, constant = (jnp.float32(0) if p is None else intervals.interval(p).magnitude for p in poly)
        variance = self.known.variance.magnitude
        if poly[0] is None:
            found = jnp.sqrt(slope * slope * variance + constant * constant)
        else:
            found = square * variance + slope * jnp.sqrt(variance) + constant
        return found * (1.0 + 32.0 * _U) + _LOST

    def of(self, number: int) -> jax.Array:
        """An upper bound of the norm of what the program's values of an expression are off by."""
        if not self.region.varies[number]:
            return jnp.float32(0)
        expr = self.region.exprs[number]
        if isinstance(expr, Up):
            return self.rounded(self.known.error, number, expr.product.out.aval.dtype)
        assert isinstance(expr, Apply)
        p, operands, dtype = expr.node.primitive, expr.operands, expr.node.outputs[0].aval.dtype
        if p is prims.copy_p or p is prims.neg_p:
            return self.of(operands[0])
        if p is prims.div_p:
            # A compiler may multiply with the divisor's inverse, which it rounds as well.
            divisor = intervals.quotient(intervals.point(1.0), self.value(operands[1]), dtype)
            return self.rounded(self.of(operands[0]) * divisor.magnitude, number, dtype, times=2)
        if p is prims.mul_p:
            return self.rounded(self.product(*operands), number, dtype)
        if p is prims.square_p or p is prims.integer_pow_p:
            return self.rounded(self.product(operands[0], operands[0]), number, dtype)
        # A compiler may add up constants first, and round that; see `added` of lowering/prove/intervals.py.
        lost = _unit(dtype) * jnp.minimum(*map(self.norm, operands)) if len(operands) == 2 else 0.0
        return self.rounded(sum(map(self.of, operands), lost + jnp.float32(0)), number, dtype)

    def product(self, a: int, b: int) -> jax.Array:
        """That of a product, before it is rounded."""
        first, second = self.of(a), self.of(b)
        return first * (self.norm(b) + second) + self.norm(a) * second

    def rounded(self, off: jax.Array, number: int, dtype: Any, times: int = 1) -> jax.Array:
        """That of a result which is rounded to a dtype, so often on the way."""
        return (off + times * _unit(dtype) * (self.norm(number) + off)) * (1.0 + 16.0 * _U) + _LOST
