"""Puts a site's subgraph in its place: one for all sites that are rewritten alike, on one device or on several.

On several devices the whole subgraph is the body of one ``shard_map`` that is manual in every axis, so that nothing is
left for the compiler to move: each predicts, picks its share and computes its own rows. A block ends with one sum over
devices, as its dense form does, and logits stay where they are made. Where axes are explicit, what stands around the
``shard_map`` is run under automatic axes and its result is given the type that the program expects.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from hire_xform.lowering.primitives.proved_for import proved_for
from hire_xform.passes.ir.each_device import mesh_here, under_automatic_axes
from hire_xform.passes.ir.graph import Node, Operand
from hire_xform.passes.match.kinds import kind_of
from hire_xform.passes.plan.decisions import Decision, Need
from hire_xform.passes.plan.levels import Levels
from hire_xform.passes.plan.placement import Names, Placement, spec_of
from hire_xform.passes.plan.slots import SiteForms
from hire_xform.passes.prove.certifiable import platforms_proved
from hire_xform.passes.rewrite.action import Action, Context
from hire_xform.passes.rewrite.canonical import results_of
from hire_xform.passes.rewrite.environment import PackedView
from hire_xform.passes.weights.products import precision_asked

# Of the values that a site reads and the views of its packed forms its value, and what is marked where it marks.
SiteFunction = Callable[[list[Any], Any], Any]


@dataclass(frozen=True, eq=False, repr=False)
class SiteAction(Action):
    """Something is put in the place of a match; subclasses say what.

    Attributes:
      decision: the match and all that it takes.
    """

    decision: Decision

    @property
    def node(self) -> Node:
        """The first equation whose result is replaced."""
        return min((end.node for end in self.decision.match.ends), key=lambda node: node.order)

    @property
    def further(self) -> list[Alongside]:
        """What stands at the others."""
        return [Alongside(end.node, self.node) for end in self.decision.match.ends if end.node is not self.node]

    def given(self, context: Context, made: Any) -> Sequence[Any]:
        """The results of its equation; those of the others are put where these read them.

        Args:
          context: where it is emitted.
          made: what ``results_of`` gave.
        """
        ends = self.decision.match.ends
        results = {end.node: one for end, one in zip(ends, made if len(ends) > 1 else (made,), strict=True)}
        own = results.pop(self.node)
        context.env.update((node.outputs[0], one) for node, one in results.items())
        return [own]

    @property
    def needs(self) -> tuple[Need, ...]:
        """Its packed forms."""
        return self.decision.needs

    @property
    def operands(self) -> Sequence[Operand]:
        """What its subgraph reads."""
        return kind_of(self.decision.match).operands(self.decision)

    @property
    def nodes(self) -> Sequence[Node]:
        """All equations that it replaces."""
        return list(self.decision.match.nodes)

    @property
    def reached_by(self) -> Sequence[Node]:
        """What its subgraph reads of equations further on."""
        return kind_of(self.decision.match).reached_by(self.decision)

    def values(self, context: Context) -> list[Any]:
        """The values that its subgraph reads."""
        return kind_of(self.decision.match).values(self.decision, context)


@dataclass(frozen=True, eq=False, repr=False)
class Alongside(Action):
    """A further result of a site, which the site has made: that of another product of the same units.

    Attributes:
      equation: the equation.
      site: that at which the site is emitted, before it.
    """

    equation: Node
    site: Node

    @property
    def node(self) -> Node:
        """The equation."""
        return self.equation

    @property
    def key(self) -> Hashable:
        """Of its kind: what it reads is there."""
        return "alongside"

    @property
    def operands(self) -> Sequence[Operand]:
        """What makes sure that the site is there."""
        return tuple(self.site.outputs)

    @property
    def nodes(self) -> Sequence[Node]:
        """Both equations."""
        return (self.equation, self.site)

    def emit(self, context: Context) -> Sequence[Any]:
        """What the site has made."""
        return [context.read(value) for value in self.equation.outputs]


class RewrittenSite(SiteAction):
    """Predict, select, compute, in the place of a match."""

    @cached_property
    def key(self) -> Hashable:
        """Of its settings, its sizes and its subgraph."""
        return site_key(self.decision)

    @property
    def marks(self) -> int:
        """Those of the decision."""
        return self.decision.marks

    def emit(self, context: Context) -> Sequence[Any]:
        """The site's value."""
        decision = self.decision
        result = context.shared(self.key, lambda: _named(decision))(self.values(context), context.views(decision.forms))
        if not decision.marks:
            return self.given(context, result)
        made, rung = result
        context.tell(rung, decision.site.path, decision.marks)
        if decision.settings.certify:
            # Where like calls share a function, the path is that of the first of them.
            proved = platforms_proved(decision.match, decision.input_bits)
            made = jax.tree.map(lambda value: proved_for(value, proved, decision.site.path), made)
        return self.given(context, made)


def site_key(decision: Decision) -> Hashable:
    """Equal for two sites that are rewritten to the same function of their values and packed arrays."""
    return (
        decision.match.kind,
        decision.settings,
        decision.rungs,
        decision.static,
        decision.levels,
        jax.tree.structure(decision.forms),
        decision.site.tokens,
        decision.placement,
        decision.cyclic,
        decision.input_bits,
        precision_asked(decision.match.products),
        kind_of(decision.match).signature(decision),
    )


