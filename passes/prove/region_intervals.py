"""A region with a threshold evaluated on intervals: what it can make of hidden units that lie between bounds.

``passes/match/region.py`` replays a region on values; here each equation acts on intervals
(``lowering/prove/intervals.py``, ``interval_rules.py``). Only thresholds that are subtracted are evaluated so: what is
left of a unit is then as continuous as rounding is small. Of a top-k, or of a mask at a threshold, rounding decides
whether a unit is there at all, and with more than a few hundred columns some unit nearly always lies within its reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import primitives as prims

from hire_xform.lowering.prove import intervals
from hire_xform.lowering.prove.intervals import Interval
from hire_xform.lowering.prove.moment_bounds import UnitMoments
from hire_xform.passes.ir.pointwise import COMPARES, literal_number
from hire_xform.passes.match.region import (
    Apply,
    Expr,
    Grouped,
    Kept,
    Kth,
    Number,
    Region,
    Side,
    Total,
    Up,
    hashable,
    is_zero,
    needed,
)
from hire_xform.passes.prove.interval_rules import FLOATS, ROOTS, applied, can_be_bounded
from hire_xform.passes.prove.sum_bounds import total_bounds

_TESTS = frozenset({prims.eq_p, prims.ne_p, *COMPARES})
# A root or a quotient of what is taken from all units is not known where its bounds are further apart than this share.
_APART = 1.0 / 16.0


def unbounded(region: Region) -> str | None:
    """Why a region with a choice of its own has no bounds; None where it has.

    Returns:
      A clause that goes on from "certify=True".
    """
    if any(isinstance(expr, (Kth, Kept)) for expr in region.exprs):
        return "proves no ranking of units: rounding can move one across the border"
    same = _same(region)
    for number in sorted(needed(region.exprs, region.root)):
        expr = region.exprs[number]
        if isinstance(expr, Grouped):
            return "has no bounds of what is taken from groups of units, which is in the model's own choice"
        if isinstance(expr, Side) and expr.value.aval.dtype.name not in (*FLOATS, "bool"):
            return f"has no bounds of a side input of {expr.value.aval.dtype.name}, which is in the model's own choice"
        if isinstance(expr, Total) and jnp.dtype(expr.dtype).name not in FLOATS:
            return f"has no bounds of a sum in {jnp.dtype(expr.dtype).name}, which is in the model's own choice"
        if not isinstance(expr, Apply):
            continue
        if not can_be_bounded(expr.node):
            what = f"{expr.node.primitive} of {expr.node.outputs[0].aval.dtype.name}"
            return f"has no bounds of {what}, which is in the model's own choice"
        if expr.node.primitive in _TESTS and region.varies[number] and not _is_continuous(region, same, number, expr):
            return "proves no mask at a threshold that is not subtracted: rounding can move a unit across it"
    return None


def threshold_bounds(
    region: Region, hiddens: Sequence[Interval], sides: Sequence[Any], moments: Sequence[UnitMoments | None]
) -> tuple[jax.Array, jax.Array]:
    """What units of a region can be at most, whatever a dense program rounds.

    Args:
      region: a region of which :func:`unbounded` finds nothing.
      hiddens: of each product into the units, f32 ``[T, m]``.
      sides: of each side input its canonical array, ``[T or 1, m or 1]``, or a scalar.
      moments: what is known of all units of each product; None where the region sums none of it.

    Returns:
      An upper bound of the magnitude of the activation, f32 ``[T, m]``: zero proves a zero. And of which tokens all
      bounds are known, bool ``[T]``: what is computed of such a token's units is the dense one's up to rounding.
    """
    evaluation = Evaluation(region, hiddens, sides, moments)
    activation = evaluation.value(region.root)
    shape = hiddens[0].low.shape
    most = jnp.broadcast_to(activation.magnitude, shape)
    known = jnp.all(jnp.isfinite(most), axis=1)
    for decided in evaluation.decided:
        known = known & jnp.all(jnp.broadcast_to(decided, shape), axis=1)
    return most, known


class Evaluation:
    """The intervals of one region's expressions, each computed once; ``decided`` has one entry for each comparison."""

    def __init__(
        self,
        region: Region,
        hiddens: Sequence[Interval],
        sides: Sequence[Any],
        moments: Sequence[UnitMoments | None],
    ):
        self.region = region
        numbers = [i for i, e in enumerate(region.exprs) if isinstance(e, Up)]
        self.given = dict(zip(numbers, hiddens, strict=True))
        self.moments = {n: m for n, m in zip(numbers, moments, strict=True) if m is not None}
        self.sides = dict(zip((i for i, e in enumerate(region.exprs) if isinstance(e, Side)), sides, strict=True))
        self.decided: list[Any] = []
        self.values: dict[int, Interval] = {}

    def value(self, root: int) -> Interval:
        """The interval of an expression."""
        for number in sorted(needed(self.region.exprs, root)):
            if number not in self.values:
                self.values[number] = self._value(number, self.region.exprs[number])
        return self.values[root]

    def _value(self, number: int, expr: Expr) -> Interval:
        if isinstance(expr, Up):
            return self.given[number]
        if isinstance(expr, Side):
            return intervals.point(self.sides[number])
        if isinstance(expr, Number):
            return intervals.point(expr.operand.val)
        if isinstance(expr, Total):
            return total_bounds(self.region, expr, self.values.__getitem__, self.moments)
        assert isinstance(expr, Apply), expr
        p, operands = expr.node.primitive, [self.values[o] for o in expr.operands]
        if not self.region.varies[number] and (p in ROOTS or p is prims.div_p):
            operands[-1] = _close(operands[-1])
        found = applied(expr.node, operands, same=p is prims.mul_p and expr.operands[0] == expr.operands[1])
        if p in _TESTS and not self.region.varies[number]:
            self.decided.append(found.decided)
        return found


def _close(value: Interval) -> Interval:
    """The interval where its ends are close to each other; else nothing is known."""
    known = value.high - value.low <= _APART * value.magnitude
    return value.map(lambda end: jnp.where(known, end, jnp.nan))


def _is_continuous(region: Region, same: Sequence[int], number: int, expr: Apply) -> bool:
    """True for the test of a ReLU, ``where(u > 0, u, 0)``: whichever way it goes, nothing jumps."""
    zeros = [is_zero(region.exprs[o]) for o in expr.operands]
    if zeros.count(True) != 1 or expr.node.primitive not in COMPARES:
        return False
    tested = same[expr.operands[zeros.index(False)]]
    for other in region.exprs:
        if not isinstance(other, Apply) or number not in other.operands:
            continue
        cases = other.operands[1:]
        if other.node.primitive is not prims.select_n_p or other.operands[0] != number or len(cases) != 2:
            return False
        if not any(is_zero(region.exprs[c]) and same[d] == tested for c, d in (cases, cases[::-1])):
            return False
    return True


def _same(region: Region) -> list[int]:
    """For each expression the number of the first one that computes the same of the same."""
    first: dict[Any, int] = {}
    found: list[int] = []
    for number, expr in enumerate(region.exprs):
        key: Any = number
        if isinstance(expr, Apply):
            key = expr.node.primitive, hashable(expr.node.params), tuple(found[o] for o in expr.operands)
        elif isinstance(expr, Up):
            key = expr.product, expr.layout
        elif isinstance(expr, Side):
            key = expr.value, expr.layout
        elif isinstance(expr, Number):
            key = "number", literal_number(expr.operand), str(jnp.asarray(expr.operand.val).dtype)
        found.append(first.setdefault(key, number))
    return found
