"""What a program computes from the output of one product, behind it."""

from __future__ import annotations

import math

from hire_xform.passes.ir.graph import Node, Operand, Scope, Value
from hire_xform.passes.match.output_axis import Fate
from hire_xform.passes.weights.products import Product


class Logits:
    """The output of a product and the axes that its entries lie on, ``product.width`` of them for each token."""

    def __init__(self, product: Product, fate: Fate):
        self.product, self.fate = product, fate
        self._reached: dict[Value, bool] = {product.out: True}

    def reach(self, value: Value) -> bool:
        """Whether a value is computed from the logits."""
        if value not in self._reached:
            self._reached[value] = False
            node = value.node
            if node is None:
                outer = value.outer if self.are_within(value.scope) else None
                found = isinstance(outer, Value) and self.reach(outer)
                if outer is None and self.are_within(value.scope) and value.scope is not self.product.node.scope:
                    found = value.const is None  # a body's own state may
                self._reached[value] = found
            elif self.are_within(node.scope) and not self.come_after(node):
                self._reached[value] = any(self.reach(o) for o in node.inputs if isinstance(o, Value))
        return self._reached[value]

    def make_for_each_token(self, operand: Operand) -> bool:
        """Whether an operand is made of all entries of a token, and has none of its own for each."""
        return isinstance(operand, Value) and operand not in self.fate.axes and self.reach(operand)

    def width(self, value: Value) -> int:
        """How many entries the axes hold that the logits lie on."""
        return math.prod(value.shape[d] for d in self.fate.axes.get(value, ()))

    def are_merged_in(self, value: Value) -> bool:
        """Whether these axes hold the entries of several tokens."""
        return self.width(value) > self.product.width

    def are_within(self, scope: Scope) -> bool:
        """Whether the product stands in a scope, or in one that lies within it."""
        return self.product.node.scope in scope.chain()

    def come_after(self, node: Node) -> bool:
        """Whether a node stands before the product, in the scope of the product."""
        home = self.product.node
        return node.scope is home.scope and node.order < home.order
