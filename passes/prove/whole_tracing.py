"""Follows what a reader takes back to the logits, through what takes them as a whole: a ``WholeChain``, or why not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jax.extend.core import primitives as prims

from hire_xform.passes.ir.graph import Node, Operand, Value
from hire_xform.passes.match.output_axis import Fate
from hire_xform.passes.match.readers import Reader
from hire_xform.passes.prove.chain_tracing import NotFollowedError, Tracer
from hire_xform.passes.prove.edges import edge_of, has_one_value
from hire_xform.passes.prove.orders import (
    LOCATE,
    ORDERS,
    is_full,
    is_located,
    is_numbers,
    order_of,
    places_of,
    set_in_order,
    without_wrapping,
)
from hire_xform.passes.prove.searches import is_search, search_of
from hire_xform.passes.prove.whole_chains import WholeChain, WholeStep, has_spine
from hire_xform.passes.prove.whole_rules import can_be_replayed
from hire_xform.passes.weights.origins import shape_of
from hire_xform.passes.weights.products import Product

# Equations that are looked through for readers behind filters.
_MAX_LOOKED = 1024
_PICK = frozenset({prims.gather_p, prims.dynamic_slice_p})


def whole_chain_of(product: Product, fate: Fate, reader: Reader) -> WholeChain | str:
    """The way from a product's output to a reader; a reason where it is not followed."""
    try:
        return _WholeTracer(product, fate, reader).whole()
    except NotFollowedError as error:
        return str(error)


class _WholeTracer(Tracer):
    """Follows one reader's operand backwards to the product, through equations that take an axis as a whole."""

    steps: list[WholeStep]  # type: ignore[assignment]
    most_steps = 256

    def whole(self) -> WholeChain:
        value = self._inside(self.reader.value) if self.reader.has_places else self.reader.value
        if value.scope is not self.product.node.scope:
            raise NotFollowedError(f"{self.reader.where} stands in another loop or branch than its logits")
        self._number(value)
        node = self.reader.node
        dims = node.params["axes"] if node is not None and node.primitive in LOCATE else self.reader.dims
        if self.reader.has_places and len(dims) != 1:
            raise NotFollowedError(f"its axis is split or merged on the way to {self.reader.where}")
        return WholeChain(
            self.reader,
            value,
            next(iter(dims), 0),
            tuple(self.steps),
            tuple(self.sides),
            self._ahead(),
            self.outer,
            False,
            False,
            spine=self.reader.has_places and has_spine(self.steps),
        )

    def _made(self, value: Value) -> int:
        node = value.node
        if node is None:
            return super()._made(value)
        plain = without_wrapping(value)
        if plain is not None:
            return self._number(plain)
        inputs, takes = self._taken(node)
        result = node.outputs.index(value)
        search = search_of(node, result, self.logits)
        if search is not None:
            inputs = list(search.inputs)
        reached = [isinstance(o, Value) and self.logits.reach(o) for o in inputs]
        if takes is None and search is None and not self._has_rule(node, result, reached):
            raise NotFollowedError(
                f"{node.primitive} at {node.source}, on the way to {self.reader.where}, has no bounds"
            )
        edge = edge_of(node, self.product.out) if takes is None else None
        if edge is not None and edge.places is not None:
            inputs, reached = [*inputs, edge.places], [*reached, True]
        operands = tuple(
            self._number(o) if here and isinstance(o, Value) else None for o, here in zip(inputs, reached, strict=True)
        )
        for operand, here in zip(inputs, reached, strict=True):
            if isinstance(operand, Value) and not here:
                self._beside(operand)
        located = takes is not None and len(inputs) == 2 and is_located(inputs[1])
        self.steps.append(
            WholeStep(
                node,
                result,
                operands,
                inputs=tuple(inputs),
                takes=takes,
                located=located,
                edge=edge,
                search=search,
            )
        )
        return len(self.steps) - 1

    def _has_rule(self, node: Node, result: int, reached: list[bool]) -> bool:
        if node.children or node.eqn.effects or not can_be_replayed(node, result, reached):
            return False
        if node.primitive is prims.sort_p and len(node.inputs) > 1:
            keys, payload = node.inputs
            if order_of(keys) is not None:
                return node.params["dimension"] == len(shape_of(payload)) - 1 and is_full(keys)
            return result == 0 or is_numbers(payload, node.params["dimension"])
        # Numbers of entries mean something to what picks by them only.
        return not (node.primitive in ORDERS and result == 1) or node.outputs[1].shape != ()

    def _taken(self, node: Node) -> tuple[list[Operand], int | None]:
        """The operands of an equation; of one that picks entries at places that hang on the logits, these two."""
        places = places_of(node) if node.primitive in _PICK else None
        if node.primitive is prims.scatter_p and (where := set_in_order(node)) is not None:
            return [node.inputs[0], where, node.inputs[2]], 0
        if places is None or not (isinstance(places, Value) and self.logits.reach(places)):
            return node.inputs, None
        values = node.inputs[0]
        order = order_of(places)
        same = 0
        if order is not None:
            keys = order.inputs[0]
            rising = order.primitive is not prims.sort_p
            known = isinstance(values, Value) and has_one_value(values, self.product.out)
            if known and (keys is values or _negated(keys) is values or _negated(values) is keys):
                same = 1 if (keys is values) == rising else -1
            if order_of(values) is not None:
                raise NotFollowedError(f"{node.primitive} at {node.source} puts one order into another")
        return [values, places], same


