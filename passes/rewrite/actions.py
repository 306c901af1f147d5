"""What is done at an equation: a decision of the plan, a dense product that reads a packed layout, a top-k."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from hire_xform.passes.ir.graph import Node
from hire_xform.passes.match.matches import Detection
from hire_xform.passes.plan.decisions import Decision, Need, PackKey, Plan
from hire_xform.passes.plan.needs import leaf_needs
from hire_xform.passes.plan.row_order import other_rows
from hire_xform.passes.rewrite.cyclic_lookups import CyclicLookup, cyclic_lookups
from hire_xform.passes.rewrite.merge_top_k import Merged, merged
from hire_xform.passes.rewrite.top_groups import TopGroups
from hire_xform.passes.weights.products import Product, normal_form
from hire_xform.passes.weights.provenance import Root


@dataclass(frozen=True, eq=False, repr=False)
class DenseRows:
    """A dense product whose weight leaf is not there, computed from its packed rows.

    Attributes:
      product: the product.
      needs: the one packed form it reads.
      contracted_first: True when the rows are ``[contracted, width]``, False for ``[width, contracted]``.
    """

    product: Product
    needs: tuple[Need, ...]
    contracted_first: bool

    @property
    def node(self) -> Node:
        """The equation whose result is replaced."""
        return self.product.node


Treatment = Decision | DenseRows | TopGroups | Merged | CyclicLookup


def treatments(
    detection: Detection,
    plan: Plan,
    has_leaf: Callable[[Root], bool],
    has_key: Callable[[PackKey], bool],
) -> dict[Node, Treatment]:
    """What to do at each equation, given which leaves and packed forms will be there at run time.

    A decision whose packed forms are not all there takes those of rows that lie otherwise. Where these are not there
    either, it is left out: its products are then dense. A certified decision reads the leaves of its products besides,
    where all of them are there. Dense products whose leaf is not there read packed rows
    instead, where some fit, and so do lookups.
    """

    def there(need: Need) -> bool:
        key = need.key
        return has_key(key) or (key.form == "rows" and key.recipe.is_leaf and has_leaf(key.recipe.root))

    found: dict[Node, Treatment] = {}
    for decision in plan.decisions:
        for one in (decision, other_rows(decision)):
            if one is not None and all(there(n) for n in one.needs):
                found[one.node] = _with_leaves(one, has_leaf)
                break
    decisions = [one for one in found.values() if isinstance(one, Decision)]
    treated = {p for decision in decisions for p in decision.match.products}
    found.update((one.node, one) for one in merged(decisions))
    absent = [one for one in detection.lookups if not has_leaf(one.origin.recipe.root)]
    found.update((one.node, one) for one in cyclic_lookups(absent, decisions))
    for product in detection.products:
        if product in treated or has_leaf(product.origin.recipe.root) or product.batched:
            continue
        for contracted_first, recipe in ((False, product.rows_free()), (True, product.rows_contracted())):
            key = PackKey(normal_form(recipe.as_stored), "rows")
            if has_key(key):
                found[product.node] = DenseRows(product, (Need(key, product.origin.refs),), contracted_first)
                break
    return found


def _with_leaves(decision: Decision, has_leaf: Callable[[Root], bool]) -> Decision:
    """A certified decision with the leaves of its products, so that it falls back to them; as it is without one."""
    if not decision.settings.certify or decision.placement is not None:
        return decision
    leaves = leaf_needs(decision.match)
    if not all(has_leaf(need.key.recipe.root) for need in leaves):
        return decision
    return dataclasses.replace(decision, needs=(*decision.needs, *leaves), leaves=len(leaves))
