"""Follows what a reader takes back to the logits: the equations of a ``Chain``, or the reason why there is none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jax.extend.core import primitives as prims

from hire_xform.passes.ir import compat
from hire_xform.passes.ir.axis_rules import is_pointwise, moves_only
from hire_xform.passes.ir.graph import Node, Operand, Value, carry_of, dtype_of
from hire_xform.passes.ir.pointwise import COMPARES, stretched_number
from hire_xform.passes.match.negative_zeros import source_of_replaced_zeros
from hire_xform.passes.match.output_axis import Fate
from hire_xform.passes.match.readers import Reader
from hire_xform.passes.prove.chains import Chain, Step, keeps_values
from hire_xform.passes.prove.interval_rules import FLOATS, can_be_bounded
from hire_xform.passes.prove.logits import Logits
from hire_xform.passes.prove.soft_maximum import ENDS, is_left_out
from hire_xform.passes.weights.products import Product

# Equations of side inputs that are run ahead.
_MAX_AHEAD = 512


class NotFollowedError(Exception):
    """The way from logits to a reader goes through what has no bounds."""


class Filtered(str):
    """What stands on the way: the logits themselves decide which of them are read, as in top-k and top-p sampling."""


class FilteredError(NotFollowedError):
    """The way goes through a filter of the logits."""


def chain_of(product: Product, fate: Fate, reader: Reader) -> Chain | str:
    """The way from a product's output to one of its readers; a reason where it is not followed."""
    try:
        return Tracer(product, fate, reader).chain()
    except FilteredError as error:
        return Filtered(str(error))
    except NotFollowedError as error:
        return str(error)


