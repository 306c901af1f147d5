"""Filters whose edge is an entry of its own: an entry compared with the i-th largest of all entries.

On intervals the i-th largest itself could be below the i-th largest: both lie in one interval. But no entry is below it
that fewer than i others can be above, which intervals of all entries tell. That takes for granted that the entries that
are compared have the bits of those that are sorted. XLA may compute one value in several places, and where a product
and a sum follow each other it may round once or twice in each; so it is taken for granted only where entries are made
of a product's result by what is rounded in one way: moves, widening, and products, quotients and choices in f32.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax.extend.core import primitives as prims

from hire_xform.passes.ir.axis_rules import moves_only
from hire_xform.passes.ir.graph import Node, Operand, Value, dtype_of
from hire_xform.passes.match.top_k import top_k_of
from hire_xform.passes.prove.interval_rules import FLOATS
from hire_xform.passes.prove.orders import ORDERS, places_of
from hire_xform.passes.weights.origins import shape_of

_ONE_WAY = frozenset(
    {prims.mul_p, prims.div_p, prims.neg_p, prims.max_p, prims.min_p, prims.select_n_p, prims.copy_p, prims.name_p}
)
_MOST_STEPS, _MOST_VALUES = 32, 256


@dataclass(frozen=True, eq=False)
class Edge:
    """What an entry is compared with, as a place among all entries in descending order.

    Attributes:
      entries: which operand has the entries; the other one is the edge.
      at: the place, from 0, of an edge that is the same for all tokens.
      places: else the numbers, one for each token, that the place is made of: ``at + step * places``.
      step: 1 or -1; 0 without numbers.
    """

    entries: int
    at: int
    places: Operand | None
    step: int


def edge_of(node: Node, product_out: Value) -> Edge | None:
    """The edge of ``entry < edge`` or ``entry >= edge``, either way round; None for any other comparison."""
    if node.primitive in (prims.lt_p, prims.ge_p):
        entries = 0
    elif node.primitive in (prims.gt_p, prims.le_p):
        entries = 1
    else:
        return None
    x, edge = node.inputs[entries], node.inputs[1 - entries]
    if not isinstance(x, Value) or not has_one_value(x, product_out):
        return None
    for _ in range(_MOST_STEPS):
        maker = edge.node if isinstance(edge, Value) else None
        if maker is None:
            return None
        if maker.primitive is prims.slice_p and shape_of(edge)[-1:] == (1,) and _keeps_rows(maker):
            return _in_sorted(maker.inputs[0], x, entries, int(maker.params["start_indices"][-1]), None)
        if maker.primitive is prims.reduce_min_p and maker.params["axes"] == (len(x.shape) - 1,):
            last = shape_of(maker.inputs[0])[-1] - 1
            top = maker.inputs[0].node if isinstance(maker.inputs[0], Value) else None
            found = top is not None and top_k_of(top) is not None
            return _in_sorted(maker.inputs[0], x, entries, last, None) if found else None
        if maker.primitive is prims.gather_p:
            places = places_of(maker)
            one = maker.outputs[0].shape in (x.shape[:-1], (*x.shape[:-1], 1))
            return _in_sorted(maker.inputs[0], x, entries, 0, places) if places is not None and one else None
        if not moves_only(maker) or maker.primitive is prims.rev_p:
            return None
        edge = maker.inputs[0]
    return None


def _keeps_rows(node: Node) -> bool:
    return shape_of(node.inputs[0])[:-1] == node.outputs[0].shape[:-1]


def _in_sorted(operand: Operand, x: Value, entries: int, at: int, places: Operand | None) -> Edge | None:
    """An edge at a place of what is sorted, if that is what is compared with it."""
    step, last = int(places is not None), len(x.shape) - 1
    for _ in range(_MOST_STEPS):
        node = operand.node if isinstance(operand, Value) else None
        if node is None:
            return None
        if node.primitive is prims.rev_p and tuple(node.params["dimensions"]) == (last,):
            at, step = shape_of(operand)[-1] - 1 - at, -step
            operand = node.inputs[0]
            continue
        if operand is not node.outputs[0] or node.inputs[0] is not x:
            return None
        top = top_k_of(node)
        if top is not None:
            return Edge(entries, at, places, step) if top.axis == last else None
        if node.primitive is prims.sort_p and node.params["dimension"] == last and node.params["num_keys"] == 1:
            # In ascending order.
            return Edge(entries, x.shape[-1] - 1 - at, places, -step)
        return None
    return None


def has_one_value(value: Value, product_out: Value) -> bool:
    """Whether a value has the same bits wherever it is computed, of the product's result and what is there already."""
    queue, seen = [value], {value}
    while queue:
        here = queue.pop()
        node = here.node
        # What is sorted is computed once, and is in memory.
        if here is product_out or node is None or node.primitive in ORDERS:
            continue
        if len(seen) > _MOST_VALUES:
            return False
        if jnp.issubdtype(here.aval.dtype, jnp.floating):
            widens = node.primitive is prims.convert_element_type_p and dtype_of(node.inputs[0]).name in FLOATS
            in_one_way = (widens or node.primitive in _ONE_WAY) and here.aval.dtype == "float32"
            if not (in_one_way or moves_only(node)):
                return False
        operands = [o for o in node.inputs if isinstance(o, Value) and o not in seen]
        seen.update(operands)
        queue += operands
    return True
