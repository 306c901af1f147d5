"""Evaluates the program densely, with statistics of every site recorded beside its result."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Generic, TypeVar

import jax

from hire_xform.lowering.primitives.records import record
from hire_xform.passes.ir.each_device import whole_results
from hire_xform.passes.match.kinds import kind_of
from hire_xform.passes.plan.decisions import Decision, Need
from hire_xform.passes.plan.forms import UnitOrder, Whole
from hire_xform.passes.plan.measurement import Measurement
from hire_xform.passes.plan.needs import stack_need
from hire_xform.passes.plan.slots import SiteForms
from hire_xform.passes.prove.what_to_prove import NOTHING_READ
from hire_xform.passes.rewrite.action import Context
from hire_xform.passes.rewrite.canonical import results_of
from hire_xform.passes.rewrite.site import SiteAction, site_key

# For each product into the units, what is recorded with the stack index of its weight.
Recorded = list[dict[str, jax.Array]]

T = TypeVar("T")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MeasuredForms(Generic[T]):
    """Packed forms of a site that is measured: of each of its ways, and the order of the units by how often they fire.

    Attributes:
      ways: of each way.
      often: that order, where some units are tried as always computed.
      first: the first token of a sample, where not all tokens are ranked.
    """

    ways: tuple[SiteForms[T], ...]
    often: T | None = None
    first: T | None = None


@dataclass(frozen=True)
class FirstRanked(Whole):
    """A form that is never packed: int32 ``[*stack]``, the first of the tokens that are ranked.

    Attributes:
      every: how far they lie apart; the first is one of so many.
      stack: lengths of the stack axes of the site's (first) weight.
    """

    every: int
    stack: tuple[int, ...]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Measured(Decision):
    """A match that is measured with several predictors.

    Attributes:
      ways: a decision for each; all but the packed forms is the first one's.
      inputs: whether what predictors are fitted to is recorded.
      ranks: whether predictors are run; without, nothing is recorded of them.
      static_sets: how many of the units that fire most are tried as always computed.
      every: how far the tokens of a sample lie apart of which that is recorded which a sample is enough for.
    """

    forms: MeasuredForms[Need]  # type: ignore[assignment]
    ways: tuple[Decision, ...]
    inputs: bool
    ranks: bool
    static_sets: tuple[int, ...] = ()
    every: int = 1

    @classmethod
    def of(cls, ways: Sequence[Decision], inputs: bool, ranks: bool) -> Measured:
        """One measurement of decisions on one match; of decisions with the same settings the first is taken."""
        different = tuple({way.settings: way for way in ways}.values())
        values = {f.name: getattr(different[0], f.name) for f in fields(Decision)}
        values["forms"] = MeasuredForms(
            tuple(way.forms if ranks else _without_predictors(way.forms) for way in different)
        )
        values["reads"] = NOTHING_READ  # logits are measured, whatever reads them
        return cls(**values, ways=different, inputs=inputs, ranks=ranks)

    def sampled(self, measurement: Measurement | None) -> Measured:
        """With a sample of the tokens that were counted, where there are more than enough."""
        tokens = 0 if measurement is None else measurement.least_tokens
        every = tokens // kind_of(self.match).tokens_enough
        if every <= 1:
            return self
        first = stack_need(self.match, FirstRanked(every, self.match.stack))
        return replace(self, forms=replace(self.forms, first=first), every=every)

    def with_static_sets(self, measurement: Measurement | None) -> Measured:
        """Also measured with some units always computed, where that may be."""
        if measurement is None or not kind_of(self.match).may_be_static(self.match, self.settings):
            return self
        order, counts = measurement.static_sets()
        if order is None or not counts:
            return self
        often = stack_need(self.match, UnitOrder(order))
        return replace(self, forms=replace(self.forms, often=often), static_sets=counts)


def _without_predictors(forms: SiteForms[Need]) -> SiteForms[Need]:
    """What the dense form takes."""
    ups = tuple(replace(own, predictor=None, norms=None, largest=None) for own in forms.up)
    down = None if forms.down is None else replace(forms.down, norms=None, largest=None)
    beside = tuple(replace(own, largest=None) for own in forms.beside)
    return replace(forms, up=ups, down=down, beside=beside)


class MeasuredSite(SiteAction):
    """Puts "dense, and statistics" in the place of a match.

    Values are recorded (``lowering/primitives/records.py``) under the site's path: ``tokens``, of a block what
    ``unit_totals`` says; of ``inputs``, ``covariance0``, ... of those of each product into the units; and of ``ranks``,
    for the predictor of each of a measurement's ``ways``, by its number, what ``vocab_ranks`` or ``unit_ranks`` say;
    where it is to be certified ``proved_ranks`` or ``groups_wanted``. Of units that may be always computed, by how many
    they are, ``wanted`` of a choice that takes them first.
    """

    decision: Measured

    @cached_property
    def key(self) -> Hashable:
        """Its path: what is recorded inside a call carries the path of one site, so that calls are not shared."""
        return type(self), self.decision.site.path

    def emit(self, context: Context) -> Sequence[Any]:
        """The dense value. Sites that are measured alike share a function."""
        decision = self.decision
        ways = tuple(site_key(way) for way in decision.ways)
        alike = (
            type(self),
            ways,
            tuple(decision.match.input_numbers),
            (decision.inputs, decision.ranks, decision.static_sets, decision.every),
            decision.node.outputs[0].aval,
        )
        views = context.views(decision.forms)
        value, recorded = context.shared(alike, self._function)(self.values(context), views)
        for values, forms in zip(recorded, views.ways[0].up, strict=True):
            rows = forms.rows
            record(values, decision.site.path, rows.arrays.shape[: len(rows.index)], rows.index)
        return self.given(context, value)

    def _function(self) -> Callable[[list[Any], Any], tuple[Any, Recorded]]:
        decision, kind = self.decision, kind_of(self.decision.match)

        def run(values: list[Any], views: Any) -> tuple[Any, Recorded]:
            flat, recorded = kind.measured(decision, kind.canonical(decision, values), views)
            return results_of(decision.match.ends, flat), recorded

        return whole_results(run, decision.node.outputs[0].aval)


def numbered(found: dict[str, jax.Array], number: int) -> dict[str, jax.Array]:
    """What is recorded of one way, by its number."""
    return {f"{name}{number}": value for name, value in found.items()}