class Tracer:
    """Follows one reader's operand backwards to the product."""

    # Equations between a reader and the logits.
    most_steps = 64

    def __init__(self, product: Product, fate: Fate, reader: Reader):
        self.product, self.fate, self.reader = product, fate, reader
        self.logits = Logits(product, fate)
        self.steps: list[Step] = []
        self.sides: list[Operand] = []
        self.outer: dict[Value, Operand] = {}
        self.number: dict[Value, int] = {product.out: -1}
        self.softmax = self.merged = self.cut = False
        # Steps from which something common to a token is left out: what follows must not notice.
        self.shifted: set[int] = set()

    def chain(self) -> Chain:
        """The way; raises where it is not followed."""
        value = self._inside(self.reader.value)
        value = self._without_softmax(value)
        dims = [d for d in self.fate.axes.get(value, ()) if value.shape[d] > 1 or len(value.shape) == 1]
        if len(dims) != 1:
            raise NotFollowedError(f"its axis is split or merged on the way to {self.reader.where}")
        if value.aval.dtype.name not in FLOATS:
            raise NotFollowedError(f"{self.reader.where} reads {value.aval.dtype.name} made of its logits")
        self._number(value)
        if self.softmax and (self.merged or value.shape[dims[0]] > self.product.width):
            raise NotFollowedError(f"a softmax of each token is compared with others' by {self.reader.where}")
        ahead = self._ahead()
        return Chain(
            self.reader,
            value,
            dims[0],
            tuple(self.steps),
            tuple(self.sides),
            ahead,
            self.outer,
            self.softmax,
            self.cut,
        )

    def _inside(self, value: Value) -> Value:
        """What leaves the loop that the product stands in, as it is inside."""
        scopes, home = self.product.node.scope.chain(), self.product.node.scope
        while True:
            node, found = value.node, None
            if value.scope is home and not self.logits.reach(value):
                # What a loop carries to its next turn is what it returns in this one.
                found = carry_of(value) if node is None else node.inputs[0] if keeps_values(node) else None
                if found is None:
                    raise NotFollowedError(f"its logits go to {self.reader.where} in the next turn of a loop")
            elif node is None:
                break
            elif node.children:
                inner = next((child for child in node.children if child in scopes), None)
                found = None if inner is None else inner.outputs[node.outputs.index(value)]
            elif node.primitive in _STORES and node.inputs[0] not in self.fate.axes:
                found = node.inputs[1 if node.primitive is prims.dynamic_update_slice_p else -1]
            elif value.scope is not home and value.scope in scopes and moves_only(node):
                found = node.inputs[0]
            if not isinstance(found, Value) or found not in self.fate.axes:
                break
            if value in self.fate.axes and self.logits.width(value) < self.logits.width(found):
                raise NotFollowedError(f"its logits leave a {home.kind} and are cut on the way to {self.reader.where}")
            value = found
        if value.scope is not home and not self.logits.are_within(value.scope):
            raise NotFollowedError(f"its logits leave a {home.kind} on the way to {self.reader.where}")
        return value

    def _without_softmax(self, value: Value) -> Value:
        """A softmax or log-softmax at the very end of the way is left out: it keeps the order, but for its rounding."""
        found, at = value, value
        for _ in range(16):
            node = at.node
            if node is None or at is self.product.out or self.logits.are_merged_in(at):
                break
            p = node.primitive
            source: Any = node.inputs[0] if node.inputs else None
            if p in (prims.sub_p, prims.div_p) and is_left_out(
                self.logits, node.inputs[1], at, divisor=p is prims.div_p
            ):
                found = at = source
                self.softmax = True
                continue
            # Behind a softmax the largest is ahead by a margin, which is more than replaced zeros are apart.
            replaced = source_of_replaced_zeros(node)
            if replaced is not None:
                source = replaced
            elif not isinstance(source, Value) or not (p in ENDS or keeps_values(node)):
                break
            if self.logits.width(at) != self.logits.width(source):
                break
            at = source
        return found

    def _number(self, value: Value) -> int:
        """The number of the step that makes a value, which hangs on the logits."""
        if value not in self.number:
            if len(self.steps) >= self.most_steps:
                raise NotFollowedError(
                    f"more than {self.most_steps} equations stand between its logits and {self.reader.where}"
                )
            self.number[value] = self._made(value)
        return self.number[value]

    def _made(self, value: Value) -> int:
        """The same of a value that has none yet."""
        node = value.node
        if node is None:
            if isinstance(value.outer, Value) and not value.scanned:
                self.outer[value] = value.outer
                return self._number(value.outer)
            raise NotFollowedError(f"its logits are the state of a loop on the way to {self.reader.where}")
        if value.aval.dtype == bool and not (node.primitive in COMPARES or self._is_followed(node, value)):
            if not is_pointwise(node):
                raise FilteredError(f"{node.primitive} at {node.source}, a filter by what is made of the logits")
            self.steps.append(
                Step(node, node.outputs.index(value), (None,) * len(node.inputs), unknown=True, differs=True)
            )
            return len(self.steps) - 1
        common = self._checked(node, value)
        operands: list[int | None] = []
        for i, operand in enumerate(node.inputs):
            if isinstance(operand, Value) and self.logits.reach(operand) and not (common and i == 1):
                operands.append(self._compared(node, operand) if node.primitive in COMPARES else self._number(operand))
            else:
                operands.append(None)
        for i, (operand, number) in enumerate(zip(node.inputs, operands, strict=True)):
            if isinstance(operand, Value) and number is None and not (common and i == 1):
                self._beside(operand)
        if any(n in self.shifted for n in operands) and not _keeps_shift(node, operands):
            raise NotFollowedError(f"{node.primitive} at {node.source} is applied to what a softmax made of its logits")
        differs = node.primitive is prims.scatter_p or any(
            isinstance(o, Value) and number is None and not (common and i == 1) and self._differs(o, value)
            for i, (o, number) in enumerate(zip(node.inputs, operands, strict=True))
        )
        self.steps.append(Step(node, node.outputs.index(value), tuple(operands), common, differs=differs))
        if common or any(n in self.shifted for n in operands):
            self.shifted.add(len(self.steps) - 1)
        self.softmax = self.softmax or common
        self.merged = self.merged or self.logits.are_merged_in(value)
        self.cut = self.cut or self.logits.width(value) < self.product.width
        return len(self.steps) - 1

    def _beside(self, side: Value) -> None:
        """Notes a side; raises for one that is rounded to 16 bits here and may not be in the dense program."""
        rounding = rounds_to_16_bits(side)
        if rounding is not None:
            raise NotFollowedError(
                f"{rounding.primitive} at {rounding.source} is rounded to 16 bits or, as XLA has it, is not; widen the "
                "logits to float32 before they are sampled"
            )
        self.sides.append(side)

    def _differs(self, side: Value, beside: Value) -> bool:
        """Whether a side differs along the vocabulary, judged by the axes of what is made with it."""
        if len(side.shape) != len(beside.shape):
            return math.prod(side.shape) != 1
        return any(side.shape[d] != 1 for d in self.fate.axes[beside])

    def _is_followed(self, node: Node, value: Value) -> bool:
        try:
            self._checked(node, value)
        except NotFollowedError:
            return False
        # What it is made of has to be followed as well: not the bits of logits, as a sign is read from.
        made_of = (o for o in node.inputs if isinstance(o, Value) and self.logits.reach(o))
        return all(o.aval.dtype == bool or dtype_of(o).name in FLOATS for o in made_of)

    def _compared(self, node: Node, operand: Value) -> int:
        """The number of what is compared: with what is made of the logits, that is a filter of them."""
        if operand in self.fate.drawn or operand not in self.fate.axes:
            raise FilteredError(f"{node.primitive} at {node.source}, a filter by what is made of the logits")
        return self._number(operand)

    def _checked(self, node: Node, value: Value) -> bool:
        """Whether the second operand is left out, as what is common to a token; raises where there are no bounds."""
        p = node.primitive
        if value not in self.fate.axes or value in self.fate.drawn:
            raise NotFollowedError(f"{p} at {node.source} mixes its logits on the way to {self.reader.where}")
        if p is prims.sub_p and isinstance(node.inputs[1], Value) and is_left_out(self.logits, node.inputs[1], value):
            return True
        if p is prims.dynamic_slice_p or (p is prims.scatter_p and node.params.get("update_jaxpr") is None):
            if all(not self.logits.reach(o) for o in node.inputs[1:] if isinstance(o, Value)):
                return False
        elif moves_only(node) or p is compat.OPTIMIZATION_BARRIER:
            return False
        elif is_pointwise(node) and can_be_bounded(node):
            for operand in node.inputs:
                side = not isinstance(operand, Value) or not self.logits.reach(operand)
                if side and dtype_of(operand).name not in (*FLOATS, "bool"):
                    raise NotFollowedError(_not_bounded(node, self.reader))
            return False
        raise NotFollowedError(_not_bounded(node, self.reader))

    def _ahead(self) -> tuple[Node, ...]:
        """The equations behind the projection that its sides are made by, in program order."""
        found: list[Node] = []
        seen: set[Node] = set()
        stack = [(o, False) for o in self.sides if isinstance(o, Value)]
        while stack:
            value, done = stack.pop()
            node = value.node
            if node is None:
                self._entered(value)
                continue
            if done:
                if node not in found:
                    found.append(node)
                continue
            if node in seen or not self.logits.are_within(node.scope) or self.logits.come_after(node):
                continue
            seen.add(node)
            if node.eqn.effects or len(seen) > _MAX_AHEAD:
                raise NotFollowedError(f"{node.primitive} at {node.source} can't be run ahead of its logits")
            stack.append((value, True))
            stack += [(o, False) for o in node.inputs if isinstance(o, Value)]
        return tuple(found)

    def _entered(self, value: Value) -> None:
        """Notes what is passed in for the input of a body; raises where it changes from one turn to the next."""
        if value.const is not None or not self.logits.are_within(value.scope) or value.scope is self.product.node.scope:
            return
        if value.outer is None or value.scanned:
            raise NotFollowedError(f"{self.reader.where} joins its logits with the state of a loop")
        self.outer[value] = value.outer
        if isinstance(value.outer, Value) and (extra := value.outer).node is None:
            self._entered(extra)


