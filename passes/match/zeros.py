"""Finds what makes a block's activation zero: an expression that, wherever it is at most zero, leaves a zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.extend.core import primitives as prims

from hire_xform.lowering.prove import intervals
from hire_xform.passes.ir import compat
from hire_xform.passes.ir.pointwise import known_number, literal_number
from hire_xform.passes.match.region import Apply, Number, Region, Side, Up

_KEEP = frozenset({prims.convert_element_type_p, prims.copy_p, prims.neg_p, prims.square_p, compat.PVARY})
_CASTS = frozenset({prims.convert_element_type_p, prims.copy_p, compat.PVARY})
_ADDS = frozenset({prims.add_p, prims.add_jaxvals_p})


@dataclass(frozen=True)
class Gate:
    """An expression that rises with one product, and zero below which the activation is zero.

    Attributes:
      expr: its number: at most zero means a zero.
      up: which of ``region.ups`` it rises with.
    """

    expr: int
    up: int


def gate_of(region: Region) -> Gate | None:
    """The gate of a ReLU, squared ReLU or ReGLU block; None for a block that has none or that is not understood.

    All else that the activation is made of must be finite for a zero to stay one: it has to be a product into the
    units, or one with something added, which ``certified_ffn`` checks for each input.
    """
    numbers = [i for i, e in enumerate(region.exprs) if isinstance(e, Up)]
    for gate in _gates(region, region.root):
        up = _rises_with(region, gate)
        if up is not None:
            return Gate(gate, numbers.index(up))
    return None


def upper_of(region: Region, expr: int, upper: Any, sides: Sequence[Any]) -> Any:
    """An upper bound of a gate, f32: casts and sums of one product, side inputs and numbers, and the product scaled.

    Sums that are rounded to nearest rise with what goes into them. Whether a compiler rounds to 16 bits on the way is
    not known: each result is taken as rounded up, or not at all. A scale that is not negative keeps the order; whether
    what it makes is rounded before something is added (or multiplied and added in one) is not known either, so it is
    taken as more than it can be. Nothing is known where a scale is negative.

    Args:
      region: the region.
      expr: the gate.
      upper: an upper bound of the product.
      sides: of ``region.sides``, ``[T or 1, m or 1]`` or scalars.
    """
    e = region.exprs[expr]
    if isinstance(e, Up):
        return upper
    if isinstance(e, Number):
        return jnp.asarray(e.operand.val).astype(jnp.float32)
    if isinstance(e, Side):
        number = [i for i, other in enumerate(region.exprs) if isinstance(other, Side)].index(expr)
        return jnp.asarray(sides[number]).astype(jnp.float32)
    assert isinstance(e, Apply)
    first, *others = (upper_of(region, o, upper, sides) for o in e.operands)
    p, dtype = e.node.primitive, e.node.outputs[0].aval.dtype
    if p in _CASTS:
        return intervals.rounded_up(first, dtype)
    if p is prims.mul_p:
        scale = isinstance(region.exprs[e.operands[0]], (Side, Number))
        return intervals.rounded_up(_scaled_up(*((others[0], first) if scale else (first, others[0]))), dtype)
    return intervals.rounded_up(first - others[0] if p is prims.sub_p else first + others[0], dtype)


def _scaled_up(upper: Any, scale: Any) -> Any:
    """More than all up to ``upper`` times a scale that is not negative; of what is below zero nothing positive."""
    product = upper * scale
    # Twice what one rounding is off by; and what a product that is too small for f32 may lose.
    above = product + jnp.abs(product) * 2.0**-22 + float(jnp.finfo(jnp.float32).tiny)
    above = jnp.where(upper <= 0, jnp.minimum(above, 0), above)
    return jnp.where(scale >= 0, above, jnp.inf)


def _number(region: Region, expr: int) -> float | None:
    e = region.exprs[expr]
    if isinstance(e, Number):
        return literal_number(e.operand)
    return known_number(e.value) if isinstance(e, Side) else None


def _gates(region: Region, root: int) -> list[int]:
    """Expressions each of which, at most zero, makes expression ``root`` zero."""
    e = region.exprs[root]
    if not isinstance(e, Apply):
        return []
    p, operands = e.node.primitive, e.operands
    if p is prims.max_p:
        return [a for a, b in (operands, operands[::-1]) if _number(region, b) == 0.0]
    if p is prims.clamp_p:
        return [operands[1]] if _number(region, operands[0]) == 0.0 else []
    if p is prims.min_p:
        pairs = (operands, operands[::-1])
        return [g for a, b in pairs if (_number(region, b) or -1.0) > 0.0 for g in _gates(region, a)]
    if p in _KEEP or (p is prims.integer_pow_p and e.node.params["y"] > 0):
        return _gates(region, operands[0])
    if p is prims.div_p:
        return _gates(region, operands[0]) if (_number(region, operands[1]) or 0.0) > 0.0 else []
    if p is prims.mul_p:
        return [g for a, b in (operands, operands[::-1]) if _is_finite(region, b) for g in _gates(region, a)]
    return []


def _is_finite(region: Region, expr: int) -> bool:
    """True for what is finite whenever the products into the units and the side inputs are not too large."""
    e = region.exprs[expr]
    if isinstance(e, (Up, Side, Number)):
        return True
    if not isinstance(e, Apply):
        return False
    p = e.node.primitive
    if p is prims.max_p or p in _KEEP - {prims.square_p} or p in _ADDS or p is prims.sub_p:
        return all(_is_finite(region, o) for o in e.operands)
    return False


def _rises_with(region: Region, expr: int) -> int | None:
    """The number of the one product that an expression rises with; None when that is not plain to see."""
    e = region.exprs[expr]
    if isinstance(e, Up):
        return expr
    if not isinstance(e, Apply):
        return None
    p, operands = e.node.primitive, e.operands
    if p in _CASTS:
        return _rises_with(region, operands[0])
    if p in _ADDS or p is prims.mul_p:
        for a, b in (operands, operands[::-1]):
            if isinstance(region.exprs[b], (Side, Number)):
                return _rises_with(region, a)
    if p is prims.sub_p and isinstance(region.exprs[operands[1]], (Side, Number)):
        return _rises_with(region, operands[0])
    return None