def _negated(operand: Operand) -> Operand | None:
    node = operand.node if isinstance(operand, Value) else None
    return node.inputs[0] if node is not None and node.primitive is prims.neg_p else None


# --- readers behind what takes the logits as a whole ---


def reached_by(product: Product) -> Iterator[Node]:
    """Equations behind a product in its own scope, each once, until what is located or leaves the scope."""
    queue: list[Value] = [product.out]
    seen: set[Node] = set()
    while queue and len(seen) < _MAX_LOOKED:
        for node in queue.pop(0).consumers:
            if node in seen or node.scope is not product.node.scope or node.children:
                continue
            seen.add(node)
            yield node
            if node.primitive not in LOCATE and node.primitive is not prims.dot_general_p:
                queue += node.outputs


def draws_of(product: Product, fate: Fate, readers: list[Reader]) -> list[Reader]:
    """What locates an entry behind what takes the logits as a whole, and what is picked by it; not other readers."""
    known = {reader.node for reader in readers}
    found = []
    for node in reached_by(product):
        if node in known:
            continue
        operand = node.inputs[0] if node.inputs else None
        if node.primitive in LOCATE and isinstance(operand, Value) and len(node.params["axes"]) == 1:
            kind: Any = "arg max" if node.primitive is prims.argmax_p else "arg min"
            found.append(Reader(kind, node, operand, frozenset(node.params["axes"])))
        elif node.primitive in _PICK and operand is not None and order_of(operand) is not None:
            places = places_of(node)
            if isinstance(places, Value) and order_of(places) is None:
                found.append(Reader("picked", node, node.outputs[0], frozenset()))
    return found


def ends_in(node: Node, proved: set[Node | None]) -> bool:
    """Whether all that is made of an equation's results, in its scope, ends in what is proved: nothing else sees it."""
    queue = list(node.outputs)
    seen: set[Node] = set()
    while queue:
        value = queue.pop()
        if value.is_output or len(seen) > _MAX_LOOKED:
            return False
        for reader in value.consumers:
            if reader in seen or reader in proved:
                continue
            looped = reader.children and not is_search(reader)
            if looped or reader.eqn.effects or reader.scope is not node.scope:
                return False
            seen.add(reader)
            queue += reader.outputs
    return True
