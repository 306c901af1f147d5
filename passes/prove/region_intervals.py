"""A region evaluated on intervals: what its equations can make of hidden units that lie between bounds.

``passes/match/region.py`` replays a region on values; here each equation acts on intervals
(``lowering/prove/intervals.py``), and a comparison gives an interval of truth values, decided or not. Comparing a score
with the k-th largest of the same score is counting: a unit is at least the k-th largest where it is certainly above the
next one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as prims

from hire_xform.lowering.engine.certified_choice import Largest
from hire_xform.lowering.primitives.ranks import over_groups
from hire_xform.lowering.prove import intervals
from hire_xform.lowering.prove.intervals import Interval
from hire_xform.lowering.prove.moment_bounds import UnitMoments
from hire_xform.passes.ir import compat
from hire_xform.passes.ir.graph import Node
from hire_xform.passes.ir.pointwise import COMPARES, HINTS, known_number, literal_number
from hire_xform.passes.match.region import (
    Apply,
    Grouped,
    Kept,
    Kth,
    Number,
    Place,
    Region,
    Side,
    Total,
    Up,
    hashable,
    needed,
)
from hire_xform.passes.prove.sum_bounds import total_bounds

FLOATS = ("float32", "bfloat16", "float16")
_LOGIC = {prims.and_p: intervals.both, prims.or_p: intervals.either}
_SLOPED = {prims.tanh_p: jnp.tanh, prims.logistic_p: lax.logistic, prims.erf_p: lax.erf, prims.erfc_p: lax.erfc}
_KEPT = frozenset({prims.copy_p, prims.name_p, prims.stop_gradient_p, compat.PVARY, *HINTS})
_ADDS = frozenset({prims.add_p, prims.add_jaxvals_p})
_ROOTS = frozenset({prims.sqrt_p, prims.rsqrt_p})
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
_BOUNDED = frozenset({*_LOGIC, *_SLOPED, *_KEPT, *_ADDS, *_ROOTS, *_OTHERS, *COMPARES})
_TESTS = frozenset({prims.eq_p, prims.ne_p, *COMPARES})
_MOST_POWER = 4
# A root or a quotient of what is taken from all units is not known where its bounds are further apart than this share.
_APART = 1.0 / 16.0


def unbounded(region: Region) -> str | None:
    """What of a region with a choice of its own can't be bounded; None where all can."""
    assert region.own is not None
    for number in sorted(needed(region.exprs, region.root) | needed(region.exprs, region.own.score)):
        expr = region.exprs[number]
        if isinstance(expr, Side) and expr.value.aval.dtype.name not in (*FLOATS, "bool"):
            return f"a side input of {expr.value.aval.dtype.name}"
        if isinstance(expr, Total) and jnp.dtype(expr.dtype).name not in FLOATS:
            return f"a sum in {jnp.dtype(expr.dtype).name}"
        if not isinstance(expr, Apply):
            continue
        if not can_be_bounded(expr.node):
            return f"{expr.node.primitive} of {expr.node.outputs[0].aval.dtype.name}"
    return None


def ranks_of(region: Region) -> tuple[int, ...]:
    """The ranks of the largest scores that the choice hangs on; none for a threshold."""
    found = (e.rank if isinstance(e, Kth) else e.k for e in region.exprs if isinstance(e, (Kth, Kept)))
    return tuple(sorted(set(found)))


@dataclass(frozen=True, eq=False)
class Bounded:
    """A region's choice of units, on intervals; see ``Proving`` of ``lowering/engine/certified_choice.py``.

    Attributes:
      region: the region, whose equations can all be bounded.
    """

    region: Region

    @property
    def compares(self) -> bool:
        """Whether units are compared with each other, or with what is made of all of them."""
        region = self.region
        tests = (n for n, e in enumerate(region.exprs) if isinstance(e, Apply) and e.node.primitive in _TESTS)
        return bool(ranks_of(region)) or any(region.varies[n] for n in tests)

    def score(
        self, hiddens: Sequence[Interval], sides: Sequence[Any], gather: Callable[[Any], Any], moments: Sequence[Any]
    ) -> Interval:
        """What the model chooses units by."""
        assert self.region.own is not None
        return Evaluation(self.region, hiddens, sides, gather, moments, None).value(self.region.own.score)

    def settle(
        self,
        hiddens: Sequence[Interval],
        sides: Sequence[Any],
        gather: Callable[[Any], Any],
        moments: Sequence[Any],
        largest: Largest,
    ) -> tuple[Any, Any]:
        """Which units are exactly zero, and of which every comparison is decided and the value finite."""
        evaluation = Evaluation(self.region, hiddens, sides, gather, moments, largest)
        root = evaluation.value(self.region.root)
        shape = next(h.low.shape for h in hiddens)
        settled = jnp.isfinite(root.low) & jnp.isfinite(root.high)
        for decided in evaluation.decided:
            settled = settled & decided
        return jnp.broadcast_to(root.zero, shape), jnp.broadcast_to(settled, shape)


