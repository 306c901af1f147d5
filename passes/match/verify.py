"""States what a ``Detection`` is: checked where ``HIRE_DEBUG`` is on."""

from __future__ import annotations

from collections import Counter

from hire_xform.passes.ir.graph import Graph
from hire_xform.passes.ir.verify import require, verify_graph
from hire_xform.passes.match.matches import Detection, FfnMatch
from hire_xform.passes.match.region import Apply, Expr, Grouped, Kept, Kth, Place, Region, Total


def verify_detection(graph: Graph, detection: Detection) -> None:
    """Checks a graph after detection, and what was found in it.

    Raises:
      InvariantError: something does not hold; the message has the path and the rule.
    """
    verify_graph(graph)
    nodes = graph.program_order()
    same = detection.order == {node: i for i, node in enumerate(nodes)}
    require(same, "", "a detection's order is the program's")
    claimed = Counter(product for match in detection.matches for product in match.products)
    for product, count in claimed.items():
        require(count == 1, product.path, "a weight product is in one match at most")
    refused = Counter(rejection.node for rejection in detection.rejections)
    for node, count in refused.items():
        require(count == 1, node.path, "an equation is refused once")
    for product in detection.products:
        times = claimed[product] + refused[product.node]
        require(times == 1, product.path, "every weight product is in one match or one rejection, and not in both")
    require(set(claimed) <= set(detection.products), "", "a match is made of weight products that were found")
    for rejection in detection.rejections:
        require(bool(rejection.reason), rejection.node.path, "a rejection has a reason")
    for what in (detection.matches, detection.rejections):
        places = [detection.order[item.node] for item in what]
        require(places == sorted(places), "", "matches, and rejections, are in program order")
    for match in detection.matches:
        if isinstance(match, FfnMatch):
            _verify_region(match.region, match)


def _verify_region(region: Region, match: FfnMatch) -> None:
    path = match.node.path
    require(region.units == match.units == match.down.contracted, path, "a block's units are those it contracts")
    require(bool(region.ups), path, "a block has a product into its units")
    require(len(region.varies) == len(region.exprs), path, "of each expression it is known whether it differs by unit")
    require(0 <= region.root < len(region.exprs), path, "a region's root is one of its expressions")
    for number, expr in enumerate(region.exprs):
        before = all(0 <= o < number for o in _operands(expr))
        require(before, path, "an expression's operands come before it")
        if isinstance(expr, Apply):
            require(expr.node in region.nodes, path, "the equations of a region are those its expressions apply")
    require(match.node not in region.nodes, path, "a block's last product is not in its region")
    for node in region.nodes:
        require(node.scope is match.node.scope, node.path, "a block stands in one scope")


def _operands(expr: Expr) -> tuple[int, ...]:
    if isinstance(expr, Apply):
        return expr.operands
    if isinstance(expr, Place):
        return (expr.kept,) if expr.update is None else (expr.kept, expr.update)
    return (expr.operand,) if isinstance(expr, (Grouped, Kth, Kept, Total)) else ()
