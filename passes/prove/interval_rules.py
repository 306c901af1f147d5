"""What each pointwise equation can make of operands that lie between bounds: one rule for each primitive.

``lowering/prove/intervals.py`` has the arithmetic. A comparison gives an interval of truth values, decided or not.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as prims

from hire_xform.lowering.prove import intervals
from hire_xform.lowering.prove.intervals import Interval
from hire_xform.passes.ir import compat
from hire_xform.passes.ir.graph import Node
from hire_xform.passes.ir.pointwise import COMPARES, HINTS

FLOATS = ("float32", "bfloat16", "float16")
_LOGIC = {prims.and_p: intervals.both, prims.or_p: intervals.either}
_SLOPED = {prims.tanh_p: jnp.tanh, prims.logistic_p: lax.logistic, prims.erf_p: lax.erf, prims.erfc_p: lax.erfc}
_KEPT = frozenset({prims.copy_p, prims.name_p, prims.stop_gradient_p, compat.PVARY, *HINTS})
_ADDS = frozenset({prims.add_p, prims.add_jaxvals_p})
ROOTS = frozenset({prims.sqrt_p, prims.rsqrt_p})
_OTHERS = frozenset(
    {
        prims.abs_p,
        prims.clamp_p,
        prims.convert_element_type_p,
        prims.div_p,
        prims.eq_p,
        prims.max_p,
        prims.min_p,
        prims.mul_p,
        prims.ne_p,
        prims.neg_p,
        prims.not_p,
        prims.select_n_p,
        prims.square_p,
        prims.sub_p,
    }
)
_BOUNDED = frozenset({*_LOGIC, *_SLOPED, *_KEPT, *_ADDS, *ROOTS, *_OTHERS, *COMPARES})
_MOST_POWER = 4


def can_be_bounded(node: Node) -> bool:
    """Whether :func:`applied` has a rule for an equation."""
    p, dtype = node.primitive, node.outputs[0].aval.dtype.name
    power = p is prims.integer_pow_p and 1 <= node.params["y"] <= _MOST_POWER
    return (p in _BOUNDED or power) and dtype in (*FLOATS, "bool")


def applied(node: Node, operands: Sequence[Interval], same: bool = False) -> Interval:
    """What a pointwise equation can make of operands in these intervals.

    Args:
      node: the equation, for which there is a rule.
      operands: of each operand.
      same: whether its two operands are one value.
    """
    p, dtype = node.primitive, node.outputs[0].aval.dtype
    first = operands[0]
    if p in _KEPT:
        return first
    if p in COMPARES:
        above = p in (prims.gt_p, prims.ge_p)
        x, y = (first, operands[1]) if above else (operands[1], first)
        return intervals.greater(x, y, p in (prims.ge_p, prims.le_p))
    if p in (prims.eq_p, prims.ne_p):
        found = intervals.equal(*operands)
        return found if p is prims.eq_p else intervals.negated(found)
    if p in _LOGIC:
        return _LOGIC[p](*operands)
    if p in _SLOPED:
        odd = p in (prims.tanh_p, prims.erf_p)
        return intervals.sloped(_SLOPED[p], first, dtype, falls=p is prims.erfc_p, odd=odd)
    if p in _ADDS:
        return intervals.added(first, operands[1], dtype)
    if p is prims.sub_p:
        return intervals.added(first, intervals.negative(operands[1]), dtype)
    if p is prims.mul_p:
        if same:
            return intervals.power(first, 2, dtype)
        return intervals.multiplied(first, operands[1], dtype)
    if p is prims.div_p:
        return intervals.quotient(first, operands[1], dtype)
    if p is prims.max_p:
        return intervals.larger(*operands)
    if p is prims.min_p:
        return intervals.smaller(*operands)
    if p is prims.clamp_p:
        return intervals.smaller(intervals.larger(operands[1], first), operands[2])
    if p is prims.abs_p:
        return intervals.absolute(first)
    if p is prims.neg_p:
        return intervals.negative(first)
    if p is prims.not_p:
        return intervals.negated(first)
    if p is prims.select_n_p:
        return intervals.chosen_of(*operands)
    if p is prims.square_p:
        return intervals.power(first, 2, dtype)
    if p is prims.integer_pow_p:
        return intervals.power(first, node.params["y"], dtype)
    if p in ROOTS:
        return intervals.root(first, dtype, inverse=p is prims.rsqrt_p)
    assert p is prims.convert_element_type_p, p
    if first.low.dtype == jnp.bool_:
        return first.map(lambda end: end.astype(jnp.float32))
    return intervals.narrowed(first, dtype) if jnp.finfo(dtype).bits < 32 else first