class Evaluation:
    """The intervals of one region's expressions, each computed once; ``decided`` has one entry for each comparison."""

    def __init__(
        self,
        region: Region,
        hiddens: Sequence[Interval],
        sides: Sequence[Any],
        gather: Callable[[Any], Any],
        moments: Sequence[UnitMoments | None],
        largest: Largest | None,
    ):
        self.region, self.gather, self.largest = region, gather, largest
        numbers = [i for i, e in enumerate(region.exprs) if isinstance(e, Up)]
        self.given = dict(zip(numbers, hiddens, strict=True))
        self.moments = {n: m for n, m in zip(numbers, moments, strict=True) if m is not None}
        self.sides = dict(zip((i for i, e in enumerate(region.exprs) if isinstance(e, Side)), sides, strict=True))
        self.shape = hiddens[0].low.shape
        self.same = _same(region)
        self.decided: list[Any] = []
        self.values: dict[int, Interval] = {}

    def value(self, root: int) -> Interval:
        """The interval of an expression."""
        for number in sorted(needed(self.region.exprs, root)):
            if number not in self.values:
                self.values[number] = self._value(number)
        return self.values[root]

    def _value(self, number: int) -> Interval:
        expr = self.region.exprs[number]
        if isinstance(expr, Up):
            return self.given[number]
        if isinstance(expr, Side):
            side = self.sides[number]
            return intervals.point(self.gather(side) if jnp.ndim(side) == 2 and side.shape[1] > 1 else side)
        if isinstance(expr, Number):
            return intervals.point(expr.operand.val)
        if isinstance(expr, Grouped):
            return self._grouped(expr)
        if isinstance(expr, Kth):
            assert self.largest is not None
            return self.largest.at(expr.rank)
        if isinstance(expr, Kept):
            kept = self._among_largest(expr.operand, expr.k)
            self.decided.append(kept.decided)
            return kept
        if isinstance(expr, Place):
            update = intervals.point(expr.number) if expr.update is None else self.values[expr.update]
            return intervals.chosen_of(self.values[expr.kept], intervals.point(0.0), update)
        if isinstance(expr, Total):
            return total_bounds(self.region, expr, self.values.__getitem__, self.moments)
        return self._apply(number, expr)

    def _grouped(self, expr: Grouped) -> Interval:
        value = self.values[expr.operand].map(lambda end: jnp.broadcast_to(end, self.shape))
        if expr.largest:
            return value.map(lambda end: over_groups(end, expr.size, True))
        dtype = _dtype(self.region, expr.operand)
        return intervals.sum_of_groups(value, lambda end: over_groups(end, expr.size, False), expr.size, dtype)

    def _among_largest(self, operand: int, rank: int, strictly: bool = False) -> Interval:
        """Whether a score is at least the ``rank``-th largest, or above it."""
        assert self.largest is not None
        score = self.values[operand]
        if strictly:
            # Of a group all units are the rank-th.
            before = self.largest.at(rank - _constant_over(self.region, operand))
            return Interval(score.low > self.largest.at(rank).high, jnp.logical_not(score.high < before.low))
        return Interval(
            score.low > self.largest.at(rank + 1).high, jnp.logical_not(score.high < self.largest.at(rank).low)
        )

    def _compared(self, number: int, expr: Apply) -> Interval:
        p, (a, b) = expr.node.primitive, expr.operands
        above = p in (prims.gt_p, prims.ge_p)
        or_equal = p in (prims.ge_p, prims.le_p)
        first, second = self.region.exprs[a], self.region.exprs[b]
        if isinstance(second, Kth) and self._is_one(a, second.operand):
            # score >= kth, or score < kth: not at least it; score > kth, or score <= kth: not above it.
            found = self._among_largest(a, second.rank, strictly=above != or_equal)
            found = found if above else intervals.negated(found)
        elif isinstance(first, Kth) and self._is_one(b, first.operand):
            found = self._among_largest(b, first.rank, strictly=above == or_equal)
            found = intervals.negated(found) if above else found
        else:
            x, y = (self.values[a], self.values[b]) if above else (self.values[b], self.values[a])
            found = intervals.greater(x, y, or_equal)
        if not self._is_continuous(number, expr):
            self.decided.append(found.decided)
        return found

    def _is_one(self, a: int, b: int) -> bool:
        """Whether two expressions are one value in the dense program, whatever its compiler rounds.

        What reads 16 bits may see them rounded where another reader does not. What one equation makes of them in f32 is
        one value; what two make that say the same may be two.
        """
        if self.same[a] != self.same[b]:
            return False
        exprs = self.region.exprs
        if not any(_is_narrow(self.region, n) for n in needed(exprs, a)):
            return True
        first, second = exprs[a], exprs[b]
        if _is_narrow(self.region, a) or a == b:
            return not _is_narrow(self.region, a)
        if not isinstance(first, Apply) or not isinstance(second, Apply):
            return False
        pairs = zip(first.operands, second.operands, strict=True)
        return first.node is second.node or all(self._is_one(x, y) for x, y in pairs)

    def _is_continuous(self, number: int, expr: Apply) -> bool:
        """True for the test of a ReLU, ``where(u > 0, u, 0)``: whichever way it goes, nothing jumps."""
        zeros = [self._is_zero(o) for o in expr.operands]
        if zeros.count(True) != 1:
            return False
        tested = self.same[expr.operands[zeros.index(False)]]
        for other in self.region.exprs:
            if not isinstance(other, Apply) or number not in other.operands:
                if isinstance(other, (Place, Kth, Kept, Grouped)) and number in _operands(other):
                    return False
                continue
            cases = other.operands[1:]
            if other.node.primitive is not prims.select_n_p or other.operands[0] != number or len(cases) != 2:
                return False
            if not any(self._is_zero(c) and self.same[d] == tested for c, d in (cases, cases[::-1])):
                return False
        return True

    def _is_zero(self, number: int) -> bool:
        expr = self.region.exprs[number]
        if isinstance(expr, Number):
            return literal_number(expr.operand) == 0.0
        return isinstance(expr, Side) and known_number(expr.value) == 0.0

    def _apply(self, number: int, expr: Apply) -> Interval:
        p = expr.node.primitive
        if p in COMPARES:
            return self._compared(number, expr)
        operands = [self.values[o] for o in expr.operands]
        if p in (prims.eq_p, prims.ne_p):
            found = applied(expr.node, operands)
            self.decided.append(found.decided)
            return found
        if not self.region.varies[number] and (p in _ROOTS or p is prims.div_p):
            operands[-1] = _close(operands[-1])
        return applied(expr.node, operands, same=p is prims.mul_p and expr.operands[0] == expr.operands[1])


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
    if p in _ROOTS:
        return intervals.root(first, dtype, inverse=p is prims.rsqrt_p)
    assert p is prims.convert_element_type_p, p
    if first.low.dtype == jnp.bool_:
        return first.map(lambda end: end.astype(jnp.float32))
    return intervals.narrowed(first, dtype) if jnp.finfo(dtype).bits < 32 else first


