"""Follows a product's output axis forwards: what becomes of it decides whether it is a vocabulary, or why not."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from hire_xform.passes.ir.axis_rules import Kind, kind_of, links_of
from hire_xform.passes.ir.graph import Node, Value, carried_inputs
from hire_xform.passes.ir.links import How, Link, forwards
from hire_xform.passes.weights.products import Product

# A vocabulary's logits may go through a long chain of sampling; of any other product only the first few are told.
MAX_STEPS, MAX_STEPS_NARROW = 256, 32

# What takes an axis as a whole, and what is told of it otherwise.
_TAKE = frozenset({How.REDUCED, How.LOCATED, How.ORDERED})
_EVENTS = {How.MIXED: "mixed", How.STORED: "stored", How.PLACED: "moved", How.PICKED: "gathered"}


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
    queue: deque[Value] = deque()

    def arrive(results: list[tuple[Value, frozenset[int]]], drawn: bool) -> None:
        for result, dims in results:
            if dims and result not in fate.axes:
                fate.axes[result] = dims
                queue.append(result)
                if drawn:
                    fate.drawn.add(result)

    arrive([(product.out, frozenset(product.out_w_dims))], False)
    steps = 0
    while queue:
        value = queue.popleft()
        dims = fate.axes[value]
        if value.is_output:
            arrive(_outwards(value, dims, fate), value in fate.drawn)
        for node in value.consumers:
            steps += 1
            if steps > limit:
                fate.events.append(("opaque", node))
                return fate
            if found := _step(node, value, dims, fate):
                arrive(found, value in fate.drawn)
    return fate


def _step(node: Node, value: Value, dims: frozenset[int], fate: Fate) -> list[tuple[Value, frozenset[int]]]:
    """Results that still hold the axis, and where; anything else becomes an event."""
    if node.children:
        return _into_scopes(node, value, dims, fate)
    drawn = value in fate.drawn
    if kind_of(node) is Kind.POINTWISE:
        return _met(node, value, dims, fate)
    links = links_of(node)
    if links is None:
        fate.events.append(("reduced" if drawn else "opaque", node))
        return []
    hit: list[Link] = []
    hows: set[How] = set()
    contracts = ordered = divides = False
    taken: set[int] = set()
    for link in links:
        contracts |= link.how is How.CONTRACTED
        if node.inputs[link.operand] is not value:
            continue
        ordered |= link.how is How.ORDERED
        if link.how in _TAKE:
            taken.update(link.before)
        if not dims.isdisjoint(link.before):
            hit.append(link)
            hows.add(link.how)
            divides |= len(link.after) > 1
    if contracts:
        fate.events.append(("contracted" if How.CONTRACTED in hows else "multiplied", node))
        return []
    if not dims.isdisjoint(taken):
        _in_parts(value, dims, taken, fate)
    if hows & {How.REDUCED, How.LOCATED} or ordered:
        fate.events.append(("reduced", node))
        if not ordered:
            return []
    # Cumulative sums are of probabilities, or of sorted scores, where a softmax or a sort has come before.
    summed = How.MIXED in hows and fate.first("reduced") is not None
    fate.events += [(_EVENTS[how], node) for how in hows if how in _EVENTS and not (how is How.MIXED and summed)]
    fate.events += [("reduced", node)] * summed
    results = {node.outputs[n]: forwards([k for k in hit if k.result == n], dims) for n in {k.result for k in hit}}
    if ordered or summed or How.PICKED in hows:
        fate.drawn.update(result for result, held in results.items() if held)
    for link in hit:
        if link.how is How.CUT:
            _cut(node, value, link, fate)
    if not drawn and (
        (How.PLACED in hows and _is_joined(links, hit)) or (divides and _is_split(node, value, dims, hit))
    ):
        fate.intact = False  # what was drawn may be cut as it likes
    return list(results.items())


def _met(node: Node, value: Value, dims: frozenset[int], fate: Fate) -> list[tuple[Value, frozenset[int]]]:
    """What an equation that acts on each element alone makes of the axis, which stays where it is."""
    fate.joins.setdefault(node, set()).update([i for i, o in enumerate(node.inputs) if o is value])
    result = node.outputs[0]
    before, after = value.aval.shape, result.aval.shape
    for d in dims:
        if before[d] != after[d]:
            # One entry drawn from the axis, as a cutoff, meets all others.
            fate.events.append(("reduced" if value in fate.drawn else "opaque", node))
            return []
    return [(result, dims)]


def _is_joined(links: Iterable[Link], hit: Iterable[Link]) -> bool:
    """True where the axis becomes part of one that other operands are parts of as well."""
    places = {link.after: link.operand for link in hit if link.how is How.PLACED}
    return any(link.operand != places.get(link.after, link.operand) for link in links if link.how is How.PLACED)


def _is_split(node: Node, value: Value, dims: frozenset[int], hit: Iterable[Link]) -> bool:
    """True where the axis becomes several, as heads. Merged with others, as beams with tokens, it is whole inside."""
    same = [link for link in hit if link.how is How.SAME and link.result == 0]
    shape = node.outputs[0].shape
    have = sum(value.shape[d] > 1 for link in same for d in link.before if d in dims)
    return sum(shape[e] > 1 for link in same for e in link.after) > have


def _cut(node: Node, value: Value, link: Link, fate: Fate) -> None:
    """One entry that is cut out is drawn; parts are gates, heads or classes. A vocabulary is cut once, to its size."""
    result, (d,) = node.outputs[link.result], link.before
    have, left = value.shape[d], result.shape[link.after[0]] if link.after else 0
    if left == 1:
        fate.events.append(("gathered", node))
        fate.drawn.add(result)
    elif value not in fate.drawn and (
        len(node.outputs) > 1 or (left and have % left == 0) or len(_parts(value, d)) > 1
    ):
        fate.intact = False


def _parts(value: Value, axis: int) -> set[tuple[int, int, int]]:
    """The different parts of an axis, of more than one entry, that are cut from a value."""
    found: set[tuple[int, int, int]] = set()
    for node in value.consumers:
        for link in links_of(node) or ():
            if link.how is How.CUT and link.before == (axis,) and link.after:
                found.add((link.start, link.step, node.outputs[link.result].shape[link.after[0]]))
    return {part for part in found if part[2] != 1}


def _in_parts(value: Value, dims: frozenset[int], along: set[int], fate: Fate) -> None:
    """Notes that part of a split axis is treated as one, as each of several codebooks is."""
    if value not in fate.drawn and any(value.shape[d] > 1 for d in dims - along):
        fate.intact = False


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
