"""Recognises what a program does with the values and indices of a top-k of its hidden units.

The k largest are kept by a threshold at the k-th value, by a mask made from the indices, or by writing the values to
where they came from. Here are the structural matches; ``passes/match/block_region.py`` makes expressions of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from jax.extend.core import primitives as prims

from hire_xform.passes.ir.axis_rules import links_of, moves_only
from hire_xform.passes.ir.graph import Node, Operand, Value
from hire_xform.passes.ir.links import How
from hire_xform.passes.ir.pointwise import known_number
from hire_xform.passes.weights.origins import shape_of

_TOP_K = frozenset({prims.top_k_p, prims.approx_top_k_p})
_WRITES = frozenset({prims.scatter_p, prims.scatter_add_p})
_ONE_HOT_SUMS = frozenset({prims.reduce_sum_p, prims.reduce_max_p, prims.reduce_or_p})


@dataclass(frozen=True, eq=False)
class TopK:
    """A top-k equation: of ``operand``, along ``axis``, values and indices its two results."""

    node: Node
    operand: Value
    axis: int
    k: int


@dataclass(frozen=True, eq=False)
class Placed:
    """Units among the k largest hold ``update`` (None: the number ``number``), all others zero.

    Attributes:
      nodes: the equations between the top-k's results and this value, the top-k itself included.
    """

    top: TopK
    update: Value | None
    number: float
    nodes: list[Node] = field(default_factory=list)


def top_k_of(node: Node) -> TopK | None:
    """The top-k that an equation is; ``approx_max_k`` is taken as exact, which it is wherever it is not on a TPU."""
    if node.primitive not in _TOP_K or not isinstance(node.inputs[0], Value):
        return None
    operand, params = node.inputs[0], node.params
    if node.primitive is prims.top_k_p:
        axis = params.get("axis", len(operand.shape) - 1)
    elif params["is_max_k"] and params["aggregate_to_topk"] and params["reduction_input_size_override"] == -1:
        axis = params["reduction_dimension"]
    else:
        return None
    return TopK(node, operand, axis % len(operand.shape), params["k"])


def sorted_rank(node: Node, position: int) -> int | None:
    """The rank (1 is the largest) of what stands at a position of an ascending sort of one operand."""
    if node.primitive is not prims.sort_p or len(node.inputs) != 1 or node.params["num_keys"] != 1:
        return None
    return shape_of(node.inputs[0])[node.params["dimension"]] - position


def smallest_of(node: Node) -> TopK | None:
    """The top-k whose smallest value ``reduce_min`` takes."""
    values = node.inputs[0] if node.primitive is prims.reduce_min_p else None
    if not isinstance(values, Value) or values.node is None or len(values.shape) - 1 not in node.params["axes"]:
        return None
    top = top_k_of(values.node)
    if top is None or values is not top.node.outputs[0] or tuple(node.params["axes"]) != (top.axis,):
        return None
    return top


def placed(node: Node) -> Placed | None:
    """The placement by indices that an equation is: a scatter to zeros, or the sum of one-hot rows."""
    if node.primitive in _WRITES:
        return _scattered(node)
    if node.primitive in _ONE_HOT_SUMS:
        return _one_hot(node)
    return None


def _scattered(node: Node) -> Placed | None:
    zeros, indices, updates = node.inputs
    numbers = node.params["dimension_numbers"]
    if known_number(zeros) != 0.0 or not isinstance(indices, Value) or numbers.update_window_dims:
        return None
    if node.params.get("update_jaxpr") is not None and node.primitive is prims.scatter_p:
        return None
    shape = node.outputs[0].shape
    last = len(shape) - 1
    batching = tuple(int(d) for d in numbers.operand_batching_dims)
    written = tuple(int(d) for d in numbers.scatter_dims_to_operand_dims)
    if sorted((*batching, *written)) != list(range(len(shape))) or last not in written:
        return None
    if tuple(int(d) for d in numbers.inserted_window_dims) != tuple(sorted(written)):
        return None
    if batching != tuple(int(d) for d in numbers.scatter_indices_batching_dims):
        return None
    nodes = [node]
    pieces = _components(indices, len(written), nodes)
    if pieces is None:
        return None
    found: TopK | None = None
    for dim, piece in zip(written, pieces, strict=True):
        if dim == last:
            found = _from_indices(piece, nodes)
        elif _counts_along(piece) != dim and not (shape[dim] == 1 and known_number(piece) == 0.0):
            return None
    if found is None or found.axis != last or found.operand.shape != shape:
        return None
    if shape_of(updates) != (*shape[:-1], found.k):
        return None
    number = known_number(updates)
    if number is not None:
        return Placed(found, None, number, nodes)
    return Placed(found, updates, 0.0, nodes) if isinstance(updates, Value) else None


def _one_hot(node: Node) -> Placed | None:
    rows, axes = node.inputs[0], tuple(node.params["axes"])
    if not isinstance(rows, Value) or axes != (len(rows.shape) - 2,):
        return None
    nodes = [node]
    while rows.node is not None and rows.node.primitive is prims.convert_element_type_p:
        nodes.append(rows.node)
        if not isinstance(rows.node.inputs[0], Value):
            return None
        rows = rows.node.inputs[0]
    if rows.node is None or rows.node.primitive is not prims.eq_p:
        return None
    nodes.append(rows.node)
    last = len(rows.shape) - 1
    for index, count in (rows.node.inputs, reversed(rows.node.inputs)):
        if _counts_along(count) == last and shape_of(count)[last] == rows.shape[last]:
            found = _from_indices(index, nodes)
            if found is not None and found.axis == last - 1 and found.operand.shape == node.outputs[0].shape:
                return Placed(found, None, 1.0, nodes)
    return None


def _components(indices: Value, count: int, nodes: list[Node]) -> list[Operand] | None:
    """The scatter indices' columns, each with a last axis of length one."""
    if indices.node is not None and indices.node.primitive is prims.concatenate_p:
        joined = indices.node
        if joined.params["dimension"] != len(indices.shape) - 1 or len(joined.inputs) != count:
            return None
        nodes.append(joined)
        return list(joined.inputs)
    return [indices] if count == 1 else None


