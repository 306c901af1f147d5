"""Follows a product's output axis forwards: what becomes of it decides whether it is a vocabulary, or why not."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from jax.extend.core import primitives as prims

from hire_xform.passes.ir import compat
from hire_xform.passes.ir.axes import reshaped
from hire_xform.passes.ir.graph import Node, Value, carried_inputs
from hire_xform.passes.ir.pointwise import is_pointwise
from hire_xform.passes.weights.origins import shape_of
from hire_xform.passes.weights.products import Product

# A vocabulary's logits may go through a long chain of sampling; of any other product only the first few are told.
MAX_STEPS, MAX_STEPS_NARROW = 256, 32

_REDUCTIONS = dict.fromkeys(
    (
        prims.reduce_sum_p,
        prims.reduce_max_p,
        prims.reduce_min_p,
        prims.reduce_prod_p,
        prims.reduce_and_p,
        prims.reduce_or_p,
        prims.argmax_p,
        prims.argmin_p,
    ),
    "axes",
)
_CUMULATIVE = {prims.cumsum_p, prims.cummax_p, prims.cummin_p, prims.cumprod_p, prims.cumlogsumexp_p}
# Their first operand comes out again, changed in places; what is written is among the others.
_STORES = {
    prims.dynamic_update_slice_p,
    prims.scatter_p,
    prims.scatter_add_p,
    prims.scatter_mul_p,
    prims.scatter_min_p,
    prims.scatter_max_p,
}


@dataclass
class Fate:
    """What becomes of an axis, as events in breadth-first order.

    Attributes:
      narrow: True when it is too narrow for a vocabulary, so that only a reason is looked for.
      events: (kind, equation or None). Kinds: "returned", "reduced", "gathered", "stored", "looped" keep a vocabulary
        one, "moved" (entries change places) does too; "contracted", "multiplied", "mixed", "opaque" do not.
      intact: False when the axis was split or merged with another on the way.
      drawn: values in which entries of the axis are ordered, accumulated or picked, as sampling does. What mixes them
        further is still sampling; only another product that contracts them is not.
      joins: pointwise equations on the way, with the places among their operands at which it arrives.
      axes: the values that hold it, and where.
    """

    narrow: bool

    events: list[tuple[str, Node | None]] = field(default_factory=list)
    intact: bool = True
    drawn: set[Value] = field(default_factory=set)
    joins: dict[Node, set[int]] = field(default_factory=dict)
    axes: dict[Value, frozenset[int]] = field(default_factory=dict)

    def first(self, *kinds: str) -> tuple[str, Node | None] | None:
        """The first event of one of these kinds."""
        return next((e for e in self.events if e[0] in kinds), None)


def follow(product: Product, narrow: bool) -> Fate:
    """Follows the output axis of a product through the program, up to ``MAX_STEPS`` equations, fewer if ``narrow``."""
    limit = MAX_STEPS_NARROW if narrow else MAX_STEPS
    fate = Fate(narrow)
    start = frozenset(product.out_w_dims)
    queue: deque[tuple[Value, frozenset[int]]] = deque([(product.out, start)])
    fate.axes[product.out] = start
    steps = 0
    while queue:
        value, dims = queue.popleft()
        for result, result_dims in _outwards(value, dims, fate):
            if result not in fate.axes:
                fate.axes[result] = result_dims
                queue.append((result, result_dims))
                if value in fate.drawn:
                    fate.drawn.add(result)
        for node in value.consumers:
            steps += 1
            if steps > limit:
                fate.events.append(("opaque", node))
                return fate
            for result, result_dims in _step(node, value, dims, fate):
                if result_dims and result not in fate.axes:
                    fate.axes[result] = result_dims
                    queue.append((result, result_dims))
                    if value in fate.drawn:
                        fate.drawn.add(result)
    return fate


def _step(node: Node, value: Value, dims: frozenset[int], fate: Fate) -> list[tuple[Value, frozenset[int]]]:
    """Results that still hold the axis, and where; anything else becomes an event."""
    p = node.primitive
    if is_pointwise(node):
        if p is compat.OPTIMIZATION_BARRIER:
            return [(r, dims) for r, o in zip(node.outputs, node.inputs, strict=True) if o is value]
        fate.joins.setdefault(node, set()).update(i for i, o in enumerate(node.inputs) if o is value)
        if any(node.outputs[0].shape[d] != value.shape[d] for d in dims):
            # One entry drawn from the axis, as a cutoff, meets all others.
            fate.events.append(("reduced" if value in fate.drawn else "opaque", node))
            return []
        return [(node.outputs[0], dims)]
    if p in _REDUCTIONS:
        axes = set(node.params["axes"])
        if axes & dims:
            _in_parts(value, dims, axes, fate)
            fate.events.append(("reduced", node))
            return []
        return [(node.outputs[0], _without(dims, axes))]
    if p is prims.all_gather_p:
        return _gathered(node, dims, fate)
    if p is prims.dot_general_p:
        return _through_product(node, value, dims, fate)
    moved = _moved(node, value, dims, fate)
    if moved is not None:
        return moved
    if p is prims.sort_p:
        _in_parts(value, dims, {node.params["dimension"]}, fate)
        return _drawn(node, [(r, dims) for r, o in zip(node.outputs, node.inputs, strict=True) if o is value], fate)
    if p in (prims.top_k_p, prims.approx_top_k_p):
        return _drawn(node, [(node.outputs[0], dims)], fate)
    if p in _CUMULATIVE:
        if node.params["axis"] not in dims:
            return [(node.outputs[0], dims)]
        if fate.first("reduced") is not None:
            # Of probabilities or of sorted scores: a softmax or a sort has come before.
            return _drawn(node, [(node.outputs[0], dims)], fate)
        fate.events.append(("mixed", node))
        return [(node.outputs[0], dims)]
    if p in (prims.gather_p, prims.dynamic_slice_p):
        return _picked(node, value, dims, fate)
    if p in _STORES:
        return _stored(node, value, dims, fate)
    if node.children:
        return _into_scopes(node, value, dims, fate)
    fate.events.append(("reduced" if value in fate.drawn else "opaque", node))
    return []


def _gathered(node: Node, dims: frozenset[int], fate: Fate) -> list[tuple[Value, frozenset[int]]]:
    """All devices' parts: one after another along an axis, or stacked along a new one."""
    at, tiled = node.params["all_gather_dimension"], node.params["tiled"]
    if tiled:
        if at in dims:
            fate.events.append(("moved", node))
        return [(node.outputs[0], dims)]
    return [(node.outputs[0], frozenset(d + (d >= at) for d in dims))]


