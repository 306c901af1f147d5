"""The equations of a block between its products, where they can be run again as they are."""

from __future__ import annotations

from hire_xform.passes.ir.graph import Node, Operand, Value
from hire_xform.passes.match.ends import MAX_EQUATIONS
from hire_xform.passes.match.matches import FfnMatch


def equations_between(match: FfnMatch) -> list[Node] | None:
    """The equations that make a block's activation of its products and side inputs, in order.

    None where they can't be run on what the rewritten block is given: something else goes into them, or only a part of
    a side input is known.
    """
    region = match.region
    if not all(d.full for side in region.sides for d in side.layout):
        return None
    known = {up.product.out for up in region.ups} | {side.value for side in region.sides}
    found: list[Node] = []

    def reach(operand: Operand) -> bool:
        if not isinstance(operand, Value) or operand.const is not None or operand in known:
            return True
        node = operand.node
        if node is None or node.children or node.eqn.effects or len(found) > MAX_EQUATIONS:
            return False
        if not all(reach(o) for o in node.inputs):
            return False
        found.append(node)
        known.update(node.outputs)
        return True

    return found if reach(match.hidden) else None
