"""Finds feed-forward blocks of experts: one block for each of several matrices of a stack.

Their products have a batch dimension: over all experts, as an einsum or a ``vmap`` over them has it, or over those that
a router gave to each token, whose matrices are gathered first. The experts' axes are followed as digits of the token
index, the leading ones, so that all experts' tokens together make a block like any other, but for its weights.
``passes/rewrite/experts.py`` makes a loop over experts of it, whose body is an ordinary block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jax.extend.core import primitives as prims

from hire_xform.passes.ir.axes import Atom, Dim, Layout, UnsupportedLayoutError, operand_layouts, row_major, whole
from hire_xform.passes.ir.axis_rules import moves_only
from hire_xform.passes.ir.graph import Graph, Node, Value
from hire_xform.passes.match.block_region import trace_region
from hire_xform.passes.match.ffn import is_linear, leak, lost_derivative
from hire_xform.passes.match.matches import FfnMatch
from hire_xform.passes.match.probe import Probe
from hire_xform.passes.match.region import Apply, Number, Side, Unfollowed, Up
from hire_xform.passes.weights.origins import picks_matrix
from hire_xform.passes.weights.products import Product, product_with
from hire_xform.passes.weights.provenance import Provenance


@dataclass(frozen=True, eq=False, repr=False)
class Routed:
    """Matrices of a stack that are gathered by indices, as many as there are.

    Attributes:
      gather: the equation.
      dtypes: what they are cast to on the way to the product, one after the other.
      layout: where the gather's result has the dimensions of the product's weight, each a space of its own.
      nodes: the gather, and the equations from it to the product.
    """

    gather: Node
    dtypes: tuple[Any, ...]
    layout: Layout
    nodes: tuple[Node, ...]

    @property
    def batch_dims(self) -> list[int]:
        """The dimensions of the gather's result that are those of its indices."""
        offsets = self.gather.params["dimension_numbers"].offset_dims
        return [d for d in range(len(self.layout)) if d not in offsets]

    @property
    def routed(self) -> set[int]:
        """The dimensions of the product's weight that are those of the indices."""
        return {int(atom.space) for d in self.batch_dims for atom in self.layout[d].atoms}


@dataclass(frozen=True, eq=False, repr=False)
class ExpertWeight:
    """The weight of a product of experts.

    Attributes:
      product: the product.
      atoms: for each of its dimensions the digits of the expert ("t"), of the units ("h") or of the other side ("c").
      routed: where it is gathered.
    """

    product: Product
    atoms: tuple[tuple[Atom, ...], ...]
    routed: Routed | None


@dataclass(frozen=True, eq=False, repr=False)
class Experts:
    """A feed-forward block for each of ``count`` experts.

    Attributes:
      match: the block of all their tokens, those of the first expert first.
      count: how many there are.
      weights: those of its products, the contracting one last.
      summed: for each axis of the experts its length, and whether the contracting product adds its entries up.
    """

    match: FfnMatch
    count: int
    weights: tuple[ExpertWeight, ...]
    summed: tuple[tuple[int, bool], ...]

    @property
    def nodes(self) -> set[Node]:
        """All equations that are replaced."""
        return self.match.nodes.union(*(w.routed.nodes for w in self.weights if w.routed is not None))


def find_experts(graph: Graph, provenance: Provenance, products: Sequence[Product]) -> list[Experts]:
    """The blocks of experts of a program, in its order.

    Args:
      graph: the program.
      provenance: its weights.
      products: those of data with one of its weights, as detection has them.
    """
    routed = {product.node: (product, how) for product, how in _routed_products(graph, provenance)}
    by_node = {product.node: product for product in products}
    by_node.update((node, product) for node, (product, _) in routed.items())
    gathers = {node: how for node, (_, how) in routed.items()}
    found: list[Experts] = []
    taken: set[Product] = set()
    probe = Probe()
    for node in graph.program_order():
        down = by_node.get(node)
        if down is None or not (down.batched or node in gathers) or down in taken:
            continue
        experts = _ending_in(down, by_node, gathers, probe)
        if experts is not None and taken.isdisjoint(experts.match.products):
            found.append(experts)
            taken.update(experts.match.products)
    return found


def _routed_products(graph: Graph, provenance: Provenance) -> Iterator[tuple[Product, Routed]]:
    """Products with gathered matrices of a weight, which are derived of it, and how they are gathered."""
    for node in graph.program_order():
        if node.primitive is not prims.dot_general_p:
            continue
        for number, operand in enumerate(node.inputs):
            other = node.inputs[1 - number]
            if not isinstance(operand, Value) or not isinstance(other, Value) or provenance.origin(other) is not None:
                continue
            if provenance.origin(operand) is not None or (how := _gathered(operand)) is None:
                continue
            origin = provenance.origin(how.gather.inputs[0])
            if origin is not None:
                yield product_with(node, number == 0, origin), how
                break


