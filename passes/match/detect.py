"""Finds dense feed-forward blocks and vocabulary projections, and says of every other weight product why it is neither.

Detection is structural and knows no sizes, settings or platforms: what is done with a match is the planner's affair.
"""

from __future__ import annotations

from hire_xform.passes.ir.debugging import Why, debugging
from hire_xform.passes.ir.graph import Graph
from hire_xform.passes.match.ffn import ffn_ending_in
from hire_xform.passes.match.kinds import finders
from hire_xform.passes.match.matches import Detection, FfnMatch, Match, Rejection
from hire_xform.passes.match.output_axis import Fate, follow
from hire_xform.passes.match.probe import Probe
from hire_xform.passes.match.readers import larger_summand, rows_looked_up
from hire_xform.passes.match.region import Unfollowed
from hire_xform.passes.match.verify import verify_detection
from hire_xform.passes.match.vocab import Nearly, combined_from, is_wide, not_vocabulary, vocabulary
from hire_xform.passes.weights.lookups import find_lookups
from hire_xform.passes.weights.products import Product, find_products
from hire_xform.passes.weights.provenance import Provenance


def detect(graph: Graph, provenance: Provenance) -> Detection:
    """Finds all matches; every weight product is in exactly one match or one rejection."""
    products, loose = find_products(graph, provenance)
    by_node = {p.node: p for p in products}
    order = {node: i for i, node in enumerate(graph.program_order())}
    taken: set[Product] = set()
    matches: list[Match] = []
    reasons: dict[Product, str] = {}
    leads: dict[Product, Nearly] = {}
    unfollowed: dict[Product, Unfollowed] = {}
    updates: set[Product] = set()
    probe, why = Probe(), Why()
    for product in products:
        found = ffn_ending_in(product, by_node, taken, probe)
        if isinstance(found, FfnMatch):
            matches.append(found)
            taken.update(found.products)
            updates.update(found.region.updates)
            outcome = f"yes, that of {', '.join(up.product.path for up in found.region.ups)}"
        elif isinstance(found, Nearly):
            reasons.setdefault(product, found.reason)
            for first in found.ups:
                leads.setdefault(first, found)
            outcome = f"nearly: {found.reason}"
        else:
            unfollowed[product] = found
            outcome = f"no: {found}" if why.asks_for(product.path) else ""
        why.tell(product.path, "ends a feed-forward block", outcome)
    vocabularies: list[tuple[Product, Fate]] = []
    for product in products:
        if product in taken:
            continue
        if product in updates:
            reasons[product] = "it is a low-rank update of a product into hidden units, and read whole beside its rows"
            continue
        fate = follow(product, narrow=not is_wide(product))
        reason = not_vocabulary(product, fate, by_node, leads.get(product), reasons.get(product), unfollowed)
        why.tell(product.path, "is a vocabulary projection by its shape", "yes" if reason is None else f"no: {reason}")
        if reason is None and (reason := larger_summand(product, fate)) is not None:
            reasons[product] = reason
        elif reason is None:
            vocabularies.append((product, fate))
        elif product not in reasons or fate.first("contracted", "multiplied") is not None:
            # What follows a product says more than what leads to it: an attention projection is named as one.
            reasons[product] = reason
    combined = combined_from(vocabularies)
    reasons.update(combined)
    alone = [(product, fate) for product, fate in vocabularies if product not in combined]
    looked_up = rows_looked_up(graph, provenance) if alone else frozenset()
    heads = [vocabulary(product, fate, looked_up) for product, fate in alone]
    taken.update(product for product, _ in alone)
    for head in heads:
        why.tell(head.node.path, "has outputs that are logits", head.evidence or "nothing says so")
    matches += heads
    for find in finders():
        for product in products:
            other = find(product, reasons[product]) if product not in taken else None
            if other is not None and taken.isdisjoint(other.products):
                matches.append(other)
                taken.update(other.products)
    rejections = [Rejection(p.node, p, reasons[p]) for p in products if p not in taken]
    rejections += [Rejection(item.node, None, item.reason, item.read) for item in loose]
    rejections.sort(key=lambda r: order[r.node])
    matches.sort(key=lambda m: order[m.node])
    for rejection in rejections:
        why.tell(rejection.node.path, "refused", rejection.reason)
    found_all = Detection(matches, rejections, products, order, find_lookups(graph, provenance))
    if debugging():
        verify_detection(graph, found_all)
    return found_all
