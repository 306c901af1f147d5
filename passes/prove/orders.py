"""Numbers of entries in the order that a sort or a top-k puts them in, and what is picked or set at them."""

from __future__ import annotations

import numpy as np
from jax.extend.core import primitives as prims

from hire_xform.passes.ir.axis_rules import moves_only
from hire_xform.passes.ir.graph import Node, Operand, Value
from hire_xform.passes.ir.pointwise import known_number
from hire_xform.passes.weights.origins import shape_of

LOCATE = frozenset({prims.argmax_p, prims.argmin_p})
ORDERS = frozenset({prims.top_k_p, prims.approx_top_k_p, prims.sort_p})
# What leaves the numbers of entries in their order.
_PASSED = frozenset({prims.convert_element_type_p, prims.copy_p, prims.stop_gradient_p, prims.rev_p, prims.slice_p})


def order_of(operand: Operand) -> Node | None:
    """The sort or top-k of which an operand holds the numbers of entries, in their order or a part of it."""
    while isinstance(operand, Value) and operand.node is not None:
        node = operand.node
        if node.primitive in ORDERS:
            last = len(shape_of(node.inputs[0])) - 1
            held = operand is node.outputs[-1] and len(node.outputs) == 2
            if node.primitive is prims.sort_p:
                held = held and node.params["num_keys"] == 1 and node.params["dimension"] == last
                held = held and is_numbers(node.inputs[1], last)
            else:
                held = held and node.params.get("axis", last) % (last + 1) == last
            return node if held else None
        plain = without_wrapping(operand)
        if plain is not None:
            operand = plain
        elif node.primitive in _PASSED or adds_an_axis(node):
            operand = node.inputs[0]
        else:
            return None
    return None


def is_located(operand: Operand) -> bool:
    """Whether an operand holds places of largest or smallest entries, which intervals decide or say nothing of."""
    while isinstance(operand, Value) and operand.node is not None:
        node, plain = operand.node, without_wrapping(operand)
        if node.primitive in LOCATE:
            return True
        if plain is None and not (node.primitive in _PASSED or moves_only(node)):
            return False
        operand = node.inputs[0] if plain is None else plain
    return False


def set_in_order(node: Node) -> Operand | None:
    """The order at whose places one entry of each row after the other is set; None where it is something else."""
    into, index, update = node.inputs
    numbers, rank = node.params["dimension_numbers"], len(shape_of(into))
    single = not numbers.update_window_dims and node.params.get("update_jaxpr") is None
    if not single or shape_of(update) != shape_of(index)[:-1]:
        return None
    places: Operand | None = None
    rows = tuple(range(rank - 1))
    if numbers.scatter_dims_to_operand_dims == (rank - 1,) and numbers.operand_batching_dims == rows:
        places = index if numbers.scatter_indices_batching_dims == rows else None
    elif numbers.scatter_dims_to_operand_dims == (0, 1) and rank == 2 and not numbers.operand_batching_dims:
        places = _beside_row_numbers(index, shape_of(into)[0])
    order = None if places is None else order_of(places)
    whole = order is not None and shape_of(order.inputs[0]) == shape_of(into)
    return places if whole and len(shape_of(index)) == rank + 1 and _from_first(places) else None


def _from_first(operand: Operand | None) -> bool:
    """Whether the numbers of entries are all that an order has, in its direction or the other."""
    order = order_of(operand) if operand is not None else None
    if order is None or operand is None:
        return False
    held = order.outputs[-1].shape
    return shape_of(operand) in (held, (*held, 1)) and (
        held == shape_of(order.inputs[0]) or not _is_turned(operand, order)
    )


def _is_turned(operand: Operand, order: Node) -> bool:
    while isinstance(operand, Value) and operand.node is not None and operand.node is not order:
        if operand.node.primitive in (prims.rev_p, prims.slice_p):
            return True
        operand = operand.node.inputs[0 if operand.node.primitive is not prims.select_n_p else 1]
    return False


def adds_an_axis(node: Node) -> bool:
    """Whether an equation adds one axis of length one, the last."""
    before = shape_of(node.inputs[0]) if node.inputs else ()
    if node.primitive is prims.broadcast_in_dim_p and node.params["broadcast_dimensions"] != tuple(range(len(before))):
        return False
    return node.primitive in (prims.reshape_p, prims.broadcast_in_dim_p) and node.outputs[0].shape == (*before, 1)


def is_full(operand: Operand) -> bool:
    """Whether an operand has the numbers of all entries of what is put in order."""
    order = order_of(operand)
    return order is not None and shape_of(operand)[-1] == shape_of(order.inputs[0])[-1]


