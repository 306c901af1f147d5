"""What is done at each equation: a decision of the plan, a dense product that reads a packed layout, a top-k."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax import lax

from hire_xform.lowering.primitives.arg_max import arg_max
from hire_xform.passes.ir.graph import Node, Operand
from hire_xform.passes.match.kinds import kind_of
from hire_xform.passes.match.matches import Detection
from hire_xform.passes.match.output_axis import follow
from hire_xform.passes.match.whole_axis import takes_largest
from hire_xform.passes.plan.decisions import Decision, Need, PackKey, Plan
from hire_xform.passes.plan.needs import leaf_needs, rows_need
from hire_xform.passes.plan.row_order import other_rows
from hire_xform.passes.plan.slots import Stored
from hire_xform.passes.rewrite.action import Action, Context
from hire_xform.passes.rewrite.canonical import flat_activation, result_shape
from hire_xform.passes.rewrite.cyclic_lookups import cyclic_lookups
from hire_xform.passes.rewrite.merge_top_k import Merged, merge, merged
from hire_xform.passes.rewrite.site import RewrittenSite, SiteAction
from hire_xform.passes.weights.products import Product
from hire_xform.passes.weights.recipe import Root


@dataclass(frozen=True, eq=False, repr=False)
class DenseRows(Action):
    """A dense product whose weight leaf is not there, computed from its packed rows.

    Attributes:
      product: the product.
      rows: the packed rows.
      contracted_first: True when the rows are ``[contracted, width]``, False for ``[width, contracted]``.
    """

    product: Product
    rows: Need | Stored[Need]
    contracted_first: bool

    @property
    def node(self) -> Node:
        """The product's equation."""
        return self.product.node

    @property
    def key(self) -> Hashable:
        """Of its equation and how the rows lie."""
        return "dense", self.contracted_first, jax.tree.structure(self.rows)

    @property
    def needs(self) -> tuple[Need, ...]:
        """The packed rows."""
        return tuple(jax.tree.leaves(self.rows))

    @property
    def operands(self) -> Sequence[Operand]:
        """The activation."""
        return (self.product.x,)

    def emit(self, context: Context) -> Sequence[Any]:
        """The product from packed rows."""
        product, view = self.product, context.views(self.rows)
        params = product.node.params
        flat = lax.dot_general(
            flat_activation(product, context.read(product.x)),
            view.whole().astype(product.weight.aval.dtype),
            (((1,), (0 if self.contracted_first else 1,)), ((), ())),
            precision=params["precision"],
            preferred_element_type=params["preferred_element_type"],
        )
        assert math.prod(flat.shape) == product.tokens * product.width
        return [result_shape(product, view.filled(flat))]


@dataclass(frozen=True, eq=False, repr=False)
class MergedTopK(Action):
    """An arg max or a top-k over logits that several devices have parts of."""

    merged: Merged

    @property
    def node(self) -> Node:
        """The equation."""
        return self.merged.node

    @property
    def key(self) -> Hashable:
        """Of its equation and where the logits are."""
        return "merged", self.merged.k, self.merged.vocab, self.merged.placement, self.merged.cyclic

    @property
    def operands(self) -> Sequence[Operand]:
        """The logits, where they are still whole."""
        return (self.merged.operand,)

    @property
    def nodes(self) -> Sequence[Node]:
        """The equation, and that which makes the logits where others come between."""
        made = self.merged.operand.node
        return [self.node] if self.merged.operand in self.node.inputs or not made else [self.node, made]

    def emit(self, context: Context) -> Sequence[Any]:
        """The equation's results."""
        return merge(self.merged, context.read(self.merged.operand))


@dataclass(frozen=True, eq=False, repr=False)
class ArgMax(Action):
    """An arg max of logits, or of what is made of them, as a step that kernels may run.

    Reading few rows leaves XLA's arg max on CPU, which is no vector loop, as half of what a head takes.
    """

    equation: Node

    @property
    def node(self) -> Node:
        """The equation."""
        return self.equation

    @property
    def key(self) -> Hashable:
        """Of its equation."""
        return "arg max"

    @property
    def operands(self) -> Sequence[Operand]:
        """What it is taken of."""
        return tuple(self.equation.inputs)

    def emit(self, context: Context) -> Sequence[Any]:
        """The equation's result."""
        (out,) = self.node.outputs
        return [arg_max(context.read(self.node.inputs[0])).astype(out.aval.dtype)]


def arg_maxes(decisions: Iterable[Decision]) -> list[ArgMax]:
    """Every arg max along the vocabulary of what a rewritten head on one device makes, wherever that axis has gone."""
    found: dict[Node, ArgMax] = {}
    for decision in decisions:
        if kind_of(decision.match).splits_result(decision.match) and decision.placement is None:
            axes = follow(decision.match.last, narrow=False).axes
            ends = (value for value, dims in axes.items() if len(value.shape) - 1 in dims)
            found.update((n, ArgMax(n)) for value in ends for n in value.consumers if takes_largest(n))
    return list(found.values())


# Makes of a decision what is done in its place, knowing which leaves will be there.
ActionOf = Callable[[Decision, Callable[[Root], bool]], SiteAction]


def actions_of(
    detection: Detection,
    plan: Plan,
    has_leaf: Callable[[Root], bool],
    has_key: Callable[[PackKey], bool],
    action_of: ActionOf,
) -> dict[Node, Action]:
    """What to do at each equation, given which leaves and packed forms will be there at run time.

    A decision whose packed forms are not all there takes those of rows that lie otherwise. Where these are not there
    either, it is left out: its products are then dense. Dense products whose leaf is not there read packed rows
    instead, where some fit, and so do lookups.
    """

    def there(need: Need) -> bool:
        return has_key(need.key) or (need.key.is_leaf and has_leaf(need.key.recipe.root))

    decisions: list[Decision] = []
    for decision in plan.decisions:
        ways = (one for one in (decision, other_rows(decision)) if one is not None)
        decisions += [one for one in ways if all(there(n) for n in one.needs)][:1]
    sites = [action_of(one, has_leaf) for one in decisions]
    found: dict[Node, Action] = {own.node: own for site in sites for own in (site, *site.further)}
    taken = {p for decision in decisions for p in decision.match.products}
    found.update((one.node, one) for one in arg_maxes(decisions))
    found.update((one.node, MergedTopK(one)) for one in merged(decisions))
    absent = [one for one in detection.lookups if not has_leaf(one.origin.recipe.root)]
    found.update((one.node, one) for one in cyclic_lookups(absent, decisions))
    for product in detection.products:
        if product in taken or all(map(has_leaf, product.origin.recipe.roots)) or product.w_batch:
            continue
        for contracted_first, recipe in ((False, product.rows_free()), (True, product.rows_contracted())):
            shape = product.width, product.contracted
            rows = rows_need(recipe, shape[::-1] if contracted_first else shape, product.origin.refs)
            if all(there(need) for need in jax.tree.leaves(rows)):
                found[product.node] = DenseRows(product, rows, contracted_first)
                break
    return found


def rewritten(decision: Decision, has_leaf: Callable[[Root], bool]) -> RewrittenSite:
    """A site rewritten; a certified one falls back to the leaves of its products, where all of them are there."""
    if decision.settings.certify and decision.placement is None:
        leaves = leaf_needs(decision.match)
        if all(has_leaf(need.key.recipe.root) for need in leaves):
            decision = dataclasses.replace(decision, forms=dataclasses.replace(decision.forms, leaves=leaves))
    return RewrittenSite(decision)
