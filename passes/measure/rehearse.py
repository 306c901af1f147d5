"""Evaluates the program as the sparse one would be, but densely: each token has its own units and candidates.

Sizes are operands, so one compiled program serves all of them; what is left out is computed, and then left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Generic, TypeVar

import jax

from hire_xform.lowering.primitives.records import record
from hire_xform.passes.ir.each_device import whole_results
from hire_xform.passes.match.kinds import kind_of
from hire_xform.passes.plan.decisions import Decision
from hire_xform.passes.plan.forms import Whole
from hire_xform.passes.plan.needs import stack_need
from hire_xform.passes.plan.slots import SiteForms
from hire_xform.passes.rewrite.action import Context
from hire_xform.passes.rewrite.canonical import results_of
from hire_xform.passes.rewrite.site import SiteAction, site_key


@dataclass(frozen=True)
class RehearsedSizes(Whole):
    """A form that is never packed: int32 ``[*stack]``, the candidates or groups of units of the site at a path."""

    path: str


T = TypeVar("T")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RehearsedForms(Generic[T]):
    """Packed forms of a site that is rehearsed, and its sizes."""

    site: SiteForms[T]
    sizes: T


@dataclass(frozen=True, eq=False, repr=False)
class Rehearsed(Decision):
    """A match whose sparse form is rehearsed."""

    @classmethod
    def of(cls, decision: Decision) -> Rehearsed:
        """The rehearsal of a decision."""
        values = {f.name: getattr(decision, f.name) for f in fields(Decision)}
        sizes = stack_need(decision.match, RehearsedSizes(decision.site.path))
        values["forms"] = RehearsedForms(dataclasses.replace(decision.forms, level=None), sizes)
        values["levels"] = None
        return cls(**values)


class RehearsedSite(SiteAction):
    """Puts the rehearsed form in the place of a match; records ``logits`` of vocabularies."""

    @cached_property
    def key(self) -> Hashable:
        """Its path: what is recorded inside a call carries the path of one site, so that calls are not shared."""
        return type(self), self.decision.site.path

    def emit(self, context: Context) -> Sequence[Any]:
        """The value without what is left out. Sites that are rehearsed alike share a function."""
        decision = self.decision
        alike = type(self), site_key(decision), decision.node.outputs[0].aval
        run = context.shared(alike, self._function)
        value, logits = run(self.values(context), context.views(decision.forms))
        if logits is not None:
            record({"logits": logits}, decision.site.path)
        return self.given(context, value)

    def _function(self) -> Callable[[list[Any], Any], tuple[Any, Any]]:
        decision, kind = self.decision, kind_of(self.decision.match)

        def run(values: list[Any], views: Any) -> tuple[Any, Any]:
            given = kind.canonical(decision, values)
            flat, logits = kind.rehearsed(decision, given, views.site, views.sizes.whole())
            return results_of(decision.match.ends, flat), logits

        return whole_results(run, decision.node.outputs[0].aval)
