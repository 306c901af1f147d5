"""Where the way back from what a product contracts ends when no product leads to it, and how that is told."""

from __future__ import annotations

from collections.abc import Sequence

from jax.extend.core import primitives as prims

from hire_xform.passes.ir.axis_rules import is_pointwise, moves_only
from hire_xform.passes.ir.graph import Node, Value
from hire_xform.passes.match.region import Unfollowed
from hire_xform.passes.weights.products import Product

# A block's region has some ten to thirty equations; past this many the walk has wandered into something else.
MAX_EQUATIONS = 96
# What a model's own choice of units is made of.
MIXING = frozenset({prims.top_k_p, prims.approx_top_k_p, prims.sort_p, prims.reduce_sum_p})
_PLACING = frozenset({prims.scatter_p, prims.scatter_add_p, prims.reduce_max_p, prims.reduce_or_p, *MIXING})


def ends_before_products(down: Product, products: dict[Node, Product]) -> Unfollowed | None:
    """Where the way back from ``down`` ends when no weight product leads to it; None when one may.

    A quick look before ``trace_region``, which says the same of most products of a model, attention's, at more cost.
    """
    seen: set[Value] = {down.x}
    queue = [down.x]
    ends: list[Value] = []
    while queue and len(seen) <= MAX_EQUATIONS:
        value = queue.pop()
        node = value.node
        if node is None or outlives(value, down):
            ends.append(value)
        elif node in products:
            return None
        elif moves_only(node) or is_pointwise(node) or node.primitive in _PLACING:
            for operand in node.inputs:
                if isinstance(operand, Value) and operand not in seen:
                    seen.add(operand)
                    queue.append(operand)
        else:
            ends.append(value)
    return None if queue else end_of(ends, down, products)


def end_of(values: Sequence[Value], down: Product, products: dict[Node, Product]) -> Unfollowed:
    """What to tell of the values at which the way back from ``down`` ends, none of them being its hidden units."""
    for value in values:
        if value.node in products:
            return Unfollowed("the units that it contracts are not those of the product that makes them", value.node)
    made = [value for value in values if value.node is not None]
    for value in made:
        if not outlives(value, down):
            return Unfollowed("what it contracts is made by what is not followed back to a product", value.node)
    if made:
        return Unfollowed("what it contracts is read after it, too, as a residual stream is", made[0].node)
    return Unfollowed("what it contracts is made of what enters the program, or the body that it stands in")


def outlives(value: Value, down: Product) -> bool:
    """True for a value read after the block, as the residual stream is: no region holds it."""
    if value is down.x:
        return False
    order = down.node.order
    return value.is_output or bool([node for node in value.consumers if node.order > order])