def without_wrapping(value: Operand) -> Value | None:
    """The numbers of entries that negative ones were to be told from: ``where(i < 0, i + n, i)``."""
    node = value.node if isinstance(value, Value) else None
    if node is None or node.primitive is not prims.select_n_p or len(node.inputs) != 3:
        return None
    which, plain, wrapped = node.inputs
    if not isinstance(which, Value) or not isinstance(wrapped, Value) or which.node is None or wrapped.node is None:
        return None
    below = which.node.primitive is prims.lt_p and which.node.inputs[0] is plain
    adds = wrapped.node.primitive is prims.add_p and plain in wrapped.node.inputs
    if not (below and adds and known_number(which.node.inputs[1]) == 0.0 and isinstance(plain, Value)):
        return None
    return plain if _counts(plain) else None


def _counts(operand: Operand) -> bool:
    """Whether whole numbers are those of entries, or an iota, so that none is negative."""
    while isinstance(operand, Value) and operand.node is not None:
        node = operand.node
        if node.primitive is prims.iota_p:
            return True
        if node.primitive in LOCATE or (node.primitive in ORDERS and order_of(operand) is not None):
            return True
        if node.primitive not in _PASSED and not moves_only(node):
            return False
        operand = node.inputs[0]
    const = _constant(operand)
    return const is not None and bool(np.all(const >= 0))


def _constant(operand: Operand) -> np.ndarray | None:
    """An array that the program closes over, also where it is handed into a loop."""
    while isinstance(operand, Value) and operand.const is None and operand.outer is not None and not operand.scanned:
        operand = operand.outer
    return np.asarray(operand.const) if isinstance(operand, Value) and operand.const is not None else None


def is_numbers(operand: Operand, axis: int) -> bool:
    """Whether an operand counts from zero along an axis."""
    while isinstance(operand, Value) and operand.node is not None:
        node = operand.node
        if node.primitive is prims.iota_p:
            return bool(node.params["dimension"] == axis) and operand.aval.dtype.kind in "iu"
        plain = without_wrapping(operand)
        if plain is not None:
            operand = plain
        elif node.primitive is prims.broadcast_in_dim_p:
            axes = node.params["broadcast_dimensions"]
            before = shape_of(node.inputs[0])
            if axis not in axes or before[axes.index(axis)] != node.outputs[0].shape[axis]:
                return False
            operand, axis = node.inputs[0], axes.index(axis)
        elif node.primitive is prims.convert_element_type_p:
            operand = node.inputs[0]
        else:
            return False
    const = _constant(operand)
    if const is None or const.dtype.kind not in "iu":
        return False
    return bool(np.all(np.moveaxis(const, axis, -1) == np.arange(const.shape[axis])))


def places_of(node: Node) -> Operand | None:
    """The places that single entries of each row are picked at, along the last axis; None where it is something else.

    Their shape is that of the result, or has an axis of one more.
    """
    operand, index = node.inputs[:2]
    last = len(shape_of(operand)) - 1
    if node.primitive is prims.dynamic_slice_p:
        one_row = shape_of(operand)[:-1] == (1,) * last and tuple(node.params["slice_sizes"]) == (1,) * (last + 1)
        return node.inputs[1 + last] if one_row else None
    numbers = node.params["dimension_numbers"]
    if tuple(node.params["slice_sizes"]) != (1,) * (last + 1):
        return None
    batched = tuple(numbers.operand_batching_dims)
    # Rows of which there is one need no number.
    each = all(d in batched for d in range(last) if shape_of(operand)[d] > 1) and last not in batched
    if tuple(numbers.start_index_map) == (last,) and each and batched == tuple(sorted(batched)):
        first = tuple(numbers.start_indices_batching_dims) == tuple(range(len(batched)))
        return index if first and shape_of(index)[-1:] == (1,) else None
    if numbers.start_index_map == (0, 1) and last == 1 and not numbers.operand_batching_dims:
        return _beside_row_numbers(index, shape_of(operand)[0])
    return None


def _beside_row_numbers(index: Operand, rows: int) -> Operand | None:
    """The second of two columns of indices, where the first has the number of each row."""
    node = index.node if isinstance(index, Value) else None
    if node is None or node.primitive is not prims.concatenate_p or len(node.inputs) != 2:
        return None
    first, second = node.inputs
    joined = node.params["dimension"] == len(shape_of(index)) - 1 and shape_of(first)[-1] == 1
    if not joined or shape_of(index)[0] != rows or not is_numbers(first, 0):
        return None
    return second