def _drawn(node: Node, results: list[tuple[Value, frozenset[int]]], fate: Fate) -> list[tuple[Value, frozenset[int]]]:
    fate.events.append(("reduced", node))
    fate.drawn.update(result for result, _ in results)
    return results


def _picked(node: Node, value: Value, dims: frozenset[int], fate: Fate) -> list[tuple[Value, frozenset[int]]]:
    """Some tokens of many, with the axis whole, is still the axis; else some entries of the axis are read from it."""
    sizes = node.params["slice_sizes"]
    if node.inputs[0] is not value:
        fate.events.append(("gathered", node))
        return []
    result = node.outputs[0]
    if node.primitive is prims.dynamic_slice_p:
        found = dims
    else:
        numbers = node.params["dimension_numbers"]
        dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
        kept = [d for d in range(len(value.shape)) if d not in dropped]
        found = frozenset(numbers.offset_dims[i] for i, d in enumerate(kept) if d in dims)
        if dims & set(numbers.collapsed_slice_dims):
            # One entry for each index: the axis is now where the indices are.
            found |= frozenset(range(len(result.shape))) - frozenset(numbers.offset_dims)
    if any(sizes[d] != value.shape[d] for d in dims):
        fate.events.append(("gathered", node))
        fate.drawn.add(result)
    return [(result, found)]


def _stored(node: Node, value: Value, dims: frozenset[int], fate: Fate) -> list[tuple[Value, frozenset[int]]]:
    """The array that is written to, changed in places; or what is written, somewhere in that array."""
    result = node.outputs[0]
    if node.inputs[0] is value:
        return [(result, dims)]
    fate.events.append(("stored", node))
    if node.primitive is prims.dynamic_update_slice_p:
        return [(result, dims)] if node.inputs[1] is value else []
    if node.inputs[-1] is not value:
        return []
    numbers = node.params["dimension_numbers"]
    dropped = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    kept = [d for d in range(len(result.shape)) if d not in dropped]
    window = dict(zip(numbers.update_window_dims, kept, strict=True))
    found = {window[d] for d in dims if d in window}
    if any(d not in window for d in dims):
        found |= set(numbers.scatter_dims_to_operand_dims)
    return [(result, frozenset(found))]


def _without(dims: frozenset[int], removed: set[int]) -> frozenset[int]:
    return frozenset(d - sum(r < d for r in removed) for d in dims)