def _named(decision: Decision) -> SiteFunction:
    """The site's function, whose chosen rows are multiplied as precisely as its dense products ask to be."""
    function = site_function(decision)
    asked = precision_asked(decision.match.products)

    def precisely(values: list[Any], views: Any) -> Any:
        with jax.default_matmul_precision(asked):
            return function(values, views)

    named: Any = function if asked is None else precisely
    named.__name__ = named.__qualname__ = f"hire_{decision.site.kind}"
    made: SiteFunction = named
    return made


def site_function(decision: Decision) -> SiteFunction:
    """The rewritten site as a function of its ``values`` and of views of its packed forms.

    Where the site ``marks`` something it gives its value and what is marked.
    """
    if decision.levels is not None:
        return _branches(decision, decision.levels)
    if decision.placement is not None:
        return _on_each_device(decision, decision.placement)
    match, kind = decision.match, kind_of(decision.match)

    def run(values: list[Any], views: SiteForms[PackedView]) -> Any:
        flat, mark = kind.subgraph(decision, kind.canonical(decision, values), views, None)
        result = results_of(match.ends, flat)
        return (result, mark) if decision.marks else result

    return run


def _branches(decision: Decision, levels: Levels) -> SiteFunction:
    """A site whose layers have counts of their own: a branch for each."""
    one = dataclasses.replace(decision, levels=None, forms=dataclasses.replace(decision.forms, level=None))
    functions, before = [], 0
    for *smaller, count in levels.ladders:
        own = site_function(dataclasses.replace(one, count=count, smaller=tuple(smaller)))
        functions.append(_numbered(own, before, len(smaller) + 1, len(decision.rungs)) if one.settings.certify else own)
        before += len(smaller) + 1

    def run(values: list[Any], views: SiteForms[PackedView]) -> Any:
        assert views.level is not None
        return lax.switch(views.level.whole(), functions, values, dataclasses.replace(views, level=None))

    return run


def _numbered(function: SiteFunction, before: int, own: int, total: int) -> SiteFunction:
    """A certified site's function of one level, with its rungs numbered among those of all levels."""

    def numbered(values: list[Any], views: Any) -> Any:
        value, told = function(values, views)
        rung = told[0] if told.ndim else told
        number = jnp.where(rung < own, before + rung, total)
        return value, told.at[0].set(number) if told.ndim else number

    return numbered


def _on_each_device(decision: Decision, placement: Placement) -> SiteFunction:
    match, kind, marked = decision.match, kind_of(decision.match), bool(decision.marks)

    def run(values: list[Any], views: SiteForms[PackedView]) -> Any:
        given = kind.canonical(decision, values)
        tokens = placement.tokens
        packed = _each(lambda view: _packed_spec(view, placement), views)

        def body(given: list[Any], views: SiteForms[PackedView]) -> Any:
            own = jax.tree.map(lambda need, view: _own_part(view, need, placement), decision.forms, views)
            part, mark = kind.subgraph(decision, given, own, placement)
            return (part, mark.astype(jnp.int32)[None]) if marked else part

        axes = (*placement.rows, *tokens)
        columns: Names = placement.rows if kind.splits_result(match) else ()
        out = PartitionSpec(tokens or None, columns or None)
        mapped = jax.shard_map(
            body,
            mesh=mesh_here(placement.mesh),
            in_specs=(kind.specs(decision, given, placement), packed),
            out_specs=(out, PartitionSpec(axes or None)) if marked else out,
            # The program's own equations do not mix what varies over other axes, nor do branches of one device's own.
            check_vma=False,
        )
        if not marked:
            return results_of(match.ends, mapped(given, views))
        flat, marks = mapped(given, views)
        rung, rows = (marks, None) if marks.ndim == 1 else (marks[:, 0], marks[:, 1:].sum(0, dtype=jnp.int32))
        return results_of(match.ends, flat), rung.max() if rows is None else jnp.append(rung.max(), rows)

    specs = tuple(end.out.aval.sharding.spec for end in match.ends)
    result: Any = specs[0] if len(specs) == 1 else specs
    return under_automatic_axes(run, placement.mesh, (result, PartitionSpec()) if marked else result)


def _each(change: Callable[[PackedView], PackedView], views: Any) -> Any:
    """Every view of a tree of them, changed."""
    return jax.tree.map(change, views, is_leaf=lambda node: isinstance(node, PackedView))


def _packed_spec(view: PackedView, placement: Placement) -> PackedView:
    """What follows the stack axes is split: rows, or the axis of the parts that each device has one of."""
    arrays = jax.tree.map(lambda _: spec_of(len(view.index), placement.rows), view.arrays)
    whole = jax.tree.map(lambda _: PartitionSpec(), (view.index, view.factor))
    return PackedView(arrays, *whole)


def _own_part(view: PackedView, need: Need, placement: Placement) -> PackedView:
    """The one part that a device has of what is made of each part."""
    if need.key.form.split or placement.shards == 1:
        return view
    return dataclasses.replace(view, index=(*view.index, 0))
