"""Which calls can't stay calls: an action's equations stand on both sides of their boundary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hire_xform.passes.ir.graph import Frame, Node
from hire_xform.passes.rewrite.action import Action
from hire_xform.passes.weights.origins import IndexSlice


def inlined_frames(actions: Iterable[Action]) -> frozenset[Frame]:
    """The calls whose bodies are evaluated where they are called."""
    found: set[Frame] = set()
    for action in actions:
        if action.reached_by:
            found |= _widened(action.node.frame, action.reached_by)
        for need in action.needs:
            for ref in need.refs:
                if isinstance(ref, IndexSlice):
                    user = action.node
                    while user.scope is not ref.node.scope and user.scope.node is not None:
                        user = user.scope.node
                    found |= _joined([ref.node], user.frame)
        found |= _joined(action.nodes, action.node.frame)
    return frozenset(found)


def _widened(frame: Frame, nodes: Sequence[Node]) -> set[Frame]:
    """The calls around a site that what its readers take besides does not come into."""
    found: set[Frame] = set()
    for call in frame.ancestors():
        if all(node.scope is not frame.scope or call in node.frame.ancestors() for node in nodes):
            break
        found.add(call)
    return found


def _joined(nodes: Sequence[Node], frame: Frame) -> set[Frame]:
    """The calls to open so that all nodes stand in one frame with ``frame`` or around it."""
    around = frame.ancestors()
    shared = next(f for f in around if all(f in n.frame.ancestors() for n in nodes))
    found: set[Frame] = set()
    for node in nodes:
        inside = node.frame.ancestors()
        found.update(inside[: inside.index(shared)])
    return found.union(around[: around.index(shared)]) if len(nodes) > 1 else found
