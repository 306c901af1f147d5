"""Finds feed-forward blocks of experts: one block for each of several matrices of a stack.

Their products have a batch dimension: over all experts, as an einsum or a ``vmap`` over them has it, or over those that
a router gave to each token, whose matrices are gathered first. Or they are ragged: rows are in order of their experts.
The experts' axes are followed as digits of the token index, the leading ones, so that all experts' tokens together make
a block like any other, but for its weights.
``passes/rewrite/experts.py`` makes a loop over experts of it, whose body is an ordinary block.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jax.extend.core import primitives as prims

from hire_xform.passes.ir import compat
from hire_xform.passes.ir.axes import Atom, Dim, Layout, UnsupportedLayoutError, operand_layouts, row_major, whole
from hire_xform.passes.ir.axis_rules import moves_only
from hire_xform.passes.ir.graph import Graph, Node, Operand, Value
from hire_xform.passes.match.block_region import trace_region
from hire_xform.passes.match.ffn import is_linear, leak, lost_derivative
from hire_xform.passes.match.matches import FfnMatch
from hire_xform.passes.match.probe import Probe
from hire_xform.passes.match.region import Apply, Number, Side, Unfollowed, Up
from hire_xform.passes.weights.origins import picks_matrix, shape_of
from hire_xform.passes.weights.products import Product, product_with
from hire_xform.passes.weights.provenance import Provenance


@dataclass(frozen=True, eq=False, repr=False)
class Routed:
    """Matrices of a stack that are gathered by indices, as many as there are, or that a ragged product takes.

    Attributes:
      taken_by: the gather, or the ragged product.
      dtypes: what they are cast to on the way to the product, one after the other.
      layout: where the gather's result has the dimensions of the product's weight, each a space of its own.
      nodes: the gather, and the equations from it to the product.
    """

    taken_by: Node
    dtypes: tuple[Any, ...]
    layout: Layout
    nodes: tuple[Node, ...]

    @property
    def ragged(self) -> bool:
        """Whether there are no indices, but rows in order of their experts, and how many each expert has."""
        return self.taken_by.primitive is compat.RAGGED_DOT

    @property
    def stack(self) -> Operand:
        """All matrices."""
        return self.taken_by.inputs[1 if self.ragged else 0]

    @property
    def by(self) -> Operand:
        """The indices; of a ragged product how many rows each expert has."""
        return self.taken_by.inputs[2 if self.ragged else 1]

    @property
    def matrix_dims(self) -> tuple[int, ...]:
        """The dimensions of what is taken that are those of a matrix."""
        return (1, 2) if self.ragged else tuple(self.taken_by.params["dimension_numbers"].offset_dims)

    @property
    def batch_dims(self) -> list[int]:
        """The others: those of the indices."""
        return [d for d in range(len(self.layout)) if d not in self.matrix_dims]

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
    def routed(self) -> bool:
        """Whether its experts are those of tokens, not all that there are."""
        return self.weights[-1].routed is not None

    @property
    def nodes(self) -> set[Node]:
        """All equations that are replaced."""
        return self.match.nodes.union(*(w.routed.nodes for w in self.weights if w.routed is not None))


def find_experts(
    graph: Graph, provenance: Provenance, products: Sequence[Product]
) -> tuple[list[Experts], dict[Node, str]]:
    """The blocks of experts of a program, in its order, and why products that nearly end one do not.

    Args:
      graph: the program.
      provenance: its weights.
      products: those of data with one of its weights, as detection has them.
    """
    by_node = {product.node: product for product in products}
    routed = {product.node: (product, how) for product, how in _routed_products(graph, provenance, by_node)}
    by_node.update((node, product) for node, (product, _) in routed.items())
    gathers = {node: how for node, (_, how) in routed.items()}
    found: list[Experts] = []
    reasons: dict[Node, str] = {}
    taken: set[Product] = set()
    probe = Probe()
    for node in graph.program_order():
        down = by_node.get(node)
        if down is None or not (down.w_batch or node in gathers) or down in taken:
            continue
        experts = _ending_in(down, by_node, gathers, probe)
        if isinstance(experts, str):
            reasons[node] = experts
        elif experts is not None and taken.isdisjoint(experts.match.products):
            found.append(experts)
            taken.update(experts.match.products)
    return found, reasons


def _routed_products(graph: Graph, provenance: Provenance, known: Container[Node]) -> Iterator[tuple[Product, Routed]]:
    """Products with gathered matrices of a weight, which are derived of it, and how they are gathered."""
    for node in graph.program_order():
        if node.primitive is compat.RAGGED_DOT and (ragged := _ragged(node, provenance)) is not None:
            yield ragged
        if node.primitive is not prims.dot_general_p or node in known:
            continue
        for number, operand in enumerate(node.inputs):
            other = node.inputs[1 - number]
            if not isinstance(operand, Value) or not isinstance(other, Value) or provenance.origin(other) is not None:
                continue
            if provenance.origin(operand) is not None or (how := _gathered(operand)) is None:
                continue
            origin = provenance.origin(how.stack)
            if origin is not None:
                yield product_with(node, number == 0, origin), how
                break


def _ragged(node: Node, provenance: Provenance) -> tuple[Product, Routed] | None:
    """A product of rows ``[n, d]``, in order of their experts, with matrices ``[E, d, m]``."""
    x, stack, *_ = node.inputs
    origin = provenance.origin(stack)
    numbers = node.params["ragged_dot_dimension_numbers"]
    plain = numbers.dot_dimension_numbers == (((1,), (1,)), ((), ())) and tuple(numbers.lhs_ragged_dimensions) == (0,)
    if not plain or tuple(numbers.rhs_group_dimensions) != (0,) or node.params["group_offset"] is not None:
        return None
    if origin is None or not isinstance(x, Value) or not isinstance(stack, Value) or len(shape_of(node.inputs[2])) != 1:
        return None
    if provenance.origin(x) is not None:
        return None
    layout = tuple(Dim((Atom(str(d), 1, size),), size) for d, size in enumerate(stack.shape))
    product = Product(
        node=node,
        x=x,
        weight=stack,
        origin=origin,
        weight_left=False,
        x_contract=(1,),
        w_contract=(1,),
        x_free=(),
        w_free=(2,),
        x_batch=(0,),
        w_batch=(0,),
    )
    return product, Routed(node, (), layout, (node,))


def _gathered(weight: Value) -> Routed | None:
    """How a value is gathered, whole matrices each; None when it is not."""
    nodes: list[Node] = []
    value: Operand = weight
    while isinstance(value, Value) and (node := value.node) is not None:
        nodes.append(node)
        if node.primitive is prims.gather_p:
            break
        if node.primitive is not prims.convert_element_type_p and not moves_only(node):
            return None
        value = node.inputs[0]
    else:
        return None
    layout: Layout = tuple(whole([Atom(str(d), 1, size)], size) for d, size in enumerate(weight.shape))
    dtypes = []
    for between in nodes[:-1]:
        if between.primitive is prims.convert_element_type_p:
            dtypes.append(between.params["new_dtype"])
            continue
        try:
            layout = operand_layouts(between, 0, layout)[0]
        except UnsupportedLayoutError:
            return None
    numbers = node.params["dimension_numbers"]
    if numbers.operand_batching_dims or not picks_matrix(node) or not all(dim.full for dim in layout):
        return None
    found = Routed(node, tuple(reversed(dtypes)), layout, tuple(nodes))
    offsets = {atom.space for d in numbers.offset_dims for atom in layout[d].atoms}
    return None if offsets & {str(d) for d in found.routed} else found


def _ending_in(
    down: Product, by_node: dict[Node, Product], gathers: dict[Node, Routed], probe: Probe
) -> Experts | str | None:
    """The block of experts that ends in a product; why what is nearly one is none; None where nothing points to one."""
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
    if isinstance(region, Unfollowed):
        return None
    if is_linear(region):
        return "nothing nonlinear lies between its products"
    if region.own is not None or not all(isinstance(e, (Up, Side, Number, Apply)) for e in region.exprs):
        return "its units are mixed, or chosen by the model itself"
    if (why := leak(region, down.x, [down]) or lost_derivative(region, down)) is not None:
        return why
    match = FfnMatch(down, down.x, layout, region, tokens, region.units)
    if any(node.scope is not down.node.scope for node in match.nodes):
        return "its products stand in the bodies of different loops"
    if any(scope.kind == "shard_map" for scope in down.node.scope.chain()):
        return "it stands in a shard_map, whose devices have experts of their own"
    each = tokens // count
    made = [_up_weight(up, each, count, gathers.get(up.product.node)) for up in region.ups]
    made.append(_down_weight(down, layout, each, count, gathers.get(down.node)))
    if len({weight.routed.by for weight in made if weight is not None and weight.routed and weight.routed.ragged}) > 1:
        return "its ragged products have groups of their own"
    weights = tuple(weight for weight in made if weight is not None)
    summed = tuple((size, added) for size, (_, added) in zip(sizes, own, strict=True))
    if len(weights) < len(made):
        return "not all of its weights have each of its experts once"
    return Experts(match, count, weights, summed)


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
    # A ragged product has rows, where its weight has experts.
    sizes = (count, *product.weight.shape[1:]) if routed is not None and routed.ragged else product.weight.shape
    whole_dims = all(math.prod(a.size for a in atoms) == n for atoms, n in zip(dims, sizes, strict=True))
    if held != count or not whole_dims:
        return None
    if routed is not None:
        own = {d for d, atoms in enumerate(dims) if any(a.space == "t" for a in atoms)}
        pure = all(all(a.space == "t" for a in dims[d]) for d in own)
        if not pure or not own <= routed.routed or any(dims[d] and d not in own for d in routed.routed):
            return None
    return ExpertWeight(product, dims, routed)
