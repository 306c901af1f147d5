"""The pointwise region between the products of a feed-forward block: found backwards, replayed on chosen units.

Starting from the activation that a weight product contracts, the hidden axis is followed backwards through pointwise
and moving equations to the weight products that make it. What is met on the way becomes a small expression over
canonical ``[T, K]`` arrays, which the rewriter evaluates twice: on all units with predicted products, and on the chosen
units with exact ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as prims

from hire_xform.passes import compat
from hire_xform.passes.layout import Dim, Layout, UnsupportedLayoutError, moves_only, operand_layout, spaces
from hire_xform.passes.pointwise import HINTS, is_pointwise, known_number, leaves_zeros, literal_number
from hire_xform.passes.products import Product
from hire_xform.passes.provenance import shape_of
from hire_xform.passes.walk import Node, Operand, Value

# A block's region has some ten to thirty equations; past this many the walk has wandered into something else.
MAX_EQUATIONS = 96


@dataclass(frozen=True, eq=False, repr=False)
class Up:
    """A weight product whose outputs, restricted to ``layout``, are the hidden units."""

    product: Product
    layout: Layout


@dataclass(frozen=True, eq=False, repr=False)
class Side:
    """A value that does not depend on the hidden units: a bias, a scale, a mask."""

    value: Value
    layout: Layout


@dataclass(frozen=True, eq=False)
class Number:
    """A scalar literal."""

    operand: Any


@dataclass(frozen=True, eq=False, repr=False)
class Apply:
    """A pointwise equation on earlier expressions, given by their numbers."""

    node: Node
    operands: tuple[int, ...]


@dataclass(eq=False, repr=False)
class Region:
    """The region as a list of expressions, operands before their users.

    Attributes:
      units: number of hidden units.
      exprs: the expressions.
      root: the number of the expression that is the activation.
      inner: values inside the region that depend on its products, all equations that make them included.
      nodes: the equations of the region.
      zeroing: True when non-selected units of it are exactly zero over a range (ReLU and its kin).
    """

    units: int
    exprs: list[Up | Side | Number | Apply] = field(default_factory=list)
    root: int = 0
    inner: set[Value] = field(default_factory=set)
    nodes: set[Node] = field(default_factory=set)
    zeroing: bool = False

    @property
    def ups(self) -> list[Up]:
        """The products into the hidden units, in the order of their expressions."""
        return [e for e in self.exprs if isinstance(e, Up)]

    @property
    def sides(self) -> list[Side]:
        """Values that come from outside."""
        return [e for e in self.exprs if isinstance(e, Side)]

    def signature(self) -> Any:
        """Equal for two regions that compute the same function; hashable."""
        found: list[Any] = []
        for e in self.exprs:
            if isinstance(e, Number):
                number = np.asarray(e.operand.val)
                found.append((str(number.dtype), number.tobytes()))
            elif isinstance(e, Apply):
                found.append((e.node.primitive, _hashable(e.node.params), e.operands, _is_relu(e, self)))
            else:
                found.append(type(e))
        return tuple(found), self.root

    @property
    def activation(self) -> str:
        """The pointwise operations, for reports: ``max``, ``logistic, mul``."""
        skip = (prims.convert_element_type_p, prims.name_p, prims.copy_p)
        names = [str(e.node.primitive) for e in self.exprs if isinstance(e, Apply) and e.node.primitive not in skip]
        return ", ".join(dict.fromkeys(names)) or "none"


def trace_region(down: Product, layout: Layout, products: dict[Node, Product]) -> Region | None:
    """The region that makes the activation of ``down``; None when no weight product is reached.

    Args:
      down: the product that contracts the hidden axis.
      layout: layout of its activation, token and hidden digits for each dimension.
      products: all weight products, by their equation.
    """
    builder = _Builder(products, _units(layout), down)
    try:
        root = builder.expand(down.x, layout)
    except (UnsupportedLayoutError, _RegionTooLargeError):
        return None
    region = builder.region
    if not region.ups:
        return None
    region.root = root
    region.zeroing = builder.zero[root]
    return region


def may_follow_product(down: Product, products: dict[Node, Product]) -> bool:
    """False when no weight product leads to ``down`` through pointwise and moving equations.

    A quick look before ``trace_region``, which says the same of most products of a model, attention's, at more cost.
    """
    seen: set[Value] = {down.x}
    queue = [down.x]
    while queue and len(seen) <= MAX_EQUATIONS:
        value = queue.pop()
        node = value.node
        if node is None or _outlives(value, down):
            continue
        if node in products:
            return True
        if moves_only(node) or is_pointwise(node):
            for operand in node.inputs:
                if isinstance(operand, Value) and operand not in seen:
                    seen.add(operand)
                    queue.append(operand)
    return bool(queue)


def _outlives(value: Value, down: Product) -> bool:
    """True for a value read after the block, as the residual stream is: no region holds it."""
    if value is down.x:
        return False
    order = down.node.order
    return value.is_output or any(node.order > order for node in value.consumers)


class _RegionTooLargeError(Exception):
    pass


class _Builder:
    def __init__(self, products: dict[Node, Product], units: int, down: Product):
        self.products = products
        self.down = down
        self.region = Region(units)
        self.memo: dict[tuple[Any, Layout], int] = {}
        self.depends: list[bool] = []
        self.zero: list[bool] = []
        self.number: list[float | None] = []
        self.visited = 0

    def add(self, expr: Any, depends: bool, zero: bool = False, number: float | None = None) -> int:
        self.region.exprs.append(expr)
        self.depends.append(depends)
        self.zero.append(zero)
        self.number.append(number)
        return len(self.region.exprs) - 1

    def expand(self, operand: Operand, layout: Layout) -> int:
        """The number of the expression for ``operand`` as ``layout`` restricts it."""
        if not isinstance(operand, Value):
            return self.add(Number(operand), False, number=literal_number(operand))
        key = (operand, layout)
        if key not in self.memo:
            self.memo[key] = self._expand(operand, layout)
        return self.memo[key]

    def _expand(self, value: Value, layout: Layout) -> int:
        self.visited += 1
        if self.visited > MAX_EQUATIONS:
            raise _RegionTooLargeError
        node = value.node
        if node is None or value.const is not None or "h" not in spaces(layout) or _outlives(value, self.down):
            return self.side(value, layout)
        product = self.products.get(node)
        if product is not None:
            return self.up(product, layout)
        if moves_only(node):
            operand = node.inputs[0]
            if not isinstance(operand, Value):
                return self.side(value, layout, literal_number(operand))
            return self.through(node, value, layout, operand, operand_layout(node, node.outputs.index(value), layout))
        if node.primitive is compat.OPTIMIZATION_BARRIER:
            return self.through(node, value, layout, node.inputs[node.outputs.index(value)], layout)
        if not is_pointwise(node):
            return self.side(value, layout)
        mark = len(self.region.exprs)
        operands = tuple(self.expand(o, _stretched(o, value, layout)) for o in node.inputs)
        depends = [self.depends[o] for o in operands]
        if not any(depends):
            # Nothing below hangs on the products: the value itself is what comes from outside.
            self.forget(mark)
            return self.side(value, layout)
        self.region.nodes.add(node)
        self.region.inner.add(value)
        if node.primitive in HINTS or node.primitive is prims.name_p:
            return operands[0]
        zero = leaves_zeros(node, [self.zero[o] for o in operands], [self.number[o] for o in operands], depends)
        return self.add(Apply(node, operands), True, zero)

    def through(self, node: Node, value: Value, layout: Layout, operand: Operand, operand_layout: Layout) -> int:
        """The expression for ``value``, which ``node`` makes of ``operand`` by moving it only."""
        mark = len(self.region.exprs)
        found = self.expand(operand, operand_layout)
        if not self.depends[found]:
            # What comes from outside is taken where it is read: further back may be outside the call the block is in.
            number = self.number[found]
            self.forget(mark)
            return self.side(value, layout, number)
        self.region.nodes.add(node)
        self.region.inner.add(value)
        return found

    def up(self, product: Product, layout: Layout) -> int:
        x_dims = [layout[d] for d in product.out_x_dims]
        w_dims = [layout[d] for d in product.out_w_dims]
        if any(a.space != "t" for d in x_dims for a in d.atoms) or any(a.space != "h" for d in w_dims for a in d.atoms):
            return self.side(product.out, layout)
        if not all(d.full for d in x_dims) or product.batched or _units(layout) != self.region.units:
            return self.side(product.out, layout)
        self.region.nodes.add(product.node)
        self.region.inner.add(product.out)
        return self.add(Up(product, layout), True)

    def side(self, value: Value, layout: Layout, number: float | None = None) -> int:
        return self.add(Side(value, layout), False, number=known_number(value) if number is None else number)

    def forget(self, mark: int) -> None:
        """Drops the expressions added since ``mark``; nothing refers to them."""
        for things in (self.region.exprs, self.depends, self.zero, self.number):
            del things[mark:]
        self.memo = {key: number for key, number in self.memo.items() if number < mark}


def _hashable(params: dict[str, Any]) -> Any:
    """An equation's parameters as a key; only identical ones compare equal where they can't be hashed."""
    items = tuple(sorted(params.items(), key=lambda item: item[0]))
    try:
        hash(items)
    except TypeError:
        return id(params)
    return items


def _stretched(operand: Operand, result: Value, layout: Layout) -> Layout:
    """Layout of a pointwise equation's operand: a scalar's is empty; axes of length one carry nothing if stretched."""
    if not isinstance(operand, Value) or not operand.shape:
        return ()
    sizes = zip(operand.shape, result.shape, layout, strict=True)
    return tuple(Dim((), 1) if have == 1 and want != 1 else dim for have, want, dim in sizes)


def replay(
    region: Region,
    hiddens: list[Any],
    sides: list[Any],
    gather: Callable[[Any], Any],
    relu: Callable[[Any], Any],
) -> Any:
    """Evaluates the region on some of the hidden units.

    Args:
      region: the region.
      hiddens: ``[T, K]`` for each of ``region.ups``.
      sides: for each of ``region.sides`` its canonical array: ``[T or 1, m or 1]``, or a scalar.
      gather: brings ``[T or 1, m]`` to the same K units.
      relu: stands for ``max(u, 0)``, so that its derivative at zero is the activation's.

    Returns:
      ``[T, K]``.
    """
    shape = hiddens[0].shape
    values: list[Any] = []
    ups, others = iter(hiddens), iter(sides)
    for expr in region.exprs:
        if isinstance(expr, Up):
            values.append(next(ups))
        elif isinstance(expr, Side):
            side = next(others)
            if jnp.ndim(side) == 2 and side.shape[1] == region.units:
                side = gather(side)
            values.append(jnp.broadcast_to(side, shape) if jnp.ndim(side) else side)
        elif isinstance(expr, Number):
            values.append(expr.operand.val)
        else:
            # What was stretched to a shape by an equation left out here (a literal zero of a `where`) is so again.
            operands = [
                jnp.broadcast_to(values[o], shape) if shape_of(read) and not jnp.ndim(values[o]) else values[o]
                for o, read in zip(expr.operands, expr.node.inputs, strict=True)
            ]
            with compat.equation_context(expr.node.eqn):
                if _is_relu(expr, region):
                    values.append(relu(operands[0]))
                else:
                    values.append(compat.bind(expr.node.eqn, operands)[0])
    return values[region.root]


def _is_relu(expr: Apply, region: Region) -> bool:
    second = region.exprs[expr.operands[-1]]
    return (
        expr.node.primitive is prims.max_p
        and expr.node.frame.kind in ("jit", "custom")
        and isinstance(second, Number)
        and literal_number(second.operand) == 0.0
        and any(frame.kind == "custom" for frame in expr.node.frame.ancestors())
    )


def _units(layout: Layout) -> int:
    return math.prod(a.size for dim in layout for a in dim.atoms if a.space == "h")