def _close(value: Interval) -> Interval:
    """The interval where its ends are close to each other; else nothing is known."""
    known = value.high - value.low <= _APART * value.magnitude
    return value.map(lambda end: jnp.where(known, end, jnp.nan))


def _constant_over(region: Region, number: int) -> int:
    """The neighbouring units over which an expression is the same for certain."""
    expr = region.exprs[number]
    if isinstance(expr, Grouped):
        return expr.size
    if isinstance(expr, Apply):
        return min((_constant_over(region, o) for o in expr.operands if region.varies[o]), default=1)
    return 1


def _is_narrow(region: Region, number: int) -> bool:
    dtype = _dtype(region, number)
    return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4


def _dtype(region: Region, number: int) -> Any:
    expr = region.exprs[number]
    if isinstance(expr, Apply):
        return expr.node.outputs[0].aval.dtype
    if isinstance(expr, Up):
        return expr.product.out.aval.dtype
    if isinstance(expr, Side):
        return expr.value.aval.dtype
    if isinstance(expr, Number):
        return jnp.asarray(expr.operand.val).dtype
    if isinstance(expr, (Grouped, Kth)):
        return _dtype(region, expr.operand)
    return expr.dtype if isinstance(expr, (Place, Total)) else jnp.dtype(jnp.bool_)


def _operands(expr: Any) -> tuple[int, ...]:
    if isinstance(expr, Place):
        return (expr.kept,) if expr.update is None else (expr.kept, expr.update)
    return (expr.operand,)


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
        elif isinstance(expr, Grouped):
            key = "grouped", found[expr.operand], expr.size, expr.largest
        found.append(first.setdefault(key, number))
    return found
