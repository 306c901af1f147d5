"""Searches for a number among rising ones, as a draw by the inverse of the sums ends in (``jax.random.choice``)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.extend.core import primitives as prims

from hire_xform.lowering.prove import searches
from hire_xform.lowering.prove.intervals import Interval
from hire_xform.passes.ir.binary_search import SearchParts, search_parts
from hire_xform.passes.ir.graph import Node, Operand, Value, dtype_of
from hire_xform.passes.ir.pointwise import known_number, stretched_number
from hire_xform.passes.prove.chains import moved_by
from hire_xform.passes.prove.logits import Logits
from hire_xform.passes.weights.origins import shape_of

_MOST_STEPS = 32
# What keeps rows apart, as long as the length of what is kept apart stays.
_KEEPS_ROWS = frozenset({prims.squeeze_p, prims.reshape_p, prims.broadcast_in_dim_p, prims.copy_p})


@dataclass(frozen=True, eq=False)
class Search:
    """A binary search along the last axis.

    Attributes:
      node: its equation.
      parts: what kind of search it is.
      inputs: entries and what is sought; or terms, a share, and divisors, where running sums of quotients are searched
        for a share of their total.
      share: whether it is the latter.
      moves: of terms, what is done to quotients before they are added up, in order.
    """

    node: Node
    parts: SearchParts
    inputs: tuple[Operand, ...]
    share: bool = False
    moves: tuple[Node, ...] = ()

    @property
    def signature(self) -> Any:
        """Equal for searches of one kind."""
        moves = tuple((node.primitive, node.outputs[0].shape) for node in self.moves)
        return self.parts, self.share, moves, self.node.outputs[self.parts.result].shape


def is_search(node: Node) -> bool:
    """Whether an equation is a search whose places can be followed."""
    return _parts_of(node) is not None


def _parts_of(node: Node) -> SearchParts | None:
    parts = search_parts(node.eqn)
    if parts is None or len(node.inputs) != 2 + len(parts.state):
        return None
    started = all(stretched_number(o) == n for o, n in zip(node.inputs[2:], parts.state, strict=True))
    return parts if started else None


def search_of(node: Node, result: int, logits: Logits) -> Search | None:
    """What an equation searches for, if one of its results is the place that it finds."""
    parts = _parts_of(node)
    if parts is None or parts.result != result:
        return None
    plain = Search(node, parts, tuple(node.inputs[:2]))
    return _of_a_share(plain, logits) or plain


def replayed(search: Search, operands: Sequence[Interval]) -> Interval:
    """The place that is found, given what ``inputs`` may be."""
    shape = search.node.outputs[search.parts.result].shape
    entries, sought, *divisors = operands
    for node in search.moves:
        entries = entries.map(functools.partial(moved_by, node, 0))
    lead, n = entries.low.shape[:-1], entries.low.shape[-1]
    entries = entries.map(lambda end: end.reshape(*lead, *(1,) * (len(shape) - len(lead)), n))
    sought = sought.map(lambda end: jnp.broadcast_to(end, shape)[..., None])
    if search.share:
        below = searches.are_below_a_share(entries, sought, divisors)
    else:
        below = searches.are_below(entries, sought, search.parts.right)
    return searches.place_found(below)


def _of_a_share(search: Search, logits: Logits) -> Search | None:
    """The same as a search for a share of the total, ``searchsorted(cumsum(p), cumsum(p)[-1] * share)``."""
    entries, sought = search.inputs
    sums = entries.node if isinstance(entries, Value) else None
    product = sought.node if isinstance(sought, Value) else None
    if sums is None or product is None or product.primitive is not prims.mul_p:
        return None
    last = len(shape_of(entries)) - 1
    if sums.primitive is not prims.cumsum_p or sums.params["reverse"] or sums.params["axis"] != last:
        return None
    shares = [o for i, o in enumerate(product.inputs) if _is_total(product.inputs[1 - i], sums.outputs[0])]
    if not shares or (isinstance(shares[0], Value) and logits.reach(shares[0])):
        return None
    terms, divisors, moves = _without_divisors(sums.inputs[0], logits)
    if any(dtype_of(o) != jnp.float32 for o in (entries, terms)):
        return None
    return Search(search.node, search.parts, (terms, shares[0], *divisors), share=True, moves=moves)


def _is_total(operand: Operand, sums: Value) -> bool:
    """Whether an operand is the last of some running sums, of each row its own."""
    rows, n = sums.shape[:-1], sums.shape[-1]
    for _ in range(_MOST_STEPS):
        node = operand.node if isinstance(operand, Value) else None
        if node is None or shape_of(operand)[: len(rows)] != rows:
            return False
        before = node.inputs[0]
        if before is sums:
            starts, sizes = (*(0 for _ in rows), n - 1), (*rows, 1)
            if node.primitive is prims.slice_p:
                return node.params["start_indices"] == starts and node.outputs[0].shape == sizes
            taken = node.primitive is prims.dynamic_slice_p and tuple(node.params["slice_sizes"]) == sizes
            return taken and [known_number(o) for o in node.inputs[1:]] == list(starts)
        in_order = node.primitive is not prims.broadcast_in_dim_p or _in_order(node)
        if node.primitive not in _KEEPS_ROWS or not in_order:
            return False
        operand = before
    return False


def _in_order(node: Node) -> bool:
    axes = node.params["broadcast_dimensions"]
    return tuple(axes) == tuple(range(len(axes)))


def _without_divisors(operand: Operand, logits: Logits) -> tuple[Operand, list[Operand], tuple[Node, ...]]:
    """What shares of a row are made of by dividing all by the same, as a softmax does; the divisors, and the moves."""
    divisors: list[Operand] = []
    moves: list[Node] = []
    n = shape_of(operand)[-1]
    found = operand, 0, 0
    for _ in range(_MOST_STEPS):
        node = operand.node if isinstance(operand, Value) else None
        if node is None or not node.inputs or shape_of(node.inputs[0])[-1:] != (n,):
            break
        if node.primitive is prims.div_p and _is_common(node.inputs[1], logits):
            divisors.append(node.inputs[1])
            operand = node.inputs[0]
            found = operand, len(divisors), len(moves)
        elif node.primitive in _KEEPS_ROWS:
            moves.append(node)
            operand = node.inputs[0]
        else:
            break
    terms, held, moved = found
    return terms, divisors[:held], tuple(reversed(moves[:moved]))


def _is_common(operand: Operand, logits: Logits) -> bool:
    """Whether a divisor is made of the logits, and is one number for each row."""
    while isinstance(operand, Value) and logits.reach(operand):
        if shape_of(operand)[-1:] in ((), (1,)):
            return True
        node = operand.node
        if node is None or node.primitive is not prims.broadcast_in_dim_p:
            return False
        before = shape_of(node.inputs[0])
        axes = node.params["broadcast_dimensions"]
        if len(operand.shape) - 1 not in axes or before[axes.index(len(operand.shape) - 1)] == 1:
            return True
        operand = node.inputs[0]
    return False
