"""Finds dense feed-forward blocks and vocabulary projections, and says of every other weight product why it is neither.

Detection is structural and knows no sizes, settings or platforms: what is done with a match is the planner's affair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as prims

from hire_xform.passes import compat
from hire_xform.passes.expand import may_follow_product, trace_region
from hire_xform.passes.follow import Fate, follow
from hire_xform.passes.layout import Layout, row_major, whole
from hire_xform.passes.lookups import Lookup, find_lookups
from hire_xform.passes.parts import is_cut, parts_of_rows
from hire_xform.passes.pointwise import STEPS
from hire_xform.passes.probe import Probe
from hire_xform.passes.products import Product, find_products, matrix, normal_form, widened_at_once
from hire_xform.passes.provenance import Provenance, Recipe, Reshape, Root, Slice, Transpose
from hire_xform.passes.readers import Reader, larger_summand, readers_of, rows_looked_up
from hire_xform.passes.region import Apply, Region, Up
from hire_xform.passes.walk import Frame, Graph, Node, Value

# A vocabulary is at least this many times as wide as the activation that is projected to it.
WIDE = 2


@dataclass(frozen=True, eq=False, repr=False)
class VocabMatch:
    """A vocabulary projection: ``product`` maps ``[T, d]`` to ``[T, V]``.

    Attributes:
      product: the product.
      fate: what becomes of its output.
      readers: what takes its logits as a whole.
      evidence: what says that they are logits; empty where nothing does.
      smallest: what reads the smallest of them, where candidates are the largest; empty where nothing does.
    """

    product: Product
    fate: Fate
    readers: tuple[Reader, ...] = ()
    evidence: str = ""
    smallest: str = ""

    @property
    def node(self) -> Node:
        """The equation whose result is replaced."""
        return self.product.node

    @property
    def products(self) -> list[Product]:
        """All its products."""
        return [self.product]

    @property
    def out_dtype(self) -> np.dtype:
        """dtype of the logits: the product's, or what all that reads it widens it to.

        XLA leaves out the rounding of a product that is widened at once, so it is computed unrounded here, too.
        """
        return widened_at_once(self.product)

    @property
    def units(self) -> int:
        """Rows to choose from, V."""
        return self.product.width


@dataclass(frozen=True, eq=False, repr=False)
class FfnMatch:
    """A feed-forward block: products into ``units`` hidden units, a pointwise region, a product that contracts them.

    Attributes:
      down: the contracting product.
      hidden: its activation operand.
      layout: layout of ``hidden``.
      region: what lies between.
      tokens: T.
      units: m.
    """

    down: Product
    hidden: Value
    layout: Layout
    region: Region
    tokens: int
    units: int

    @property
    def node(self) -> Node:
        """The equation whose result is replaced."""
        return self.down.node

    @property
    def products(self) -> list[Product]:
        """All its products, each once."""
        return list(dict.fromkeys([*(up.product for up in self.region.ups), self.down]))

    def down_rows(self) -> Recipe:
        """The contracting weight as ``[m, d_out]``."""
        order = sorted(range(len(self.down.x_contract)), key=lambda i: self.down.x_contract[i])
        return self.down.rows_contracted(tuple(order))


def up_rows(up: Up) -> Recipe:
    """The weight of a product into the hidden units as ``[m, d]``, units in canonical order, cut to those used."""
    product = up.product
    dims = [up.layout[d] for d in product.out_w_dims]
    atoms = [a for d in dims for a in d.atoms]
    order = sorted(range(len(atoms)), key=lambda i: -atoms[i].stride)
    if all(d.full for d in dims) and order == list(range(len(atoms))):
        return product.rows_free()
    recipe, shape = product.origin.recipe, product.weight.shape
    start, limit, strides = [0] * len(shape), list(shape), [1] * len(shape)
    for axis, dim in zip(product.w_free, dims, strict=True):
        start[axis], limit[axis] = dim.start, dim.start + dim.step * (dim.size - 1) + 1
        strides[axis] = dim.step
    recipe = recipe.then(Slice(tuple(start), tuple(limit), tuple(strides)))
    sizes = [a.size for a in atoms]
    contracted = [shape[d] for d in product.w_contract]
    recipe = recipe.then(
        Transpose((*product.w_free, *product.w_contract)),
        Reshape((*sizes, *contracted)),
        Transpose((*order, *range(len(sizes), len(sizes) + len(contracted)))),
        Reshape((math.prod(sizes), math.prod(contracted))),
    )
    return normal_form(recipe)


def vocab_rows(match: VocabMatch) -> Recipe:
    """The weight of a vocabulary projection as ``[V, d]``."""
    product = match.product
    return matrix(product.origin.recipe, product.weight.shape, product.w_free, product.w_contract)


@dataclass(frozen=True, repr=False)
class Rejection:
    """A weight product that is no match, and why.

    Attributes:
      node: the equation.
      product: the product; None of one that has no weight in normal form.
      reason: why.
      read: the weights of one without, and the bytes of each that a call reads.
    """

    node: Node
    product: Product | None
    reason: str
    read: dict[Root, int] = field(default_factory=dict)

    @property
    def weights_read(self) -> dict[Root, int]:
        """Its weights, and the bytes of each that a call reads."""
        if self.product is None:
            return self.read
        return {self.product.origin.recipe.root: self.product.nbytes * self.node.scope.iterations}


@dataclass(frozen=True, repr=False)
class Detection:
    """All that was found in a graph, in program order, which is ``order``."""

    matches: list[VocabMatch | FfnMatch]
    rejections: list[Rejection]
    products: list[Product]
    order: dict[Node, int]
    lookups: list[Lookup]


def detect(graph: Graph, provenance: Provenance) -> Detection:
    """Finds all matches; every weight product is in exactly one match or one rejection."""
    products, loose = find_products(graph, provenance)
    by_node = {p.node: p for p in products}
    order = {node: i for i, node in enumerate(graph.program_order())}
    taken: set[Product] = set()
    matches: list[VocabMatch | FfnMatch] = []
    reasons: dict[Product, str] = {}
    leads: dict[Product, _Nearly] = {}
    probe = Probe()
    for product in products:
        found = _ffn(product, by_node, taken, probe)
        if isinstance(found, FfnMatch):
            matches.append(found)
            taken.update(found.products)
        elif found is not None:
            reasons.setdefault(product, found.reason)
            for first in found.ups:
                leads.setdefault(first, found)
    vocabularies: list[tuple[Product, Fate]] = []
    for product in products:
        if product in taken:
            continue
        fate = follow(product, narrow=not _is_wide(product))
        reason = _not_vocabulary(product, fate, by_node, leads.get(product))
        if reason is None and (reason := larger_summand(product, fate)) is not None:
            reasons[product] = reason
        elif reason is None:
            vocabularies.append((product, fate))
        elif product not in reasons or fate.first("contracted", "multiplied") is not None:
            # What follows a product says more than what leads to it: an attention projection is named as one.
            reasons[product] = reason
    combined = _combined(vocabularies)
    reasons.update(combined)
    alone = [(product, fate) for product, fate in vocabularies if product not in combined]
    looked_up = rows_looked_up(graph, provenance) if alone else frozenset()
    matches += [_vocabulary(product, fate, looked_up) for product, fate in alone]
    taken.update(product for product, _ in alone)
    rejections = [Rejection(p.node, p, reasons[p]) for p in products if p not in taken]
    rejections += [Rejection(item.node, None, item.reason, item.read) for item in loose]
    rejections.sort(key=lambda r: order[r.node])
    matches.sort(key=lambda m: order[m.node])
    return Detection(matches, rejections, products, order, find_lookups(graph, provenance))


def _vocabulary(product: Product, fate: Fate, looked_up: frozenset[int]) -> VocabMatch:
    readers = readers_of(product, fate)
    read = next((r for r in readers if r.kind != "returned" and r.wants > 0), None)
    evidence = ""
    if read is not None:
        evidence = f"{read.where} reads it"
    elif _whole_width(product) in looked_up and any(r.kind != "returned" or r.wants > 0 for r in readers):
        evidence = f"{_whole_width(product):,} rows of a weight are looked up by id"
    wanted = (r for r in readers if r.kind != "returned" and (r.wants < 0 or (r.inverted and not r.slope)))
    smallest = next((r.where for r in wanted), "")
    return VocabMatch(product, fate, tuple(readers), evidence, smallest)


def _combined(vocabularies: list[tuple[Product, Fate]]) -> dict[Product, str]:
    """Of vocabulary projections whose logits meet in one pointwise equation, all but the largest, and why.

    Each has candidates of its own, so with two of them hardly any entry of what they make together would be exact.
    """
    reasons: dict[Product, str] = {}
    ranked = sorted(vocabularies, key=lambda pair: -pair[0].nbytes)
    for i, (product, fate) in enumerate(ranked):
        for larger, theirs in ranked[:i]:
            both = (n for n in fate.joins if n in theirs.joins and fate.joins[n].isdisjoint(theirs.joins[n]))
            meet = next(both, None)
            if meet is not None and larger not in reasons:
                reasons[product] = (
                    f"its output meets that of {larger.path} in {meet.primitive} at {meet.source}: the candidates of "
                    "one are not those of the other, so this one is computed whole"
                )
                break
    return reasons


@dataclass(frozen=True, repr=False)
class _Nearly:
    """What is no block, though it looks like one.

    Attributes:
      down: what would be its last product.
      reason: why it is none.
      ups: the products that lead to it.
      quantised: True where that is because its activations are quantised at run time.
    """

    down: Product
    reason: str
    ups: tuple[Product, ...] = ()
    quantised: bool = False


def _ffn(down: Product, by_node: dict[Node, Product], taken: set[Product], probe: Probe) -> FfnMatch | _Nearly | None:
    """The block that ends in ``down``, or what is nearly one; None when nothing points to one."""
    if down in taken or not down.width or not down.contracted or not down.tokens:
        return None
    hidden = down.x
    if down.batched:
        return _Nearly(down, _BATCHED)
    if not may_follow_product(down, by_node):
        return None
    layout: list = [None] * len(hidden.shape)
    for dims, space in ((down.x_free, "t"), (sorted(down.x_contract), "h")):
        sizes = [hidden.shape[d] for d in dims]
        for d, atom in zip(dims, row_major(space, sizes), strict=True):
            layout[d] = whole([atom], hidden.shape[d])
    region = trace_region(down, tuple(layout), by_node, probe)
    if region is None:
        return None
    leak = _leak(region, hidden, down) or _lost_derivative(region, down)
    if _is_linear(region):
        if leak is not None:
            return None  # a residual stream, not nearly a block
        if _factored(region, down):
            how = "nothing nonlinear lies between it and the product it follows: one matrix in two factors"
            return _Nearly(down, how)
    ups = tuple(up.product for up in region.ups)
    if leak is not None:
        return _Nearly(down, leak, ups, not jnp.issubdtype(hidden.aval.dtype, jnp.floating))
    blocked = next((up.product for up in region.ups if up.product in taken), None)
    if blocked is not None:
        return _Nearly(down, f"the product it follows, {blocked.path}, already belongs to another block", ups)
    return FfnMatch(down, hidden, tuple(layout), region, down.tokens, region.units)


def _leak(region: Region, hidden: Value, down: Product) -> str | None:
    """Why the hidden units can't be left out: something besides the block reads them."""
    quantised = not jnp.issubdtype(hidden.aval.dtype, jnp.floating)
    for value in sorted(region.inner, key=lambda v: v.node.path if v.node else ""):
        for node in value.consumers:
            if node not in region.nodes and node is not down.node:
                if quantised:
                    return (
                        f"what it contracts is quantised at run time to {hidden.aval.dtype}, and {node.primitive} at "
                        f"{node.source} reads all units for the scale"
                    )
                return (
                    f"what it contracts is also read by {node.primitive} at {node.source}"
                    if value is hidden
                    else f"an activation on the way to it is also read by {node.primitive} at {node.source}"
                )
        if value.is_output:
            return "what it contracts is also returned, so every unit of it is needed"
    return None


