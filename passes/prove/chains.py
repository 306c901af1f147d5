"""From logits to what a reader takes of them: the equations between, replayed on intervals.

A proof has to be of what the program reads. Between a projection and its arg max there may stand a bias, a temperature,
a soft cap, a mask, noise that draws a sample, the update of a low-rank adapter. All that does not hang on the logits is
known exactly before the arg max is (``Chain.sides``); it may be computed later in the program, so that its equations
are run ahead (``Chain.ahead``). A softmax or a log-softmax in front of an arg max subtracts what is the same for all
entries of a token; it is left out, and a margin stands for how it rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.extend.core import primitives as prims

from hire_xform.lowering.prove import intervals
from hire_xform.lowering.prove.intervals import Interval
from hire_xform.passes.ir import compat
from hire_xform.passes.ir.axis_rules import is_pointwise, moves_only
from hire_xform.passes.ir.graph import Node, Operand, Value, dtype_of
from hire_xform.passes.ir.pointwise import HINTS
from hire_xform.passes.match.readers import Reader
from hire_xform.passes.match.region import hashable
from hire_xform.passes.prove.interval_rules import FLOATS, applied

# What a soft maximum that is left out rounds by, as a share of the magnitudes it is made of; see `margin_of`.
_MARGIN = 2.0**-19


@dataclass(frozen=True, eq=False, repr=False)
class Step:
    """One equation of a chain.

    Attributes:
      node: the equation.
      result: which of its results is followed.
      operands: for each operand the number of the step that makes it (-1: the logits), or None where it is a side.
      common: True where a side is the same for all entries of a token and hangs on the logits: it is left out.
      unknown: True for a truth value made of the logits by what has no bounds: it may be either.
      differs: True where it does not do the same to all entries of a token: a side differs along the vocabulary.
    """

    node: Node
    result: int
    operands: tuple[int | None, ...]
    common: bool = False
    unknown: bool = False
    differs: bool = False


@dataclass(frozen=True, eq=False, repr=False)
class Chain:
    """What one reader takes of the logits.

    Attributes:
      reader: the reader.
      value: what the chain ends in: the reader's operand, or what is left of it without a softmax.
      dim: the vocabulary's axis in it.
      steps: the equations.
      sides: operands of them that do not hang on the logits, in order of their use.
      ahead: equations that make sides and stand behind the projection, in program order.
      outer: inputs of bodies that the chain enters, with what is passed in for them.
      softmax: True where what is left out rounds, so that the largest must be ahead by a margin.
      cut: True where some of the logits are not read, so that the largest of all need not be among what is.
    """

    reader: Reader
    value: Value
    dim: int
    steps: tuple[Step, ...]
    sides: tuple[Operand, ...]
    ahead: tuple[Node, ...]
    outer: dict[Value, Operand]
    softmax: bool
    cut: bool

    @property
    def ranks(self) -> bool:
        """Whether candidates can be chosen by what it ends in."""
        return not self.plain

    @property
    def plain(self) -> bool:
        """True where the reader takes the logits themselves: moved, widened, and no more."""
        moved = not self.softmax and not self.cut and not self.reader.inverted
        return moved and all(keeps_values(step.node) for step in self.steps)

    @property
    def uniform(self) -> bool:
        """True where all logits are read, and the same is done to them all along the vocabulary."""
        return not self.cut and not any(step.differs for step in self.steps)

    @property
    def split(self) -> bool:
        """True where a part of the vocabulary's entries can be replayed by itself, as each of several devices has one.

        That is so of logits ``[T, V]`` to which pointwise equations alone are applied, with side inputs of that shape
        or of one that broadcasts to it.
        """
        shape = self.value.shape
        sides = (o.shape for o in self.sides if isinstance(o, Value))
        return (
            len(shape) == 2
            and self.dim == 1
            and self.reader.k == 1
            and not (self.softmax or self.cut)
            and all(is_pointwise(s.node) and not (s.common or s.unknown) for s in self.steps)
            and all(s.node.outputs[s.result].shape == shape for s in self.steps)
            and all(not s or (len(s) == 2 and s[0] in (1, shape[0]) and s[1] in (1, shape[1])) for s in sides)
        )

    @property
    def keeps_order(self) -> bool:
        """True where the largest of what it ends in is the largest of the logits."""
        return self.plain or (self.uniform and self.reader.slope > 0)

    def signature(self) -> Any:
        """Equal for two chains that compute the same function; hashable."""
        steps = tuple(
            (s.node.primitive, hashable(s.node.params), s.result, s.operands, s.common, s.unknown, _literals(s))
            for s in self.steps
        )
        sides = tuple((o.shape, str(dtype_of(o))) for o in self.sides if isinstance(o, Value))
        return self.reader.kind, self.reader.k, self.dim, self.value.shape, steps, sides, self.softmax

    @property
    def nodes(self) -> list[Node]:
        """Its equations, and those that its sides are made by."""
        return [*(step.node for step in self.steps), *self.ahead]

    def leaves(self) -> list[Operand]:
        """What the sides are computed from, all of which is there when the projection is run."""
        made = {result for node in self.ahead for result in node.outputs}
        wanted = [*self.sides, *(o for node in self.ahead for o in node.inputs)]
        found = [self.resolved(o) for o in wanted if isinstance(o, Value)]
        return [o for o in dict.fromkeys(found) if isinstance(o, Value) and o not in made]

    def resolved(self, operand: Operand) -> Operand:
        """An operand as it is called where the projection stands."""
        while isinstance(operand, Value) and operand in self.outer:
            operand = self.outer[operand]
        return operand

    def between(self, logits: Interval, sides: Sequence[Any]) -> Interval:
        """What the reader may take: intervals ``[n, V]`` of logits in the shape of the product's result.

        Args:
          logits: intervals of them.
          sides: the values of ``sides``.
        """
        given = iter(sides)
        made: list[Interval] = []
        for step in self.steps:
            if step.unknown:
                either = jnp.zeros(step.node.outputs[step.result].shape, bool)
                made.append(Interval(either, ~either))
                continue
            operands = [
                logits if number == -1 else made[number] if number is not None else None for number in step.operands
            ]
            known = [
                None if number is not None else operand.val if not isinstance(operand, Value) else next(given)
                for number, operand in zip(step.operands, step.node.inputs, strict=True)
                if not (step.common and number is None)
            ]
            made.append(_applied(step, operands, known))
        last = made[-1] if made else logits
        last = intervals.negative(last) if self.reader.inverted else last
        return last.map(lambda end: jnp.moveaxis(end, self.dim, -1).reshape(-1, end.shape[self.dim]))

    def moved(self, numbers: Any) -> Any:
        """Where its equations put what stands in the product's result: ``[n, V]``."""
        made: list[Any] = []
        for step in self.steps:
            known = (numbers if n == -1 else made[n] for n in step.operands if n is not None)
            here = next((one for one in known if one is not None), None)
            if here is None:  # a truth value, which moves nothing
                made.append(None)
                continue
            made.append(moved_by(step.node, step.result, here))
        last = made[-1] if made else numbers
        return jnp.moveaxis(last, self.dim, -1).reshape(-1, last.shape[self.dim])


