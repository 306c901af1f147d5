"""Sums over all hidden units of a polynomial in one linear product, from the product's mean and variance over them.

A value that differs from unit to unit is written as ``a u^2 + b u + c`` around the mean: ``u`` is the product less its
mean over the units, so that its sum is zero, that of its square the variance times the units, and nothing cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax.extend.core import primitives as prims

from hire_xform.passes.match.region import Apply, Expr, Side, Up

_SAME = frozenset({prims.convert_element_type_p, prims.copy_p})
_ADDS = frozenset({prims.add_p, prims.add_jaxvals_p})

# Coefficients of u^2, u and 1; None where there is none.
Poly = tuple[Any, Any, Any]


class NoPolynomialError(Exception):
    """The value is no polynomial of at most second degree in one product, or its coefficients differ by unit."""


def product_summed(exprs: Sequence[Expr], varies: Sequence[bool], number: int) -> int:
    """The number of the one product that expression ``number`` is a polynomial of.

    Raises:
      NoPolynomialError: it is not.
    """
    found: set[int] = set()

    def mean(up: int) -> float:
        found.add(up)
        return 1.0

    polynomial(exprs, varies, number, lambda _: 1.0, mean)
    if len(found) != 1:
        raise NoPolynomialError(f"it is made of {len(found)} products")
    return found.pop()


def total(
    exprs: Sequence[Expr],
    varies: Sequence[bool],
    number: int,
    value: Callable[[int], Any],
    mean: Callable[[int], Any],
    variance: Any,
    units: int,
) -> Any:
    """The sum of expression ``number`` over all units of a token.

    Args:
      exprs: a region's expressions.
      varies: which of them differ by unit.
      number: the expression.
      value: the value of an expression that does not differ by unit, a scalar or ``[T, 1]``.
      mean: the mean of a product over all units.
      variance: its variance.
      units: how many there are.
    """
    square, _, constant = polynomial(exprs, varies, number, value, mean)
    return units * (constant if square is None else square * variance + constant)


def polynomial(
    exprs: Sequence[Expr],
    varies: Sequence[bool],
    number: int,
    value: Callable[[int], Any],
    mean: Callable[[int], Any],
) -> Poly:
    """Expression ``number`` as a polynomial of one product's distance from its mean; arguments as in :func:`total`.

    Raises:
      NoPolynomialError: it is none.
    """
    if not varies[number]:
        return None, None, value(number)
    expr = exprs[number]
    if isinstance(expr, Up):
        return None, 1.0, mean(number)
    if not isinstance(expr, Apply):
        raise NoPolynomialError("its coefficients differ by unit" if isinstance(expr, Side) else "it is chosen itself")
    operands = [polynomial(exprs, varies, o, value, mean) for o in expr.operands]
    p = expr.node.primitive
    if p in _SAME:
        return operands[0]
    if p is prims.neg_p:
        return _scaled(operands[0], -1.0)
    if p in _ADDS:
        return _added(operands[0], operands[1])
    if p is prims.sub_p:
        return _added(operands[0], _scaled(operands[1], -1.0))
    if p is prims.mul_p:
        return _product(operands[0], operands[1])
    if p is prims.div_p and not varies[expr.operands[1]]:
        return _scaled(operands[0], 1.0 / operands[1][2])
    if p is prims.square_p or (p is prims.integer_pow_p and expr.node.params["y"] == 2):
        return _product(operands[0], operands[0])
    raise NoPolynomialError(f"{p} makes no polynomial")


def _plus(a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else a + b


def _times(a: Any, b: Any) -> Any:
    return None if a is None or b is None else a * b


def _added(p: Poly, q: Poly) -> Poly:
    return _plus(p[0], q[0]), _plus(p[1], q[1]), _plus(p[2], q[2])


def _scaled(p: Poly, by: Any) -> Poly:
    return _times(p[0], by), _times(p[1], by), _times(p[2], by)


def _product(p: Poly, q: Poly) -> Poly:
    if (p[0] is not None and (q[0] is not None or q[1] is not None)) or (q[0] is not None and p[1] is not None):
        raise NoPolynomialError("its degree is above two")
    square = _plus(_plus(_times(p[1], q[1]), _times(p[0], q[2])), _times(p[2], q[0]))
    return square, _plus(_times(p[1], q[2]), _times(p[2], q[1])), _times(p[2], q[2])
