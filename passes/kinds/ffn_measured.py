"""A feed-forward block as a calibration runs it: densely, with what is recorded of it, or with units masked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from hire_xform.lowering.engine.block import UpProduct, group_scores
from hire_xform.lowering.measure.cofiring import cofiring
from hire_xform.lowering.measure.statistics import (
    Sample,
    covariance,
    first_in_order,
    groups_wanted,
    unit_ranks,
    unit_totals,
)
from hire_xform.lowering.primitives.stored_rows import own_rows
from hire_xform.passes.kinds.ffn_blocks import (
    FfnParts,
    Views,
    certified_block,
    certified_operands,
    contracted,
    contracting,
    ffn_parts,
    filled,
    match_of,
    settings_of,
)
from hire_xform.passes.match.matches import FfnMatch
from hire_xform.passes.match.own_choice import OfChosen
from hire_xform.passes.measure.capture import Measured, Recorded, numbered
from hire_xform.passes.plan.decisions import Decision
from hire_xform.passes.rewrite.canonical import dense_up


def measured(decision: Measured, given: Sequence[Any], views: Any) -> tuple[Any, Recorded]:
    """The dense block ``[T, d_out]``, and what is recorded with each product into the units.

    Args:
      decision: the block, with all its ways.
      given: its canonical values.
      views: the packed forms of each way, and the order of units that may be always computed.
    """
    match, group_size = match_of(decision), settings_of(decision).group_size
    first = views.ways[0]
    parts = ffn_parts(decision.ways[0], given, first)
    down, *beside = (view.whole() for view in contracting(first))
    activation = _dense_activation(match, parts)
    result = contracted(match, activation.astype(match.hidden.aval.dtype), [down, *beside])
    recorded: Recorded = [{} for _ in parts.ups]
    recorded[0]["tokens"] = jnp.int32(match.tokens)
    for i, number in enumerate(match.input_numbers):
        if decision.inputs and number == i:
            recorded[i][f"covariance{i}"] = covariance(parts.ups[i].x)
    norms = jnp.sqrt(jnp.sum(jnp.square(down.astype(jnp.float32)), axis=-1))
    recorded[0].update(unit_totals(activation, norms, group_size))
    # Groups that the model itself keeps stay what they are.
    if not decision.ranks and group_size > 1 and match.own is None:
        recorded[0]["together"] = cofiring(activation != 0 if match.region.zeroing else jnp.abs(activation) * norms)
    if decision.ranks:
        recorded[0].update(_ranks(decision, given, views, activation, norms))
    return filled(result, first), recorded


def _ranks(decision: Measured, given: Sequence[Any], views: Any, activation: Any, norms: Any) -> dict[str, Any]:
    """What is recorded of the predictor of each way; uncertified, of a sample of the tokens where that is enough."""
    match, found = match_of(decision), {}
    some, some_activation = given, activation
    if views.first is not None:
        sample = Sample(decision.every, views.first.whole())
        # One side input for all tokens stays that.
        some = [sample.of(v) if jnp.ndim(v) == 2 and v.shape[0] == match.tokens else v for v in given]
        some_activation = sample.of(activation)
    for number, (way, own) in enumerate(zip(decision.ways, views.ways, strict=True)):
        settings = settings_of(way)
        if settings.certify:
            upper, needed = certified_block(way).needed(certified_operands(given, own, way.settings.spec))
            proved = unit_ranks(activation, norms, upper, settings.group_size)
            found.update(numbered(proved | groups_wanted(needed, upper.shape[1]), number))
            continue
        parts = ffn_parts(way, some, own)
        scores = group_scores(
            parts.ups,
            parts.region(match),
            units=match.units,
            down_norms=norms,
            score=parts.score(match),
            group_size=settings.group_size,
        )
        found.update(numbered(unit_ranks(some_activation, norms, scores, settings.group_size), number))
        for count in decision.static_sets:
            # First in the order of choice, whatever their scores.
            place = jnp.argsort(views.often.whole())
            wanted = unit_ranks(some_activation, norms, jnp.where(place < count, jnp.inf, scores), 1)["wanted"]
            found.update(numbered({f"static{count}_": wanted}, number))
    return found


def _dense_activation(match: FfnMatch, parts: FfnParts) -> Any:
    """A block's activation ``[T, m]``, of all its units."""
    hiddens = [
        dense_up(up, part.x, _own_rows(part, match.units)) for up, part in zip(match.region.ups, parts.ups, strict=True)
    ]
    return parts.region(match)(hiddens, lambda values: values)


def _own_rows(up: UpProduct, units: int) -> jax.Array:
    return own_rows(up.rows, up.first_row, units)


@dataclass(frozen=True)
class _OfMasked(OfChosen):
    """The model's own choice among the units chosen, the others being there too."""

    mask: Any = None

    def kth(self, values: Any, rank: int) -> Any:
        return super().kth(jnp.where(self.mask, values, -jnp.inf), rank)

    def kept(self, values: Any, k: int) -> Any:
        return super().kept(jnp.where(self.mask, values, -jnp.inf), k)


def rehearsed(decision: Decision, given: Sequence[Any], views: Views, sizes: Any) -> Any:
    """The block ``[T, d_out]`` of the ``sizes`` best groups of units of each token, the others being zero."""
    match, group_size, forms = match_of(decision), settings_of(decision).group_size, views.down
    assert forms is not None
    parts = ffn_parts(decision, given, views)
    scores = group_scores(
        parts.ups,
        parts.region(match),
        units=match.units,
        down_norms=None if forms.norms is None else forms.norms.whole(),
        score=parts.score(match),
        group_size=group_size,
    )
    chosen = jnp.repeat(first_in_order(scores, sizes, scores.shape[1]), group_size, axis=1)
    own = parts.statistics
    masked = dataclasses.replace(parts, statistics=_OfMasked(own.mean, own.variance, chosen))
    activation = jnp.where(chosen, _dense_activation(match, masked), 0).astype(match.hidden.aval.dtype)
    return filled(contracted(match, activation, [view.whole() for view in contracting(views)]), views)