def _gathered(weight: Value) -> Routed | None:
    """How a value is gathered, whole matrices each; None when it is not."""
    layout: Layout = tuple(whole([Atom(str(d), 1, size)], size) for d, size in enumerate(weight.shape))
    value, dtypes, nodes = weight, [], []
    while True:
        node = value.node
        if node is None:
            return None
        nodes.append(node)
        if node.primitive is prims.gather_p:
            break
        if node.primitive is prims.convert_element_type_p:
            dtypes.append(node.params["new_dtype"])
        elif moves_only(node):
            try:
                layout = operand_layouts(node, 0, layout)[0]
            except UnsupportedLayoutError:
                return None
        else:
            return None
        operand = node.inputs[0]
        if not isinstance(operand, Value):
            return None
        value = operand
    numbers = node.params["dimension_numbers"]
    if numbers.operand_batching_dims or not picks_matrix(node) or not all(dim.full for dim in layout):
        return None
    found = Routed(node, tuple(reversed(dtypes)), layout, tuple(nodes))
    offsets = {atom.space for d in numbers.offset_dims for atom in layout[d].atoms}
    return None if offsets & {str(d) for d in found.routed} else found


def _ending_in(
    down: Product, by_node: dict[Node, Product], gathers: dict[Node, Routed], probe: Probe
) -> Experts | None:
    """The block of experts that ends in a product; None where there is none."""
    if not down.width or not down.contracted or not down.tokens:
        return None
    routed = gathers[down.node].routed if down.node in gathers else set()
    if any(d in routed for d in down.w_free):
        return None
    # Dimensions of the activation that are of the experts, and whether the product adds them up.
    own = [(x, False) for x in down.x_batch]
    own += [(x, True) for x, w in zip(down.x_contract, down.w_contract, strict=True) if w in routed]
    units = sorted(x for x, w in zip(down.x_contract, down.w_contract, strict=True) if w not in routed)
    sizes = [down.x.shape[d] for d, _ in own]
    dims: list[Any] = [None] * len(down.x.shape)
    order = [*(d for d, _ in own), *down.x_free]
    for d, atom in zip(order, row_major("t", [down.x.shape[d] for d in order]), strict=True):
        dims[d] = whole([atom], down.x.shape[d])
    for d, atom in zip(units, row_major("h", [down.x.shape[d] for d in units]), strict=True):
        dims[d] = whole([atom], down.x.shape[d])
    layout, count = tuple(dims), math.prod(sizes)
    tokens = math.prod(down.x.shape[d] for d in order)
    if not units or not tokens:
        return None
    region = trace_region(down, layout, by_node, probe, tokens // count)
    if isinstance(region, Unfollowed) or is_linear(region) or region.own is not None:
        return None
    plain = all(isinstance(e, (Up, Side, Number, Apply)) for e in region.exprs)
    if not plain or leak(region, down.x, [down]) or lost_derivative(region, down):
        return None
    match = FfnMatch(down, down.x, layout, region, tokens, region.units)
    if any(node.scope is not down.node.scope for node in match.nodes):
        return None
    if any(scope.kind == "shard_map" for scope in down.node.scope.chain()):
        return None  # whose devices have experts of their own
    each = tokens // count
    made = [_up_weight(up, each, count, gathers.get(up.product.node)) for up in region.ups]
    made.append(_down_weight(down, layout, each, count, gathers.get(down.node)))
    weights = tuple(weight for weight in made if weight is not None)
    summed = tuple((size, added) for size, (_, added) in zip(sizes, own, strict=True))
    return Experts(match, count, weights, summed) if len(weights) == len(made) else None


def _up_weight(up: Up, each: int, count: int, routed: Routed | None) -> ExpertWeight | None:
    product = up.product
    dims: list[tuple[Atom, ...]] = [()] * len(product.weight.shape)
    outs = (*range(len(product.w_batch)), *product.out_w_dims)
    for d, out in zip((*product.w_batch, *product.w_free), outs, strict=True):
        dims[d] = _of_experts(up.layout[out], each)
    return _checked(product, _with_others(product, dims, product.w_contract), routed, count)


def _down_weight(down: Product, layout: Layout, each: int, count: int, routed: Routed | None) -> ExpertWeight | None:
    dims: list[tuple[Atom, ...]] = [()] * len(down.weight.shape)
    for x, w in zip((*down.x_batch, *down.x_contract), (*down.w_batch, *down.w_contract), strict=True):
        dims[w] = _of_experts(layout[x], each)
    return _checked(down, _with_others(down, dims, down.w_free), routed, count)


def _of_experts(dim: Dim, each: int) -> tuple[Atom, ...]:
    """The digits of a dimension of a weight: of the token index those of the experts lead."""
    return tuple(Atom(a.space, a.stride // each, a.size) if a.space == "t" else a for a in dim.atoms)


def _with_others(product: Product, dims: list[tuple[Atom, ...]], others: Sequence[int]) -> tuple[tuple[Atom, ...], ...]:
    sizes = [product.weight.shape[d] for d in others]
    for d, atom in zip(others, row_major("c", sizes), strict=True):
        dims[d] = (atom,) if atom.size > 1 else ()
    return tuple(dims)


def _checked(
    product: Product, dims: tuple[tuple[Atom, ...], ...], routed: Routed | None, count: int
) -> ExpertWeight | None:
    """The weight, if its dimensions have all of the experts, and gathered ones just those of the indices."""
    held = math.prod(a.size for atoms in dims for a in atoms if a.space == "t")
    whole_dims = all(math.prod(a.size for a in atoms) == n for atoms, n in zip(dims, product.weight.shape, strict=True))
    if held != count or not whole_dims:
        return None
    if routed is not None:
        own = {d for d, atoms in enumerate(dims) if any(a.space == "t" for a in atoms)}
        pure = all(all(a.space == "t" for a in dims[d]) for d in own)
        if not pure or not own <= routed.routed or any(dims[d] and d not in own for d in routed.routed):
            return None
    return ExpertWeight(product, dims, routed)
