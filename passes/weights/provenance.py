"""Answers for a value: is it a weight, and how is it computed once, outside the program?

A weight is an argument leaf marked as weights, or a closed-over array, reached only through layout and dtype
operations, a scan's slicing of its leading axis, a shard_map's cutting, or indexing a stack; or one of few bits, times
scales that are weights (``few_bits.py``). The steps from the leaf to the value are its ``Recipe``: applied to the leaf
when packing, never at run time. What is made of weights alone by other operations is derived: no weight, but known to
be none of the data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from jax.extend.core import primitives as prims

from hire_xform.passes.ir import compat
from hire_xform.passes.ir.axis_rules import moves_only
from hire_xform.passes.ir.compat import Literal
from hire_xform.passes.ir.graph import Graph, Node, Operand, Scope, Value, carried_inputs, dtype_of
from hire_xform.passes.weights.few_bits import COMMUTES, SCALES, in_few_bits, scaled, stored_parts, stretched
from hire_xform.passes.weights.origins import (
    RULES,
    TAKES,
    Origin,
    Rule,
    ScanSlice,
    moved,
    picks_matrix,
    shape_of,
    sharded,
    stacked,
)
from hire_xform.passes.weights.recipe import Recipe, Root, Stack


class Provenance:
    """Origins of all weight values of a graph.

    Args:
      graph: the program.
      roots: for each of the top scope's inputs the root it is as a weight, or None.

    Attributes:
      consts: closed-over arrays that are weights, by identity.
    """

    def __init__(self, graph: Graph, roots: Sequence[Root | None]):
        self._origins: dict[Value, Origin] = {}
        # Of a value made of weights the operation that made it, and of what.
        self._derived: dict[Value, tuple[str, tuple[Operand, ...]]] = {}
        # What is stretched of weights, and rows that are taken of them: no weights, but what others may be scaled by.
        self._scales: dict[Value, Origin] = {}
        # Of weights that are scaled by data the operation, and the weight.
        self._by_data: dict[Value, tuple[str, tuple[Operand, ...]]] = {}
        # Of operations on weights in few bits that make no weight of them, why.
        self._unscaled: dict[Node, str] = {}
        self._fixed: set[Value] = set()
        self.consts: dict[int, Any] = {}
        for value, root in zip(graph.top.inputs, roots, strict=True):
            if root is not None:
                self._origins[value] = Origin(Recipe(root), stored=dtype_of(value))
        self._scope(graph.top)

    def origin(self, operand: Operand) -> Origin | None:
        """How a value is computed from a weight leaf; None when it is not a weight."""
        if isinstance(operand, Literal):
            return None
        if operand.const is not None:
            self.consts[id(operand.const)] = operand.const
            return Origin(Recipe(Root("const", id(operand.const))), stored=dtype_of(operand))
        return self._origins.get(operand)

    def derived(self, operand: Operand) -> str | None:
        """For a value computed from weights alone but by more than layout and dtype: the operation that did it."""
        found = self._derived.get(operand) if isinstance(operand, Value) else None
        return None if found is None else found[0]

    def scaled_by_data(self, operand: Operand) -> str | None:
        """For weights that are scaled by what differs from call to call: the operation that does it."""
        found = self._by_data.get(operand) if isinstance(operand, Value) else None
        return None if found is None else found[0]

    def read_by(self, operands: Iterable[Operand]) -> dict[Root, int]:
        """The weights that some values are made of, in the order they are met, and the bytes read of each in a call.

        What is taken of a weight is read once in each execution of the scope that takes it.
        """
        parts: dict[tuple[Recipe, int], Root] = {}
        seen: set[Value] = set()
        queue = [o for o in operands if isinstance(o, Value)][::-1]
        while queue:
            value = queue.pop()
            if value in seen:
                continue
            seen.add(value)
            origin = self.origin(value)
            if origin is None:
                made = self._derived.get(value) or self._by_data.get(value) or ("", ())
                queue += [o for o in made[1] if isinstance(o, Value)][::-1]
                continue
            for recipe, size in stored_parts(origin, value.shape):
                parts[recipe, size * value.scope.iterations] = recipe.root
        read: dict[Root, int] = {}
        for (_, size), root in parts.items():
            read[root] = read.get(root, 0) + size
        return read

    def _scope(self, scope: Scope) -> None:
        for value in scope.inputs:
            if scope.kind == "top" or value.outer is None:
                continue
            origin = self.origin(value.outer)
            if origin is not None and value.scanned:
                size = shape_of(value.outer)[0]
                origin = stacked(origin, [Stack(size)], [ScanSlice(scope)])
            if origin is not None and value.split:
                if origin.recipe.scalings:
                    self._derived[value] = "scaling it outside of the shard_map that cuts it", (value.outer,)
                    continue
                origin = sharded(origin, value)
            if origin is not None:
                self._origins[value] = origin
            elif (how := self.derived(value.outer)) is not None:
                self._derived[value] = how, (value.outer,)
        for node in scope.nodes:
            self._node(node)
            for child in node.children:
                self._child(child)
            if node.children:
                self._leave(node)

    def _child(self, scope: Scope) -> None:
        """An inner scope. Weights in its state that it changes count as computed, if it makes them of weights."""
        node = scope.node
        if node is None or scope.kind not in ("scan", "while"):
            self._scope(scope)
            return
        carry = carried_inputs(node)
        first = len(node.inputs) - len(scope.inputs) + (scope.inputs.index(carry[0]) if carry else 0)
        guessed = {
            i: value
            for i, value in enumerate(carry)
            if value.outer is None and self._is_weight_matrix(node.inputs[first + i])
        }
        while True:
            how = f"{node.primitive} at {node.source}"
            self._derived.update((value, (how, (node.inputs[first + i],))) for i, value in guessed.items())
            self._scope(scope)
            wrong = [i for i in guessed if not self._is_weight_matrix(scope.outputs[i])]
            if not wrong:
                return
            self._forget(scope)
            for i in wrong:
                del guessed[i]

    def _leave(self, node: Node) -> None:
        """Results of a loop or branch that are weights again, whichever way they were come by."""
        for i, result in enumerate(node.outputs):
            made = [child.outputs[i] for child in node.children]
            stacked = node.children[0].kind == "scan" and i >= len(carried_inputs(node))
            if not stacked and all(self._is_weight_matrix(value) for value in made):
                self._derived[result] = f"{node.primitive} at {node.source}", tuple(made)

    def _forget(self, scope: Scope) -> None:
        for value in scope.inputs:
            self._origins.pop(value, None)
            self._derived.pop(value, None)
        for node in scope.nodes:
            for value in node.outputs:
                for found in (self._origins, self._derived, self._scales, self._by_data):
                    found.pop(value, None)
            for child in node.children:
                self._forget(child)

    def _is_weight_matrix(self, operand: Operand) -> bool:
        if not _is_matrix(operand):
            return False
        return self.origin(operand) is not None or self.derived(operand) is not None

    def _node(self, node: Node) -> None:
        if node.children:
            return
        if node.primitive is compat.OPTIMIZATION_BARRIER:
            for operand, result in zip(node.inputs, node.outputs, strict=True):
                self._set(result, self.origin(operand))
            return
        first = node.inputs[0] if node.inputs else None
        origin, noted = None, False
        if isinstance(first, Value):
            origin = self._origins.get(first) if first.const is None else self.origin(first)
            noted = first in self._scales or first in self._by_data
        rule: Rule | None = None
        if origin is not None or noted:  # few equations take weights, or what may become them
            rule = moved if moves_only(node) else RULES.get(node.primitive)
        results = rule(node, origin) if rule is not None and origin is not None else None
        if results is None and node.primitive in SCALES:
            second = node.inputs[1]
            if origin is not None or (isinstance(second, Value) and second in self._origins):
                results = self._scaled(node)
        if results is not None:
            for result, found in zip(node.outputs, results, strict=True):
                self._set(result, found)
            return
        self._mark_derived(node)
        if origin is not None or noted:
            self._note(node, rule)

    def _note(self, node: Node, rule: Rule | None) -> None:
        """Notes what is no weight, but what weights may be scaled by; and what is moved of weights scaled by data."""
        first = node.inputs[0] if node.inputs else None
        if first is None or isinstance(first, Literal):
            return
        origin, rule = self.origin(first) or self._scales.get(first), TAKES.get(node.primitive, rule)
        found = rule(node, origin) if origin is not None and rule is not None else None
        if found is None and origin is not None and node.primitive is prims.broadcast_in_dim_p:
            found = [stretched(node, origin)]
        self._scales.update(zip(node.outputs, found or (), strict=False))
        if first in self._by_data and rule is not None:
            self._by_data.update((result, self._by_data[first]) for result in node.outputs)

    def _scaled(self, node: Node) -> list[Origin] | None:
        """A weight that is stored in few bits, times or plus another weight or a number."""
        for first, second in ((0, 1), (1, 0)) if node.primitive in COMMUTES else ((0, 1),):
            values, by = node.inputs[first], node.inputs[second]
            origin = self.origin(values)
            if origin is None or shape_of(values) != node.outputs[0].shape or not in_few_bits(origin.stored):
                continue
            other = self.origin(by) or (self._scales.get(by) if isinstance(by, Value) else None)
            made = scaled(node, origin, by, other)
            if made is None and self.derived(by) is not None:
                made = "its scales are computed inside the program"
            if isinstance(made, Origin):
                return [made]
            how = f"{node.primitive} at {node.source}"
            if made is not None:
                how = self._unscaled[node] = f"{how} ({made})"
            if isinstance(by, Value) and 1 < math.prod(shape_of(by)) < math.prod(shape_of(values)):
                self._by_data[node.outputs[0]] = how, (values,)
        return None

    def _set(self, value: Value, origin: Origin | None) -> None:
        if origin is not None:
            self._origins[value] = origin

    def _mark_derived(self, node: Node) -> None:
        """Marks what is made of weights alone. Data may say which part of a weight is taken, and how it is scaled."""
        made_of: list[Value] = []
        of_data = True
        for value in node.inputs:
            if not isinstance(value, Value):
                continue
            made_of.append(value)
            if value.const is not None or value in self._fixed or value in self._origins or value in self._derived:
                of_data = False
        if made_of and of_data:
            return
        if picks_matrix(node):
            made_of = made_of[:1]
        elif node.primitive not in _READS_BY_DATA and any(map(_is_matrix, made_of)):
            made_of = [v for v in made_of if math.prod(v.shape) > 1]
        made_of = [v for v in made_of if v not in self._fixed]
        if not made_of:
            self._fixed.update(node.outputs)
        elif all(v.const is not None or v in self._origins or v in self._derived for v in made_of):
            how = self._unscaled.get(node) or f"{node.primitive} at {node.source}"
            for result in node.outputs:
                self._derived[result] = how, tuple(made_of)


# With one row of data these give data: a product, and the look-up of one token.
_READS_BY_DATA = (prims.dot_general_p, prims.gather_p, prims.dynamic_slice_p)


def _is_matrix(operand: Operand) -> bool:
    """True for what has two axes longer than one."""
    long = 0
    for size in operand.aval.shape:  # type: ignore[union-attr] # asked of nearly every operand there is
        long += size > 1
    return long >= 2
