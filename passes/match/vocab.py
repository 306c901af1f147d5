"""Whether a weight product is a vocabulary projection, by what becomes of its output, and why it is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from hire_xform.passes.ir.graph import Node
from hire_xform.passes.match.matches import VocabMatch
from hire_xform.passes.match.output_axis import Fate
from hire_xform.passes.match.readers import readers_of
from hire_xform.passes.match.region import Unfollowed
from hire_xform.passes.weights.cut_weights import is_cut, parts_of_rows
from hire_xform.passes.weights.products import Product

# A vocabulary is at least this many times as wide as the activation that is projected to it.
WIDE = 2


@dataclass(frozen=True, repr=False)
class Nearly:
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


def vocabulary(product: Product, fate: Fate, looked_up: frozenset[int]) -> VocabMatch:
    """The match of a product that is a vocabulary projection by its shape.

    Args:
      product, fate: the product, and what becomes of its output.
      looked_up: how many rows the weights have that the program looks rows up in by id.
    """
    readers = readers_of(product, fate)
    read = next((r for r in readers if r.kind != "returned" and r.wants > 0), None)
    evidence = ""
    if read is not None:
        evidence = f"{read.where} reads it"
    elif whole_width(product) in looked_up and any(r.kind != "returned" or r.wants > 0 for r in readers):
        evidence = f"{whole_width(product):,} rows of a weight are looked up by id"
    wanted = (r for r in readers if r.kind != "returned" and (r.wants < 0 or (r.inverted and not r.slope)))
    smallest = next((r.where for r in wanted), "")
    return VocabMatch(product, fate, tuple(readers), evidence, smallest)


def combined_from(vocabularies: list[tuple[Product, Fate]]) -> dict[Product, str]:
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


def whole_width(product: Product) -> int:
    """Outputs per token, over all devices of a shard_map around it."""
    refs = product.origin.refs
    return product.width * (parts_of_rows(product.rows_free(), refs) if is_cut(refs) else 1)


def is_wide(product: Product) -> bool:
    """Whether a product's output is wide enough, beside its input, for a vocabulary."""
    return whole_width(product) >= WIDE * product.contracted


BATCHED = "its weight has a batch dimension (experts or stacked layers): one product for each, which is not followed"


def not_vocabulary(
    product: Product,
    fate: Fate,
    by_node: dict[Node, Product],
    leads: Nearly | None = None,
    nearly: str | None = None,
    unfollowed: Mapping[Product, Unfollowed] = MappingProxyType({}),
) -> str | None:
    """Why a product outside any block is no vocabulary projection; None when it is one.

    Args:
      product, fate: the product, and what becomes of its output.
      by_node: all products.
      leads: of one that leads to what is nearly a block, that.
      nearly: of one that nearly ends a block, why it does not.
      unfollowed: of products that end no block, why nothing points to one.
    """
    if product.w_batch:
        return BATCHED
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
        if event[1] in by_node and by_node[event[1]].w_batch:
            return (
                f"its output is {how} {event[1].path} at {where}, whose weight has a batch dimension (experts or "
                "stacked layers): one product for each, which is not followed"
            )
        if event[1] in by_node and nearly is not None:
            return nearly
        if event[1] in by_node:
            why = unfollowed.get(by_node[event[1]])
            there = "" if why is None else f": there, {why}"
            return (
                f"its output is {how} another product at {where}, a weight's as well, but the two make no block{there}"
            )
        return f"its output is {how} another product at {where}, not pointwise and not a weight's"
    mixed = fate.first("mixed", "opaque")
    if mixed is not None and mixed[1] is not None:
        node = mixed[1]
        return f"its output axis goes into {node.primitive} at {node.source}, which is not followed"
    if not fate.intact:
        return "its output axis is split or merged, as attention heads are"
    if not is_wide(product):
        return (
            f"its output is {product.width} wide for {product.contracted} inputs: too narrow for a vocabulary, and "
            "not part of a feed-forward block" + (f": {unfollowed[product]}" if product in unfollowed else "")
        )
    if not fate.events:
        return "its output is not used"
    return None
