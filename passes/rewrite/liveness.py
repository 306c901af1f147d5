"""Which equations and values the rewritten program still needs.

A rewritten site no longer reads its weights, so they, and whatever only fed them, drop out: of the program, of the
operands of loops, and of what a ``Packed`` has to hold.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

from jax.extend.core import primitives as prims

from hire_xform.passes.ir import compat
from hire_xform.passes.ir.graph import Frame, Graph, Node, Operand, Scope, Value, carried_inputs
from hire_xform.passes.rewrite.action import Action
from hire_xform.passes.weights.origins import IndexSlice


class Liveness:
    """Live equations and values of a graph with some actions.

    Attributes:
      nodes: equations to be evaluated.
      values: values that are read.
      changed: scopes in which something is done, at any depth.
    """

    def __init__(
        self, graph: Graph, actions: dict[Node, Action], inlined: Container[Frame] = (), keeps_unused: bool = False
    ):
        """For a graph, what is done where, and the calls that are evaluated where they are called.

        With ``keeps_unused`` all but what is replaced is live, whether or not anything reads it.
        """
        self._actions = actions
        self._kept: Container[Node] = ()
        if keeps_unused:
            replaced = {node for action in actions.values() for node in action.nodes}
            self._kept = {node for node in graph.program_order() if node not in replaced or node in actions}
        self._inlined = inlined
        self.nodes: set[Node] = set()
        self.values: set[Value] = set()
        self.changed: set[Scope] = set()
        for node in actions:
            self.changed.update(node.scope.chain())
        self._scope(graph.top)

    def _scope(self, scope: Scope) -> list[Operand]:
        """Marks a scope backwards from its outputs; returns what it needs of the scopes around it, by index."""
        outward: list[Operand] = []
        entered: set[Frame] = set()
        carry = carried_inputs(scope.node) if scope.kind in ("scan", "while") and scope.node is not None else []
        unchanging = [value.outer is not None for value in carry] + [False] * (len(scope.outputs) - len(carry))
        self._need(o for o, same in zip(scope.outputs, unchanging, strict=True) if not same)
        for node in reversed(scope.nodes):
            # Loops are marked whether or not their results are read: their bodies may have effects.
            if node.eqn.effects or not self.values.isdisjoint(node.outputs) or node in self._kept:
                self.nodes.add(node)
                if node.frame not in entered:
                    entered.add(node.frame)
                    # The derivative rule of a custom call around it reads the call's own operands, weights included.
                    for frame in node.frame.ancestors():
                        if frame.kind == "custom" and frame not in self._inlined:
                            self._need(frame.inputs)
                if not node.children and node not in self._actions:
                    self._need(node.inputs)
                    continue
                for operand, home in self._operands(node):
                    if home is None or home is scope:
                        self._need([operand])
                    else:
                        outward.append(operand)
        return outward

    def _need(self, operands: Iterable[Operand]) -> None:
        for operand in operands:
            if isinstance(operand, Value):
                self.values.add(operand)

    def _operands(self, node: Node) -> Iterable[tuple[Operand, Scope | None]]:
        action = self._actions.get(node)
        if action is not None:
            yield from ((o, None) for o in action.operands)
            for need in action.needs:
                for ref in need.refs:
                    if isinstance(ref, IndexSlice):
                        yield ref.index, ref.node.scope
            return
        inner: list[Operand] = []
        for child in node.children:
            inner += self._scope(child)
        # An index that an action further in hangs on lives here or further out.
        for operand in inner:
            if isinstance(operand, Value):
                yield operand, operand.scope
        if not node.children or not any(child in self.changed for child in node.children):
            yield from ((o, None) for o in node.inputs)
            return
        yield from ((o, None) for o in self._loop_operands(node))

    def _loop_operands(self, node: Node) -> Iterable[Operand]:
        """Operands of what is emitted again: those whose value inside is live, and a loop's state."""
        child = node.children[0]
        if node.primitive is compat.SHARD_MAP:
            yield from (o for v, o in zip(child.inputs, node.inputs, strict=True) if v in self.values)
            return
        if node.primitive is prims.cond_p:
            yield node.inputs[0]
            for i, operand in enumerate(node.inputs[1:]):
                if any(c.inputs[i] in self.values for c in node.children):
                    yield operand
            return
        lead, tested = 0, set()
        if node.primitive is prims.while_p:
            loop = compat.while_parts(node.eqn)
            lead = loop.cond_nconsts
            yield from node.inputs[:lead]
            tested = {child.inputs[loop.body_nconsts + i] for i in state_read(loop)}
        results = dict(zip(carried_inputs(node), node.outputs, strict=False))
        for value, operand in zip(child.inputs, node.inputs[lead:], strict=True):
            changing = value.outer is None
            if changing or value in self.values or value in tested or results.get(value) in self.values:
                yield operand


def state_read(loop: compat.WhileParts) -> set[int]:
    """Which entries of its state a while's condition reads."""
    jaxpr, _ = compat.close(loop.cond_jaxpr)
    used = {v for eqn in jaxpr.eqns for v in eqn.invars if not isinstance(v, compat.Literal)}
    used.update(v for v in jaxpr.outvars if not isinstance(v, compat.Literal))
    return {i for i, var in enumerate(jaxpr.invars[loop.cond_nconsts :]) if var in used}