def _from_indices(piece: Operand, nodes: list[Node]) -> TopK | None:
    """The top-k whose indices these are, an axis of length one (or stretched) behind them."""
    passed: list[Node] = []
    while isinstance(piece, Value) and piece.node is not None:
        node = piece.node
        top = top_k_of(node)
        if top is not None:
            if piece is not node.outputs[1]:
                return None
            nodes += [*passed, node]
            return top
        passed.append(node)
        operand = node.inputs[0] if node.inputs else None
        if moves_only(node):
            if not _stays(node):
                return None
        elif (wrapped := _wrapped(node)) is not None:
            operand, more = wrapped
            passed += more
        elif node.primitive is not prims.convert_element_type_p:
            return None
        if operand is None:
            return None
        piece = operand
    return None


def _stays(node: Node) -> bool:
    """True for an equation that leaves all axes where they are, and adds at most one behind them."""
    rank, links = len(shape_of(node.inputs[0])), links_of(node) or ()
    places = [(link.before, link.after) for link in links if link.how is not How.CUT]
    return places == [((d,), (d,)) for d in range(rank)] and len(node.outputs[0].shape) <= rank + 1


def _wrapped(node: Node) -> tuple[Operand, list[Node]] | None:
    """``i`` of ``where(i < 0, i + n, i)``: how NumPy's negative indices are understood, and nothing to an index."""
    if node.primitive is not prims.select_n_p or len(node.inputs) != 3:
        return None
    test, index, wrapped = node.inputs
    for found in (test, wrapped):
        if not isinstance(found, Value) or found.node is None or found.node.inputs[0] is not index:
            return None
    assert isinstance(test, Value)
    assert isinstance(wrapped, Value)
    assert test.node is not None
    assert wrapped.node is not None
    if test.node.primitive is not prims.lt_p or known_number(test.node.inputs[1]) != 0.0:
        return None
    return (index, [test.node, wrapped.node]) if wrapped.node.primitive is prims.add_p else None


def _counts_along(operand: Operand) -> int | None:
    """The axis along which a value counts 0, 1, 2, ..., being the same along all others; None when it does not."""
    if not isinstance(operand, Value) or operand.node is None:
        return None
    node = operand.node
    if node.primitive is prims.iota_p:
        return int(node.params["dimension"])
    if node.primitive is prims.convert_element_type_p:
        return _counts_along(node.inputs[0])
    wrapped = _wrapped(node)
    if wrapped is not None:
        return _counts_along(wrapped[0])
    axis = _counts_along(node.inputs[0]) if moves_only(node) else None
    for link in links_of(node) or ():
        if axis in link.before and link.how is How.SAME and node.outputs[link.result] is operand:
            found = [d for d in link.after if operand.shape[d] != 1 or len(link.after) == 1]
            return found[0] if [operand.shape[d] for d in found] == [shape_of(node.inputs[0])[axis]] else None
    return None