def _lost_derivative(region: Region, down: Product) -> str | None:
    """Why a block that a custom_vjp stands in the middle of stays: the rewrite would drop the derivative it states."""
    around = set(down.node.frame.ancestors())
    for frame in down.node.frame.ancestors():
        outside = any(frame not in node.frame.ancestors() for node in region.nodes)
        if outside and frame.kind == "custom" and not _keeps_derivative(frame):
            return _partly_inside(frame)
    for node in sorted(region.nodes, key=lambda n: n.path):
        for frame in node.frame.ancestors():
            if frame in around:
                break
            if frame.kind == "custom" and not _keeps_derivative(frame):
                return _partly_inside(frame)
    return None


def _partly_inside(frame: Frame) -> str:
    return (
        f"part of the block is inside the {frame.eqn.primitive} at {compat.source_line(frame.eqn)}, whose own "
        "derivative would be lost; put the whole block inside it, or none"
    )


def _keeps_derivative(frame: Frame) -> bool:
    """True when the derivative of a custom call's body, which a replay has, is as good as the one it states.

    A stated derivative makes ReLU's zero at zero and softplus's finite far out; those are kept. One stated for a body
    that has none (a sign, a rounding) or that changes nothing means something else, and would be lost.
    """
    if frame.eqn.primitive is prims.custom_vjp_call_p:
        return False
    inside = _nodes(frame)
    return bool(inside) and not any(n.primitive in STEPS for n in inside)


