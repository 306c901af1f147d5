"""Lookups: equations that take whole rows of a ``[V, d]`` weight by id, as an embedding does."""

from __future__ import annotations

from dataclasses import dataclass

from jax.extend.core import primitives as prims

from hire_xform.passes.ir.graph import Graph, Node
from hire_xform.passes.weights.origins import Origin, shape_of
from hire_xform.passes.weights.provenance import Provenance


@dataclass(frozen=True, eq=False, repr=False)
class Lookup:
    """An equation that takes whole rows of a ``[V, d]`` weight by id.

    Attributes:
      node: the equation.
      origin: of the weight.
    """

    node: Node
    origin: Origin


def find_lookups(graph: Graph, provenance: Provenance) -> list[Lookup]:
    """The lookups of a graph, of weights that are no part of a stack."""
    found = []
    for node in graph.program_order():
        if node.primitive in _TAKE and _takes_rows(node):
            origin = provenance.origin(node.inputs[0])
            if origin is not None and not origin.refs:
                found.append(Lookup(node, origin))
    return found


_TAKE = (prims.gather_p, prims.dynamic_slice_p)


def _takes_rows(node: Node) -> bool:
    shape, sizes = shape_of(node.inputs[0]), tuple(node.params["slice_sizes"])
    if len(shape) != 2 or sizes != (1, shape[1]):
        return False
    if node.primitive is prims.dynamic_slice_p:
        return True
    numbers = node.params["dimension_numbers"]
    return tuple(numbers.start_index_map) == (0,) and not numbers.operand_batching_dims