def _literals(step: Step) -> Any:
    return tuple(
        (str(dtype_of(o)), str(o.val)) if number is None and not isinstance(o, Value) else None
        for number, o in zip(step.operands, step.node.inputs, strict=True)
    )


def keeps_values(node: Node) -> bool:
    """True for an equation that moves or widens what it is given, and no more."""
    p = node.primitive
    if p is prims.convert_element_type_p:
        before, after = dtype_of(node.inputs[0]), node.outputs[0].aval.dtype
        return before.name in FLOATS and after.name in ("float32", "float64")
    return moves_only(node) or p in _KEEPS or p in HINTS


_KEEPS = frozenset(
    {
        prims.copy_p,
        prims.name_p,
        prims.stop_gradient_p,
        prims.dynamic_slice_p,
        compat.PVARY,
        compat.OPTIMIZATION_BARRIER,
    }
)


def _applied(step: Step, operands: list[Interval | None], known: list[Any]) -> Interval:
    node, p = step.node, step.node.primitive
    here = next(o for o in operands if o is not None)
    if p is compat.OPTIMIZATION_BARRIER:
        return next(o for o in operands[step.result : step.result + 1] if o is not None)
    if moves_only(node):
        return here.map(lambda end: moved_by(node, step.result, end))
    if p is prims.dynamic_slice_p:
        starts = known[1:]
        return here.map(lambda end: compat.bind(node.eqn, [end, *starts])[0])
    if p is prims.scatter_p:
        where, update = known[1], jnp.asarray(known[2]).astype(jnp.float32)
        return here.map(lambda end: compat.bind(node.eqn, [end, where, update])[0])
    if step.common:
        return here
    given = [
        operand if operand is not None else intervals.point(value)
        for operand, value in zip(operands, known, strict=True)
    ]
    made = applied(node, given, same=len(operands) == 2 and step.operands[0] == step.operands[1])
    return _infinite(node, given, made)


def moved_by(node: Node, result: int, end: Any) -> Any:
    """Where an equation puts entries: elsewhere, or beside as many of another operand as its result has."""
    if not moves_only(node):
        return jnp.broadcast_to(end, node.outputs[result].shape)
    params = dict(node.params)
    return (
        node.primitive.bind(end, **params)[result]
        if node.primitive.multiple_results
        else compat.bind(node.eqn, [end])[0]
    )


def _infinite(node: Node, given: list[Interval], made: Interval) -> Interval:
    """Masked entries stay minus infinity through sums and quotients, of which nothing else would be known."""
    if node.primitive not in _SUMS or not given or made.low.dtype == jnp.bool_:
        return made
    sure = [(g.low == g.high) & jnp.isneginf(g.low) for g in given]
    first, *others = given
    if node.primitive in (prims.add_p, prims.add_jaxvals_p):
        masked = (sure[0] & (others[0].high < jnp.inf)) | (sure[1] & (first.high < jnp.inf))
    elif node.primitive is prims.sub_p:
        masked = sure[0] & (others[0].low > -jnp.inf)
    else:
        masked = sure[0] & (others[0].low > 0.0) & (others[0].high < jnp.inf)
    return made.map(lambda end: jnp.where(masked, -jnp.inf, end))


_SUMS = frozenset({prims.add_p, prims.add_jaxvals_p, prims.sub_p, prims.mul_p, prims.div_p})


def margin_of(logits: Interval) -> Any:
    """How far ahead the largest must be where a softmax is left out, ``[n, 1]``, for intervals ``[n, V]``.

    What is left out is the largest entry, the logarithm of a sum of exponentials, that sum as a divisor, and the
    exponential itself. With M the largest magnitude, subtracting the first two rounds by some units in the last place
    of M + log V; an exponential of a difference is off by some units, so that two of them are apart in the order of
    their arguments where these are apart by more. ``2^-19 (M + log V + 2)`` is above all of that together.
    """
    magnitude = logits.magnitude
    most = jnp.max(jnp.where(jnp.isfinite(magnitude), magnitude, 0.0), axis=-1, keepdims=True)
    return _MARGIN * (most + jnp.log(jnp.float32(magnitude.shape[-1])) + 2.0)