def _moved(node: Node, value: Value, dims: frozenset[int], fate: Fate) -> list[tuple[Value, frozenset[int]]] | None:
    p, params = node.primitive, node.params
    if p is prims.transpose_p:
        return [(node.outputs[0], frozenset(i for i, d in enumerate(params["permutation"]) if d in dims))]
    if p is prims.broadcast_in_dim_p and len(node.inputs) == 1:
        return [(node.outputs[0], frozenset(params["broadcast_dimensions"][d] for d in dims))]
    whole = value in fate.drawn  # what was drawn may be cut as it likes
    if p is prims.slice_p or p is compat.SPLIT:
        for result in node.outputs:
            for d in dims:
                have, left = value.shape[d], result.shape[d]
                if left == 1 < have:
                    fate.events.append(("gathered", node))
                    fate.drawn.add(result)
                elif left < have and (p is compat.SPLIT or (left and have % left == 0) or _cut_twice(value, d)):
                    # Parts are gates, heads or classes of two kinds; a vocabulary is cut once, to its true size.
                    fate.intact = fate.intact and whole
        return [(r, dims) for r in node.outputs]
    if p in (prims.reshape_p, prims.squeeze_p):
        found = reshaped(value.shape, node.outputs[0].shape, dims)
        result = node.outputs[0]
        if sum(result.shape[d] > 1 for d in found) > sum(value.shape[d] > 1 for d in dims):
            # Split, as heads are. Merged with others, as beams are with their tokens, it is whole inside.
            fate.intact = fate.intact and whole
        return [(node.outputs[0], found)]
    if p is prims.concatenate_p:
        if params["dimension"] in dims:
            fate.intact = fate.intact and whole
            fate.events.append(("moved", node))
        return [(node.outputs[0], dims)]
    if p is prims.rev_p or (p is prims.pad_p and node.inputs[0] is value):
        if any(d in params["dimensions"] if p is prims.rev_p else any(params["padding_config"][d]) for d in dims):
            fate.events.append(("moved", node))
        return [(node.outputs[0], dims)]
    if p is compat.STACK:
        return [(node.outputs[0], frozenset(d + (d >= params["axis"]) for d in dims))]
    if p is compat.UNSTACK:
        if params["axis"] in dims:
            fate.intact = fate.intact and whole
        return [(r, _without(dims, {params["axis"]})) for r in node.outputs]
    return None


def _cut_twice(value: Value, axis: int) -> bool:
    """True when several slices of a value take different parts of an axis."""
    cuts = [n.params for n in value.consumers if _cuts(n, axis)]
    return len({(cut["start_indices"][axis], cut["limit_indices"][axis]) for cut in cuts}) > 1


def _cuts(node: Node, axis: int) -> bool:
    return node.primitive is prims.slice_p and node.outputs[0].shape[axis] not in (1, shape_of(node.inputs[0])[axis])


def _in_parts(value: Value, dims: frozenset[int], along: set[int], fate: Fate) -> None:
    """Notes that part of a split axis is treated as one, as each of several codebooks is."""
    if value not in fate.drawn and any(value.shape[d] > 1 for d in dims - along):
        fate.intact = False


def _through_product(node: Node, value: Value, dims: frozenset[int], fate: Fate) -> list[tuple[Value, frozenset[int]]]:
    (lc, rc), (lb, rb) = node.params["dimension_numbers"]
    for contract, batch, operand in ((lc, lb, node.inputs[0]), (rc, rb, node.inputs[1])):
        if operand is value:
            kind = "contracted" if dims & set(contract) else "multiplied" if dims & set(batch) else None
            fate.events.append((kind or "multiplied", node))
    return []


def _into_scopes(node: Node, value: Value, dims: frozenset[int], fate: Fate) -> list[tuple[Value, frozenset[int]]]:
    found: list[tuple[Any, frozenset[int]]] = []
    fate.events.append(("looped", node))
    lead = len(node.inputs) - len(node.children[0].inputs)  # a while's condition constants, a cond's index
    for child in node.children:
        for inside, operand in zip(child.inputs, node.inputs[lead:], strict=True):
            if operand is value:
                if inside.scanned:
                    fate.events.append(("mixed", node))
                elif inside.outer is not None or not fate.narrow:
                    found.append((inside, dims))
    return found


def _outwards(value: Value, dims: frozenset[int], fate: Fate) -> list[tuple[Value, frozenset[int]]]:
    """Where a value that its scope returns goes on: results of the loop or branch, and its next iteration."""
    if not value.is_output:
        return []
    node = value.scope.node
    if node is None:
        _in_parts(value, dims, {max(dims)}, fate)
        fate.events.append(("returned", None))
        return []
    if fate.narrow:
        # A residual stream: all that follows in the model reads it, which tells nothing about this product.
        return []
    carry = carried_inputs(node) if value.scope.kind in ("scan", "while") else []
    found: list[tuple[Value, frozenset[int]]] = []
    for i, output in enumerate(value.scope.outputs):
        if output is value:
            if i < len(carry):
                found.append((carry[i], dims))
            stacked = value.scope.kind == "scan" and i >= len(carry)
            found.append((node.outputs[i], frozenset(d + 1 for d in dims) if stacked else dims))
    return found
