"""Tiny programs laid out as graphs, for unit tests of single passes."""

from dataclasses import dataclass
from functools import cached_property

import jax

from hire_xform.passes.ir import compat
from hire_xform.passes.ir.graph import Graph, Node, Value, walk
from hire_xform.passes.weights.origins import Origin
from hire_xform.passes.weights.products import Loose, Product, find_products
from hire_xform.passes.weights.provenance import Provenance
from hire_xform.passes.weights.recipe import Root


@dataclass(frozen=True)
class LaidOut:
    """A graph, and where the weights in it come from."""

    graph: Graph
    provenance: Provenance

    @cached_property
    def found(self) -> tuple[list[Product], list[Loose]]:
        return find_products(self.graph, self.provenance)

    @property
    def product(self) -> Product:
        """The one product there is."""
        (product,) = self.found[0]
        return product

    def nodes(self, *primitives) -> list[Node]:
        """Equations of some primitives, in program order."""
        return [node for node in self.graph.program_order() if node.primitive in primitives]

    def node(self, *primitives) -> Node:
        """The one equation of some primitives."""
        (node,) = self.nodes(*primitives)
        return node

    @property
    def output(self):
        """The first value that the program returns."""
        return self.graph.top.outputs[0]

    def value(self, operand, args):
        """What an operand is where the program is called with these arrays."""
        if not isinstance(operand, Value):
            return operand.val
        if operand.const is not None:
            return operand.const
        if operand.node is None:
            return dict(zip(self.graph.top.inputs, args, strict=True))[operand]
        made = compat.bind(operand.node.eqn, [self.value(o, args) for o in operand.node.inputs])
        return made[operand.node.outputs.index(operand)]

    @property
    def origin(self) -> Origin | None:
        """Where the value that the program returns first comes from, if it is a weight."""
        return self.provenance.origin(self.output)


def laid_out(fun, weights, *args) -> LaidOut:
    """``fun(weights, *args)`` as a graph, in which the leaves of ``weights`` are weights."""
    graph = walk(jax.make_jaxpr(fun)(weights, *args))
    leaves = len(jax.tree.leaves(weights))
    roots = [Root.of(0, i) if i < leaves else None for i in range(len(graph.top.inputs))]
    return LaidOut(graph, Provenance(graph, roots))