# What is written somewhere is what is read of it later.
_STORES = frozenset({prims.dynamic_update_slice_p, prims.scatter_p})


_EXACT = frozenset(
    {prims.neg_p, prims.abs_p, prims.max_p, prims.min_p, prims.select_n_p, prims.copy_p, prims.stop_gradient_p}
)
_MOST_LOOKED = 64


def rounds_to_16_bits(side: Value) -> Node | None:
    """The equation by which a value of 16 bits is rounded, if it is: XLA leaves such a rounding out where it can."""
    queue, seen = [side], {side}
    while queue and len(seen) < _MOST_LOOKED:
        value = queue.pop()
        node = value.node
        if node is None or value.aval.dtype.name not in ("bfloat16", "float16"):
            continue
        if node.primitive not in _EXACT and not moves_only(node):
            return node
        operands = [o for o in node.inputs if isinstance(o, Value) and o not in seen]
        seen.update(operands)
        queue += operands
    return None


# Below any logit less what is common to a token.
_MASKED = -1e30


def _keeps_shift(node: Node, operands: Sequence[int | None]) -> bool:
    """Whether an equation keeps the order of entries from all of which of a token the same was to be subtracted."""
    p = node.primitive
    sides = [o for o, number in zip(node.inputs, operands, strict=True) if number is None]
    if p in (prims.add_p, prims.add_jaxvals_p, prims.sub_p):
        return len(sides) == 1 and operands[0 if p is prims.sub_p else operands.index(None) - 1] is not None
    if p in (prims.mul_p, prims.div_p):
        return operands[0] is not None and len(sides) == 1 and (stretched_number(sides[0]) or 0.0) > 0
    if p is prims.select_n_p:
        cases = [o for o, number in zip(node.inputs[1:], operands[1:], strict=True) if number is None]
        return operands[0] is None and all((stretched_number(o) or 0.0) < _MASKED for o in cases)
    return keeps_values(node)


def _not_bounded(node: Node, reader: Reader) -> str:
    return f"{node.primitive} at {node.source}, on the way to {reader.where}, has no bounds"
