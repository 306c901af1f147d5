"""Evaluates the program densely, with statistics of every site recorded beside its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hire_xform.lowering.engine.block import UpProduct, group_scores
from hire_xform.lowering.measure.cofiring import cofiring
from hire_xform.lowering.measure.statistics import (
    covariance,
    groups_wanted,
    proved_ranks,
    unit_ranks,
    unit_totals,
    vocab_ranks,
)
from hire_xform.lowering.predict.predictors import predict_scores
from hire_xform.lowering.primitives.records import record
from hire_xform.lowering.prove.proofs import scores_with_bounds
from hire_xform.passes.ir.each_device import whole_results
from hire_xform.passes.ir.graph import Frame
from hire_xform.passes.match.matches import FfnMatch, VocabMatch
from hire_xform.passes.plan.decisions import Decision, Need
from hire_xform.passes.plan.forms import Proving, up_forms, vocab_forms
from hire_xform.passes.plan.measurement import Measurement, Regrouped, input_numbers
from hire_xform.passes.plan.needs import may_be_static, stack_need
from hire_xform.passes.plan.settings import Ffn, Vocab
from hire_xform.passes.prove.what_to_prove import NOTHING_READ
from hire_xform.passes.rewrite.canonical import dense_product, dense_up, flat_activation, result_shape
from hire_xform.passes.rewrite.environment import Env, PackedView, read
from hire_xform.passes.rewrite.rewriter import Rewriter
from hire_xform.passes.rewrite.splice import FfnParts, ffn_parts, site_operands, site_signature
from hire_xform.passes.rewrite.splice_certified import certified_block
from hire_xform.passes.rewrite.splice_choice import choice_block

# For each product into the units, what is recorded with the stack index of its weight.
Recorded = list[dict[str, jax.Array]]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Measured(Decision):
    """A match that is measured with several predictors.

    Attributes:
      ways: a decision for each. ``needs`` are theirs, one after the other; all else is the first one's.
      static_sets: how many of the units that fire most are tried as always computed; the last of ``needs`` is then
        their order.
    """

    ways: tuple[Decision, ...]
    static_sets: tuple[int, ...] = ()

    @classmethod
    def of(cls, ways: Sequence[Decision]) -> Measured:
        """One measurement of decisions on one match; of decisions with the same settings the first is taken."""
        different = tuple({way.settings: way for way in ways}.values())
        values = {f.name: getattr(different[0], f.name) for f in fields(Decision)}
        values["needs"] = tuple(need for way in different for need in way.needs)
        values["reads"] = NOTHING_READ  # logits are measured, whatever reads them
        return cls(**values, ways=different)

    def with_static_sets(self, measurement: Measurement | None) -> Measured:
        """Also measured with some units always computed, where that may be."""
        if measurement is None or not may_be_static(self.match, self.settings):
            return self
        order, counts = measurement.static_sets()
        if order is None or not counts:
            return self
        need = stack_need(self.match, Regrouped("order", order))
        return replace(self, needs=(*self.needs, need), static_sets=counts)


class Capture(Rewriter):
    """Puts "dense, and statistics" where the rewriter would put the sparse subgraph.

    Values are recorded (``lowering/primitives/records.py``) under the site's path: ``tokens``, of a block what
    ``unit_totals`` says, ``covariance0``, ... of the inputs of each product into the units, and for the predictor of
    each of a measurement's ``ways``, by its number, what ``vocab_ranks`` or ``unit_ranks`` say; where it is to be
    certified ``proved_ranks`` or ``groups_wanted``. Of units that may be always computed, by how many they are,
    ``wanted`` of a choice that takes them first.
    """

    # Whether predictors are run; without, nothing is recorded of them.
    ranks = True

    def _site(self, decision: Decision, env: Env, seen: list[PackedView]) -> Any:
        assert isinstance(decision, Measured)
        ways = tuple(site_signature(way) for way in decision.ways)
        key = ways, tuple(input_numbers(decision.match)), decision.static_sets, decision.node.outputs[0].aval
        if key not in self._calls:
            self._calls[key] = jax.jit(_measured(decision, self.ranks))
        value, recorded = self._calls[key](site_operands(decision, lambda o: read(env, o)), seen)
        for values, first in zip(recorded, _first_views(decision), strict=True):
            view = seen[first]
            record(values, decision.site.path, view.arrays.shape[: len(view.index)], view.index)
        return value

    def _call_key(self, frame: Frame, passed: list[Any], needs: list[Need], seen: list[PackedView]) -> Any:
        """Calls of one function are not shared: what is recorded inside carries the path of one site."""
        return frame.path, super()._call_key(frame, passed, needs, seen)


class CaptureInputs(Capture):
    """Records what is known without a predictor: what some are fitted to, and which units fire."""

    ranks = False


def _first_views(decision: Decision) -> list[int]:
    """Where the packed forms of each product into the units begin among those of the site."""
    match, settings = decision.match, decision.settings
    if isinstance(match, VocabMatch):
        return [0]
    assert isinstance(settings, Ffn)
    lengths = [len(forms) for forms in up_forms(match.region, settings)]
    return [sum(lengths[:i]) for i in range(len(lengths))]


def _measured(decision: Measured, ranks: bool) -> Callable[[list[Any], list[PackedView]], tuple[Any, Recorded]]:
    match = decision.match

    def run(operands: list[Any], views: list[PackedView]) -> tuple[Any, Recorded]:
        if isinstance(match, VocabMatch):
            return _vocab(decision, match, operands, views, ranks)
        return _ffn(decision, match, operands, views, ranks)

    return whole_results(run, decision.node.outputs[0].aval)


def _by_way(decision: Measured, views: Sequence[PackedView]) -> list[tuple[Decision, Sequence[PackedView]]]:
    given = iter(views)
    return [(way, [next(given) for _ in way.needs]) for way in decision.ways]


def _numbered(found: dict[str, jax.Array], number: int) -> dict[str, jax.Array]:
    return {f"{name}{number}": value for name, value in found.items()}


def _vocab(
    decision: Measured, match: VocabMatch, operands: Sequence[Any], views: Sequence[PackedView], ranks: bool
) -> tuple[Any, Recorded]:
    product = match.product
    x = flat_activation(product, operands[0])
    logits = dense_product(product, x, views[0].whole())
    found = {"tokens": jnp.int32(x.shape[0]), "covariance0": covariance(x)}
    for number, (way, own) in enumerate(_by_way(decision, views) if ranks else ()):
        settings = way.settings
        assert isinstance(settings, Vocab)
        spec, forms = settings.spec, dict(zip(vocab_forms(settings), own, strict=True))
        if settings.certify:
            bound = scores_with_bounds(x, forms[Proving(spec)].whole(), spec, input_bits=way.input_bits)
            bounds = bound.scores, bound.upper, bound.exact_error
            ranks_of = proved_ranks(logits, *bounds, settings.certify, settings.fill)
            found.update(_numbered(ranks_of, number))
            continue
        scores = predict_scores(x, forms[spec].whole(), spec, product.width)
        found.update(_numbered(vocab_ranks(logits, scores, settings.fill), number))
    return result_shape(product, views[0].filled(logits)), [found]


def _ffn(
    decision: Measured, match: FfnMatch, operands: Sequence[Any], views: Sequence[PackedView], ranks: bool
) -> tuple[Any, Recorded]:
    ways = _by_way(decision, views)
    parts = ffn_parts(decision.ways[0], match, operands, ways[0][1])
    region = parts.region(match)
    down = parts.down["rows"].whole()
    activation = dense_activation(match, parts)
    result = dense_product(match.down, activation.astype(match.hidden.aval.dtype), down, contracted_first=True)
    recorded: Recorded = [{} for _ in parts.ups]
    recorded[0]["tokens"] = jnp.int32(match.tokens)
    for i, first in enumerate(input_numbers(match)):
        if first == i:
            recorded[i][f"covariance{i}"] = covariance(parts.ups[i].x)
    norms = jnp.sqrt(jnp.sum(jnp.square(down.astype(jnp.float32)), axis=-1))
    settings = decision.settings
    assert isinstance(settings, Ffn)
    recorded[0].update(unit_totals(activation, norms, settings.group_size))
    # Groups that the model itself keeps stay what they are.
    if settings.group_size > 1 and not ranks and match.region.own is None:
        recorded[0]["together"] = cofiring(activation != 0 if match.region.zeroing else jnp.abs(activation) * norms)
    for number, (way, own) in enumerate(ways if ranks else ()):
        settings = way.settings
        assert isinstance(settings, Ffn)
        if settings.certify:
            certified = certified_block if match.region.own is None else choice_block
            block, given, _ = certified(way, match, operands, own)
            upper, needed = block.needed(given)
            proved = unit_ranks(activation, norms, upper, settings.group_size)
            recorded[0].update(_numbered(proved | groups_wanted(needed, upper.shape[1]), number))
            continue
        predicted = ffn_parts(way, match, operands, own)
        scores = group_scores(
            predicted.ups,
            region,
            units=match.units,
            down_norms=norms,
            score=predicted.score(match),
            group_size=settings.group_size,
        )
        recorded[0].update(_numbered(unit_ranks(activation, norms, scores, settings.group_size), number))
        for count in decision.static_sets if ranks else ():
            # First in the order of choice, whatever their scores.
            place = jnp.argsort(views[-1].whole())
            found = unit_ranks(activation, norms, jnp.where(place < count, jnp.inf, scores), 1)
            recorded[0].update(_numbered({f"static{count}_": found["wanted"]}, number))
    return result_shape(match.down, parts.down["rows"].filled(result)), recorded


def dense_activation(match: FfnMatch, parts: FfnParts) -> Any:
    """A block's activation ``[T, m]``, of all its units."""
    hiddens = [
        dense_up(up, part.x, _own_rows(part, match.units)) for up, part in zip(match.region.ups, parts.ups, strict=True)
    ]
    return parts.region(match)(hiddens, lambda values: values)


def _own_rows(up: UpProduct, units: int) -> jax.Array:
    return up.rows if up.rows.shape[0] == units else lax.dynamic_slice_in_dim(up.rows, up.first_row, units)
