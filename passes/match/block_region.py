"""Finds the region of a feed-forward block: backwards from what its last product contracts, along the hidden axis.

The axis is followed through pointwise and moving equations to the weight products that make it. On the way, an explicit
top-k and a threshold at mean and deviation are taken for what they are: the model's own choice of units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend.core import primitives as prims

from hire_xform.passes.ir import compat
from hire_xform.passes.ir.axes import (
    Atom,
    Dim,
    Layout,
    UnsupportedLayoutError,
    operand_layouts,
    spaces,
    whole,
)
from hire_xform.passes.ir.axis_rules import is_pointwise, moves_only
from hire_xform.passes.ir.graph import Node, Operand, Value
from hire_xform.passes.ir.pointwise import HINTS, known_number, leaves_zeros, literal_number
from hire_xform.passes.match.ends import MAX_EQUATIONS, MIXING, end_of, outlives
from hire_xform.passes.match.expert_axes import makes_units_of_experts, units_of
from hire_xform.passes.match.probe import ENOUGH_ZEROS, Probe, Untried, own_sparsity
from hire_xform.passes.match.region import (
    Apply,
    Grouped,
    Kept,
    Kth,
    Number,
    OwnSparsity,
    Place,
    Region,
    Side,
    Total,
    Unfollowed,
    Up,
)
from hire_xform.passes.match.sums import NoPolynomialError, product_summed
from hire_xform.passes.match.top_k import Placed, TopK, placed, smallest_of, sorted_rank, top_k_of
from hire_xform.passes.match.updates import low_rank_updates
from hire_xform.passes.weights.products import Product

# From a value that is the same for all units back to the top-k or the sum that it may come from.
MAX_TO_STATISTIC = 48

_GROUPING = frozenset({prims.reduce_sum_p, prims.reduce_max_p})


def trace_region(
    down: Product, layout: Layout, products: dict[Node, Product], probe: Probe, each: int | None = None
) -> Region | Unfollowed:
    """The region that makes the activation of ``down``, or why no weight product is reached.

    Args:
      down: the product that contracts the hidden axis.
      layout: layout of its activation, token and hidden digits for each dimension.
      products: all weight products, by their equation.
      probe: tries regions on numbers.
      each: of experts, how many tokens each has; see ``expert_axes.py``. None where there are none.
    """
    mixing = ""
    try:
        found = _trace(down, layout, products, True, each)
        if isinstance(found, _Builder) and found.mixes:
            own = own_sparsity(found.region, probe)
            if isinstance(own, OwnSparsity):
                found.region.own, found.region.zeroing = own, True
                return found.region
            # Mixes its units in a way that is not the choosing of some: as if it could not be followed.
            raise _NotFollowedError(own)
    except _NotFollowedError as error:
        mixing = str(error)
        found = _trace(down, layout, products, False, each)
    if isinstance(found, Unfollowed):
        return Unfollowed(mixing) if mixing else found
    region = found.region
    region.mixing = mixing
    if region.zeroing:
        share = probe.zero_share(region)
        if isinstance(share, Untried):
            region.zeroing, region.untried = False, share.reason
        else:
            region.zeroing, region.zero_share = (share or 0.0) >= ENOUGH_ZEROS, share
    return region


def _trace(
    down: Product,
    layout: Layout,
    products: dict[Node, Product],
    statistics: bool,
    each: int | None,
    updates: tuple[Product, ...] = (),
) -> _Builder | Unfollowed:
    builder = _Builder(products, units_of(layout), down, statistics, each, updates)
    try:
        root = builder.expand(down.x, layout)
    except _EndsError as error:
        return error.why
    if not builder.region.ups:
        return end_of(builder.ends, down, products)
    if not updates and (found := low_rank_updates(builder.region, products)):
        return _trace(down, layout, products, statistics, each, found)
    builder.region.root = root
    builder.region.zeroing = builder.zero[root]
    return builder


class _EndsError(Exception):
    """The way back ends, and why."""

    def __init__(self, why: Unfollowed):
        super().__init__(str(why.reason))
        self.why = why


class _NotFollowedError(Exception):
    """A top-k, sort or sum of hidden units is put to a use that is not followed."""


class _Builder:
    def __init__(
        self,
        products: dict[Node, Product],
        units: int,
        down: Product,
        statistics: bool,
        each: int | None,
        updates: tuple[Product, ...],
    ):
        self.products = products
        self.down = down
        self.each = each
        self.statistics = statistics
        self.region = Region(units, updates=updates)
        self.memo: dict[tuple[Any, Layout], int] = {}
        self.depends: list[bool] = []
        self.zero: list[bool] = []
        self.number: list[float | None] = []
        self.visited = 0
        # Values that differ by unit and come from outside.
        self.ends: list[Value] = []

    @property
    def mixes(self) -> bool:
        """True when the region holds more than pointwise equations."""
        return any(isinstance(e, (Grouped, Kth, Kept, Total)) for e in self.region.exprs)

    def add(
        self, expr: Any, depends: bool, zero: bool = False, number: float | None = None, varies: bool | None = None
    ) -> int:
        self.region.exprs.append(expr)
        self.region.varies.append(depends if varies is None else varies)
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
            raise _EndsError(Unfollowed(f"more than {MAX_EQUATIONS} equations make what it contracts"))
        node = value.node
        if node is None or value.const is not None or outlives(value, self.down):
            return self.side(value, layout)
        if not spaces(layout) & {"h", "k"} and not (self.statistics and self.reaches_statistic(value)):
            return self.side(value, layout)
        product = self.products.get(node)
        if product is not None:
            return self.up(product, layout)
        if self.statistics and (found := self.statistic(node, value, layout)) is not None:
            return found
        if moves_only(node):
            operand = node.inputs[0]
            if not isinstance(operand, Value):
                return self.side(value, layout, literal_number(operand))
            before = _layouts_before(node, node.outputs.index(value), layout)[0]
            return self.through(node, value, layout, operand, before)
        if node.primitive is compat.OPTIMIZATION_BARRIER:
            return self.through(node, value, layout, node.inputs[node.outputs.index(value)], layout)
        if not is_pointwise(node):
            return self.side(value, layout)
        mark = len(self.region.exprs)
        operands = tuple(map(self.expand, node.inputs, _layouts_before(node, 0, layout)))
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
        return self.add(Apply(node, operands), True, zero, varies=any(self.region.varies[o] for o in operands))

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
        if self.each is not None:
            made = makes_units_of_experts(product, layout, self.region.units, self.each)
            return self.taken_as_up(product, layout) if made else self.side(product.out, layout)
        x_dims = [layout[d] for d in product.out_x_dims]
        w_dims = [layout[d] for d in product.out_w_dims]
        if any(a.space != "t" for d in x_dims for a in d.atoms) or any(a.space != "h" for d in w_dims for a in d.atoms):
            return self.side(product.out, layout)
        followed = not product.w_batch and product.contracted and units_of(layout) == self.region.units
        if product in self.region.updates:
            return self.side(product.out, layout)
        if not followed or not all(d.full for d in x_dims):
            return self.side(product.out, layout)
        return self.taken_as_up(product, layout)

    def taken_as_up(self, product: Product, layout: Layout) -> int:
        self.region.nodes.add(product.node)
        self.region.inner.add(product.out)
        return self.add(Up(product, layout), True)

    def side(self, value: Value, layout: Layout, number: float | None = None) -> int:
        held = spaces(layout)
        if "k" in held:
            raise _NotFollowedError(f"the values of a top-k of its units are not followed back to it{_at(value.node)}")
        if "h" in held:
            self.ends.append(value)
        number = known_number(value) if number is None else number
        return self.add(Side(value, layout), False, number=number, varies="h" in held)

    def reaches_statistic(self, value: Value) -> bool:
        """Whether a value that is the same for all units may come from a top-k or a sum of as many units."""
        seen: set[Value] = {value}
        queue = [value]
        while queue and len(seen) <= MAX_TO_STATISTIC:
            node = queue.pop().node
            if node is None or node in self.products:
                continue
            operands = [o for o in node.inputs if isinstance(o, Value) and o.shape]
            if node.primitive in MIXING:
                if any(n > 1 and self.region.units % n == 0 for o in operands for n in o.shape):
                    return True
            elif moves_only(node) or is_pointwise(node) or node.primitive is prims.reduce_min_p:
                queue += [o for o in operands if o not in seen]
                seen.update(operands)
        return False

    def statistic(self, node: Node, value: Value, layout: Layout) -> int | None:
        """The expression for a top-k, a sort or a sum of hidden units; None when the equation is none of them."""
        top = top_k_of(node)
        if top is not None:
            if value is not node.outputs[0]:
                raise _NotFollowedError(f"the indices of a top-k of its units are put to other use{_at(node)}")
            dim = layout[top.axis]
            if any(a.space == "k" for a in dim.atoms):
                taken = self.expand(top.operand, self.spread(layout, top.axis, top.operand))
                self.include(node, value)
                return taken
            return self.kth(node, value, layout, top.operand, top.axis, dim.start + 1) if not dim.atoms else None
        if node.primitive is prims.sort_p:
            axis = node.params["dimension"]
            operand, rank = node.inputs[0], sorted_rank(node, layout[axis].start)
            if layout[axis].atoms or rank is None or not isinstance(operand, Value):
                raise _NotFollowedError(f"its units are sorted{_at(node)}, and not one of them is taken")
            return self.kth(node, value, layout, operand, axis, rank)
        smallest = smallest_of(node)
        if smallest is not None and self.group_of(smallest.operand, smallest.axis):
            self.include(smallest.node, smallest.node.outputs[0])
            full = (*layout[: smallest.axis], Dim((), 1), *layout[smallest.axis :])
            return self.kth(node, value, full, smallest.operand, smallest.axis, smallest.k)
        found = placed(node) if "h" in spaces(layout) else None
        if found is not None:
            return self.place(found, value, layout)
        if node.primitive is prims.reduce_sum_p and "h" not in spaces(layout):
            return self.total(node, value, layout)
        if node.primitive in _GROUPING and "h" in spaces(layout):
            return self.grouped(node, value, layout)
        return None

    def group_of(self, operand: Value, axis: int) -> int:
        """How many neighbouring units an entry along an axis may stand for; zero when it can't be."""
        size = operand.shape[axis]
        return self.region.units // size if size > 1 and self.region.units % size == 0 else 0

    def spread(self, layout: Layout, axis: int, operand: Value) -> Layout:
        """The layout with all units, or all groups of neighbouring units, in order, along one axis."""
        size = operand.shape[axis]
        return (*layout[:axis], whole([Atom("h", self.group_of(operand, axis), size)], size), *layout[axis + 1 :])

    def kth(self, node: Node, value: Value, layout: Layout, operand: Value, axis: int, rank: int) -> int:
        group = self.group_of(operand, axis)
        if not group:
            return self.side(value, layout)
        found = self.expand(operand, self.spread(layout, axis, operand))
        if not self.depends[found]:
            raise _NotFollowedError(f"what is ranked{_at(node)} does not hang on its products")
        self.include(node, value)
        # Each value of a group stands at all its units.
        return self.add(Kth(found, rank * group), True, varies=False)

    def grouped(self, node: Node, value: Value, layout: Layout) -> int | None:
        """The sum or the largest over groups of neighbouring units; None when an equation is no such thing."""
        axes, operand = tuple(node.params["axes"]), node.inputs[0]
        if len(axes) != 1 or not isinstance(operand, Value):
            return None
        size = operand.shape[axes[0]]
        if (
            units_of(layout) * size != self.region.units
            or min(a.stride for d in layout for a in d.atoms if a.space == "h") != size
        ):
            return None
        members = whole([Atom("h", 1, size)], size)
        found = self.expand(operand, (*layout[: axes[0]], members, *layout[axes[0] :]))
        if not self.depends[found]:
            return None
        self.include(node, value)
        return self.add(Grouped(found, size, node.primitive is prims.reduce_max_p), True)

    def place(self, found: Placed, value: Value, layout: Layout) -> int:
        top: TopK = found.top
        group = self.group_of(top.operand, top.axis)
        if not group or layout != self.spread(layout, top.axis, top.operand):
            raise _NotFollowedError(f"the top-k whose units are kept{_at(top.node)} is not of all of them, in order")
        operand = self.expand(top.operand, layout)
        if not self.depends[operand]:
            raise _NotFollowedError(f"what is ranked{_at(top.node)} does not hang on its products")
        update = None
        if found.update is not None:
            kept = Dim((Atom("k", 1, top.k),), top.k)
            update = self.expand(found.update, (*layout[: top.axis], kept, *layout[top.axis + 1 :]))
        for node in found.nodes:
            self.include(node, *node.outputs)
        mask = self.add(Kept(operand, top.k * group), True)
        return self.add(Place(mask, update, found.number, value.aval.dtype), True, True)

    def total(self, node: Node, value: Value, layout: Layout) -> int | None:
        axes, operand = tuple(node.params["axes"]), node.inputs[0]
        if len(axes) != 1 or not isinstance(operand, Value) or operand.shape[axes[0]] != self.region.units:
            return None
        mark = len(self.region.exprs)
        inside = self.expand(
            operand, self.spread((*layout[: axes[0]], Dim((), 1), *layout[axes[0] :]), axes[0], operand)
        )
        if not self.depends[inside]:
            self.forget(mark)
            return self.side(value, layout)
        try:
            product_summed(self.region.exprs, self.region.varies, inside)
        except NoPolynomialError as error:
            raise _NotFollowedError(
                f"the sum over its units{_at(node)} is of no polynomial of second degree in one product: {error}"
            ) from error
        self.include(node, value)
        return self.add(Total(inside, value.aval.dtype), True, varies=False)

    def include(self, node: Node, *values: Value) -> None:
        self.region.nodes.add(node)
        self.region.inner.update(values)

    def forget(self, mark: int) -> None:
        """Drops the expressions added since ``mark``; nothing refers to them."""
        for things in (self.region.exprs, self.region.varies, self.depends, self.zero, self.number):
            del things[mark:]
        self.memo = {key: number for key, number in self.memo.items() if number < mark}


def _layouts_before(node: Node, number: int, layout: Layout) -> Sequence[Layout]:
    try:
        return operand_layouts(node, number, layout)
    except UnsupportedLayoutError as error:
        raise _EndsError(Unfollowed(str(error), node)) from error


def _at(node: Node | None) -> str:
    return "" if node is None else f" ({node.primitive} at {node.source})"
