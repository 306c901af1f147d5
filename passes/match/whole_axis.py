"""What reads logits while the vocabulary is their last axis, whole: by place, or whatever the order of its entries."""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp
from jax.extend.core import primitives as prims

from hire_xform.passes.ir.axis_rules import is_pointwise, links_of, moves_only
from hire_xform.passes.ir.graph import Node, Operand, Value, dtype_of
from hire_xform.passes.ir.links import How, Link
from hire_xform.passes.match.top_k import top_k_of
from hire_xform.passes.weights.origins import shape_of


def reads_of(logits: Value) -> Iterator[tuple[Value, dict[Node, list[Value] | None]]]:
    """Values of which the vocabulary is the last axis, whole and in its order, and what reads them.

    Yields:
      A value, and for each equation that reads it the results that are such values again: none where it reduces the
      axis, and None where it takes entries by their place.
    """
    seen, waiting = {logits}, [logits]
    while waiting:
        value = waiting.pop()
        reads = {node: _kept(node, value) for node in value.consumers}
        yield value, reads
        for results in reads.values():
            waiting += [result for result in results or () if result not in seen]
            seen.update(results or ())


def _kept(node: Node, value: Value) -> list[Value] | None:
    links = links_of(node) or ()
    along = [k for k in links if node.inputs[k.operand] is value and len(value.shape) - 1 in k.before]
    if not along or any(link.how is How.CONTRACTED for link in links):
        return None
    if all(link.how is How.REDUCED for link in along):
        return []
    if not all(link.how in (How.SAME, How.EACH) and _stays_last(link, node, value) for link in along):
        return None
    return list(dict.fromkeys(node.outputs[link.result] for link in along))


def _stays_last(link: Link, node: Node, value: Value) -> bool:
    """Row-major, and as long as before: the whole axis."""
    result = node.outputs[link.result].shape
    return link.after[-1:] == (len(result) - 1,) and result[-1] == value.shape[-1]


def joined_by(node: Node, result: Value) -> list[tuple[Operand, int]]:
    """The operands of which an equation makes the last axis of a result, and where that is in them."""
    links = [k for k in links_of(node) or () if node.outputs[k.result] is result]
    return [(node.inputs[k.operand], k.before[-1]) for k in links if k.after[-1:] == (len(result.shape) - 1,)]


def is_uniform(operand: Operand, axis: int) -> bool:
    """True for a value that is the same all along an axis."""
    if not isinstance(operand, Value) or not operand.shape or operand.shape[axis] == 1:
        return True
    node = operand.node
    if node is None or not (is_pointwise(node) or moves_only(node)):
        return False
    links = [k for k in links_of(node) or () if axis in k.after and node.outputs[k.result] is operand]
    made_of = [(node.inputs[k.operand], d) for k in links if k.how is not How.STRETCHED for d in k.before]
    return all(is_uniform(source, d) for source, d in made_of)


def cuts_end(node: Node) -> bool:
    """True for a slice that cuts the end of the last axis off, as padding of a vocabulary, and nothing else."""
    cuts = [link for link in links_of(node) or () if link.how is not How.SAME] if moves_only(node) else []
    last = len(shape_of(node.inputs[0])) - 1 if cuts else 0
    return len(node.outputs) == 1 and cuts == [Link((last,), (last,), How.CUT)]


def takes_largest(node: Node) -> bool:
    """True for an arg max along the last axis of floating values."""
    if node.primitive is not prims.argmax_p:
        return False
    operand = node.inputs[0]
    return tuple(node.params["axes"]) == (len(shape_of(operand)) - 1,) and jnp.issubdtype(
        dtype_of(operand), jnp.floating
    )


def selects(node: Node, value: Value) -> bool:
    """True for an arg max or a top-k along the last axis."""
    last = len(value.shape) - 1
    if node.primitive is prims.argmax_p:
        return tuple(node.params["axes"]) == (last,)
    top = top_k_of(node) if node.primitive is prims.top_k_p else None
    return top is not None and top.axis == last
