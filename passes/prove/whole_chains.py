"""From logits to a token behind what takes them as a whole: filters by rank, by mass and by the largest probability.

A ``Chain`` stays entry by entry. Samplers do not: they sort, add up, count and pick, to decide which entries may be
drawn. All of that is replayed here on intervals, the draw included. Nothing is proved of what is kept: only that one
token wins in every program whose logits lie in the intervals. The dense program is one of them, and so is the
rewritten one, of whose logits the candidates' are exact and all others the predicted ones, inside their bounds. Whether
an entry is kept that could not win does not matter, and need not be decided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from hire_xform.lowering.prove import intervals
from hire_xform.lowering.prove.intervals import Interval
from hire_xform.lowering.prove.reductions import Held
from hire_xform.passes.ir.axis_rules import is_pointwise, moves_only
from hire_xform.passes.ir.graph import Operand, Value, dtype_of
from hire_xform.passes.match.region import hashable
from hire_xform.passes.prove.chains import Chain, Step, moved_by
from hire_xform.passes.prove.edges import Edge
from hire_xform.passes.prove.pick_rules import beside_its_edge, picked, placed
from hire_xform.passes.prove.searches import Search
from hire_xform.passes.prove.searches import replayed as searched
from hire_xform.passes.prove.whole_rules import exactly, replayed
from hire_xform.passes.weights.origins import shape_of


@dataclass(frozen=True, eq=False, repr=False)
class WholeStep(Step):
    """One equation, or one that picks entries at places that hang on the logits.

    Attributes:
      inputs: its operands; of one that picks, what it picks of, and the places.
      takes: of one that picks how an order in which it does is related to what it picks of; see ``picked``.
      located: of one that picks, whether at places of largest or smallest entries.
      edge: of one that compares entries with one of them, which that is; the last of ``inputs`` are its places.
      search: of one that searches for a number among others, what is sought.
    """

    inputs: tuple[Operand, ...] = ()
    takes: int | None = None
    located: bool = False
    edge: Edge | None = None
    search: Search | None = None


@dataclass(frozen=True, eq=False, repr=False)
class WholeChain(Chain):
    """What one reader takes of the logits, whatever they are put through.

    Attributes:
      spine: whether what it ends in has an entry for each logit, so that candidates can be chosen by it.
    """

    steps: tuple[WholeStep, ...]
    spine: bool = False

    @property
    def ranks(self) -> bool:
        """Whether candidates can be chosen by what it ends in."""
        return self.spine

    @property
    def plain(self) -> bool:
        """Never: it is taken as a whole."""
        return False

    @property
    def split(self) -> bool:
        """Never, likewise."""
        return False

    @property
    def keeps_order(self) -> bool:
        """Never, likewise."""
        return False

    @property
    def uniform(self) -> bool:
        """Whether candidates are chosen by their logits."""
        return not self.spine

    def signature(self) -> Any:
        """Equal for two chains that compute the same function; hashable."""
        steps = tuple(_signed(step) for step in self.steps)
        sides = tuple(
            (str(dtype_of(o)), str(o.val)) if not isinstance(o, Value) else (o.shape, str(dtype_of(o)))
            for s in self.steps
            for o, number in zip(s.inputs, s.operands, strict=True)
            if number is None
        )
        return "whole", self.reader.kind, self.reader.k, self.dim, self.value.shape, steps, sides

    def between(self, logits: Interval, sides: Sequence[Any]) -> Interval:
        """What the reader may take, ``[n, V']``; numbers and what they decide as ``[n, 1]``."""
        given = iter(sides)
        made: list[Held] = []
        for step in self.steps:
            operands = [
                logits
                if number == -1
                else made[number]
                if number is not None
                else exactly(next(given) if isinstance(operand, Value) else operand.val)
                for number, operand in zip(step.operands, step.inputs, strict=True)
            ]
            made.append(_step(step, operands))
        last = made[-1]
        assert isinstance(last, Interval)
        if not self.reader.has_places:
            return last.map(lambda end: end.reshape(-1, 1))
        if last.low.dtype == jnp.bool_:
            last = intervals.negated(last) if self.reader.inverted else last
            last = last.map(lambda end: end.astype(jnp.float32))
        else:
            last = intervals.negative(last) if self.reader.inverted else last
        return last.map(lambda end: jnp.moveaxis(end, self.dim, -1).reshape(-1, end.shape[self.dim]))

    def moved(self, numbers: Any) -> Any:
        """Where its equations put what stands in the product's result: ``[n, V]``."""
        made: list[Any] = []
        for step in self.steps:
            at = _along_spine(step, [n is not None and (n < 0 or made[n] is not None) for n in step.operands])
            number = None if at is None else step.operands[at]
            here = None if number is None else numbers if number < 0 else made[number]
            made.append(None if here is None else moved_by(step.node, step.result, here))
        last = made[-1]
        return jnp.moveaxis(last, self.dim, -1).reshape(-1, last.shape[self.dim])


def has_spine(steps: Sequence[Step]) -> bool:
    """Whether what the last step makes has an entry for each of some logits, pointwise equations and moves between."""
    held: list[bool] = []
    for step in steps:
        at = _along_spine(step, [n is not None and (n < 0 or held[n]) for n in step.operands])
        held.append(at is not None)
    return bool(held) and held[-1]


def _along_spine(step: Step, held: Sequence[bool]) -> int | None:
    """Which operand of a step its result has the entries of, of those that have the logits'; None for none."""
    node = step.node
    if node.outputs[step.result].aval.dtype == bool or not (is_pointwise(node) or moves_only(node)):
        return None
    for i, operand in enumerate(node.inputs):
        same = moves_only(node) or shape_of(operand) == node.outputs[step.result].shape
        if i < len(held) and held[i] and same:
            return i
    return None


def _signed(step: WholeStep) -> Any:
    node, edge = step.node, step.edge
    if step.search is not None:
        return "search", step.operands, step.search.signature
    beside = None if edge is None else (edge.entries, edge.at, edge.step)
    shape = node.outputs[step.result].shape
    return node.primitive, hashable(node.params), step.result, step.operands, step.takes, step.located, beside, shape


def _step(step: WholeStep, operands: list[Any]) -> Held:
    if step.search is not None:
        return searched(step.search, operands)
    if step.takes is not None and len(operands) == 3:
        return placed(step.node, *operands)
    if step.takes is not None:
        return picked(step.node, operands[0], operands[1], step.takes, step.located)
    if step.edge is not None:
        places = operands[2] if step.edge.places is not None else None
        made = replayed(step.node, step.result, operands[:2])
        assert isinstance(made, Interval)
        return beside_its_edge(step.node, operands[step.edge.entries], step.edge, places, made)
    same = len(operands) == 2 and step.operands[0] is not None and step.operands[0] == step.operands[1]
    return replayed(step.node, step.result, operands, same)