def _is_linear(region: Region) -> bool:
    """True when the activation is a weighted sum of the products into the units, with no function of them between."""
    if region.own is not None:
        return False
    depends: list[bool] = []
    for e in region.exprs:
        if not isinstance(e, Apply):
            depends.append(isinstance(e, Up))
            continue
        hidden = [depends[o] for o in e.operands]
        p = e.node.primitive
        scaled = hidden.count(True) == 1 and (p is prims.mul_p or (p is prims.div_p and hidden[0]))
        if p not in _SUMS and not scaled:
            return False
        depends.append(True)
    return True


_SUMS = frozenset({prims.add_p, prims.sub_p, prims.neg_p, prims.convert_element_type_p, prims.copy_p})


def _factored(region: Region, down: Product) -> bool:
    """True when the two products of a linear region are one matrix in two factors.

    The projection of a narrower embedding before the vocabulary is that, and a low-rank update: the units between are
    no more than the inputs, or the second factor makes a vocabulary. Every unit is needed, and what follows the second
    factor decides what it is.
    """
    if all(_whole_width(up.product) <= up.product.contracted for up in region.ups):
        return True
    return _is_wide(down) and _not_vocabulary(down, follow(down, narrow=False), {}) is None


def _whole_width(product: Product) -> int:
    """Outputs per token, over all devices of a shard_map around it."""
    refs = product.origin.refs
    return product.width * (parts_of_rows(product.rows_free(), refs) if is_cut(refs) else 1)


def _is_wide(product: Product) -> bool:
    return _whole_width(product) >= WIDE * product.contracted


def _nodes(item: Node | Frame) -> list[Node]:
    return [item] if isinstance(item, Node) else [n for inner in item.items for n in _nodes(inner)]


_BATCHED = "its weight has a batch dimension (experts or stacked layers): one product for each, which is not followed"


def _not_vocabulary(
    product: Product, fate: Fate, by_node: dict[Node, Product], leads: _Nearly | None = None
) -> str | None:
    """Why a product outside any block is no vocabulary projection; None when it is one.

    Args:
      product, fate: the product, and what becomes of its output.
      by_node: all products.
      leads: of one that leads to what is nearly a block, that.
    """
    if product.batched:
        return _BATCHED
    if not product.width or not product.contracted or not product.tokens:
        return "it is empty"
    event = fate.first("contracted", "multiplied")
    if event is not None and event[1] is not None:
        if leads is not None and (leads.quantised or fate.first("reduced", "mixed", "returned") is None):
            return f"it leads to {leads.down.path}, with which it makes no block: there, {leads.reason}"
        how = "contracted by" if event[0] == "contracted" else "an operand of"
        mixing = fate.first("reduced", "mixed", "gathered", "moved")
        if mixing is not None and mixing[1] is not None:
            node = mixing[1]
            return f"its output axis is mixed by {node.primitive} at {node.source} and then {how} another product"
        if fate.first("returned") is not None:
            return "its output is returned as well as contracted, so every unit of it is needed"
        where = event[1].source
        if event[1] in by_node and by_node[event[1]].batched:
            return (
                f"its output is {how} {event[1].path} at {where}, whose weight has a batch dimension (experts or "
                "stacked layers): one product for each, which is not followed"
            )
        if event[1] in by_node:
            return f"its output is {how} another product at {where}, a weight's as well, but the two make no block"
        return f"its output is {how} another product at {where}, not pointwise and not a weight's"
    mixed = fate.first("mixed", "opaque")
    if mixed is not None and mixed[1] is not None:
        node = mixed[1]
        return f"its output axis goes into {node.primitive} at {node.source}, which is not followed"
    if not fate.intact:
        return "its output axis is split or merged, as attention heads are"
    if not _is_wide(product):
        return (
            f"its output is {product.width} wide for {product.contracted} inputs: too narrow for a vocabulary, and "
            "not part of a feed-forward block"
        )
    if not fate.events:
        return "its output is not used"
    return None
