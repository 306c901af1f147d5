"""A feed-forward block as the engines take it, plain and certified."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from hire_xform.lowering.engine.block import UpProduct, ffn
from hire_xform.lowering.engine.certified_ffn import CertifiedBlock, GatedBlock, ThresholdBlock
from hire_xform.lowering.engine.engine import Operands
from hire_xform.lowering.predict.predictors import Predictor
from hire_xform.lowering.primitives.ranks import moments
from hire_xform.passes.match.matches import FfnMatch
from hire_xform.passes.match.own_choice import OfAll, OfChosen
from hire_xform.passes.match.region import Up, replay
from hire_xform.passes.match.zeros import gate_of, upper_of
from hire_xform.passes.plan.decisions import Decision
from hire_xform.passes.plan.settings import Ffn
from hire_xform.passes.plan.slots import SiteForms
from hire_xform.passes.prove.region_intervals import threshold_bounds
from hire_xform.passes.rewrite.canonical import dense_product, dense_up
from hire_xform.passes.rewrite.environment import PackedView
from hire_xform.passes.rewrite.own_equations import own_block

Views = SiteForms[PackedView]


def match_of(decision: Decision) -> FfnMatch:
    """Its match, a block."""
    match = decision.match
    assert isinstance(match, FfnMatch)
    return match


def settings_of(decision: Decision) -> Ffn:
    """Its settings, a block's."""
    settings = decision.settings
    assert isinstance(settings, Ffn)
    return settings


@dataclass(frozen=True)
class FfnParts:
    """A block's operands and packed forms, as the uncertified engine takes them.

    Attributes:
      ups: the products into the hidden units.
      sides: the region's side inputs.
      statistics: what the model's own choice of units takes.
    """

    ups: list[UpProduct]
    sides: list[Any]
    statistics: OfChosen

    def region(self, match: FfnMatch) -> Callable[[Sequence[Any], Callable[[Any], Any]], Any]:
        """What the model does to hidden units, given a product for each of ``ups`` and what gathers the rest."""
        return lambda hiddens, gather: replay(match.region, hiddens, self.sides, gather, jax.nn.relu, self.statistics)

    def score(self, match: FfnMatch) -> Callable[[Sequence[Any]], Any] | None:
        """What the model itself chooses units by; None where it makes no choice."""
        own = match.own
        if own is None:
            return None
        return lambda predicted: replay(
            match.region, predicted, self.sides, lambda v: v, jax.nn.relu, self.statistics, own.score
        )


def ffn_parts(decision: Decision, given: Sequence[Any], views: Views) -> FfnParts:
    """A block's canonical values and packed forms; of a certified one without its predictor."""
    match, settings = match_of(decision), settings_of(decision)
    ups: list[UpProduct] = []
    mean: dict[int, Any] = {}
    variance: Any = None
    for up, forms, number, value in zip(match.region.ups, views.up, _up_numbers(match), given, strict=False):
        rows, first = forms.rows.rows()
        x = forms.rows.filled(value)
        packed = None
        if forms.predictor is not None and not settings.certify:
            packed = forms.predictor.for_predictor(settings.spec)
        ups.append(UpProduct(x=x, rows=rows, first_row=first, packed=packed, spec=settings.spec, dtype=up.dtype))
        if forms.moments is not None:
            mean[number], variance = moments(x, forms.moments.whole())
    sides = list(given[len(ups) :])
    if views.order is not None:
        # Units are packed in another order, in which all that varies over them has to be.
        own = views.order.whole()
        sides = [jnp.take(s, own, axis=1) if jnp.ndim(s) == 2 and s.shape[1] == match.units else s for s in sides]
    return FfnParts(ups, sides, OfChosen(mean, variance))


def contracted(match: FfnMatch, activation: Any, rows: Sequence[Any]) -> Any:
    """The dense contracting products of an activation ``[T, m]``, side by side: ``[T, d_out]``."""
    made = [
        dense_product(end, activation, own, contracted_first=True) for end, own in zip(match.ends, rows, strict=True)
    ]
    return made[0] if len(made) == 1 else jnp.concatenate(made, axis=1)


def contracting(views: Views) -> list[PackedView]:
    """The rows of the contracting matrices."""
    assert views.down is not None
    return [forms.rows for forms in (views.down, *views.beside)]


def filled(flat: Any, views: Views) -> Any:
    """What the contracting products made; NaN where one of their layers is not there."""
    for rows in contracting(views):
        flat = rows.filled(flat)
    return flat


def _up_numbers(match: FfnMatch) -> list[int]:
    """Which of the region's expressions the products are."""
    return [i for i, e in enumerate(match.region.exprs) if isinstance(e, Up)]


def chosen(decision: Decision, given: Sequence[Any], views: Views, shards: int) -> tuple[Any, Any]:
    """A block ``[T, d_out]``, or one device's part of the sum that it is; and whether it was short."""
    match, parts, down = match_of(decision), ffn_parts(decision, given, views), views.down
    assert down is not None
    (rows, first), *beside = (view.rows() for view in contracting(views))
    return ffn(
        parts.ups,
        parts.region(match),
        rows,
        beside=beside,
        units=match.units // shards,
        first_row=first,
        down_norms=None if down.norms is None else down.norms.whole(),
        score=parts.score(match),
        active=decision.count,
        group_size=settings_of(decision).group_size,
        out_dtype=match.down.out.aval.dtype,
        static=decision.static,
    )


def certified_block(decision: Decision, shards: int = 1) -> CertifiedBlock:
    """A block whose zeros are proved, or one device's part of it."""
    match, settings = match_of(decision), settings_of(decision)
    region, ups = match.region, match.region.ups
    common: dict[str, Any] = {
        "units": match.units // shards,
        "region": _replayed(match),
        "dense_region": lambda hiddens, sides: replay(region, hiddens, sides, lambda v: v, jax.nn.relu, OfAll()),
        "dense_up": lambda i, x, rows: dense_up(ups[i], x, rows),
        "dense_down": lambda h, rows: contracted(match, h, rows),
        "own": lambda xs, sides, leaves: own_block(match, xs, sides, leaves),
        "spec": settings.spec,
        "active": decision.count,
        "group_size": settings.group_size,
        "up_dtypes": tuple(up.product.out.aval.dtype for up in ups),
        "hidden_dtypes": tuple(up.dtype for up in ups),
        "out_dtype": match.down.out.aval.dtype,
        "input_bits": decision.input_bits,
        "smaller": decision.smaller,
    }
    if match.own is not None:
        return ThresholdBlock(**common, bounds=functools.partial(threshold_bounds, region))
    gate = gate_of(region)
    assert gate is not None
    return GatedBlock(
        **common,
        gate=gate.up,
        gate_value=lambda upper, sides: upper_of(region, gate.expr, upper, sides),
    )


def certified_operands(given: Sequence[Any], views: Views, spec: Predictor) -> Operands:
    """Its arrays."""
    assert views.down is not None
    rows = [forms.rows.rows() for forms in views.up]
    (down, first_down), *beside = (view.rows() for view in contracting(views))
    largest = [_whole(forms.largest) for forms in (views.down, *views.beside)]
    return Operands(
        xs=[forms.rows.filled(x) for forms, x in zip(views.up, given, strict=False)],
        sides=[jnp.asarray(side) for side in given[len(views.up) :]],
        rows=[own for own, _ in rows],
        first_rows=[jnp.asarray(first, jnp.int32) for _, first in rows],
        proofs=[None if (p := forms.predictor) is None else p.for_predictor(spec) for forms in views.up],
        largest=[_whole(forms.largest) for forms in views.up],
        moments=[_whole(forms.moments) for forms in views.up],
        down=down,
        first_down=jnp.asarray(first_down, jnp.int32),
        largest_down=largest[0] if len(largest) == 1 else functools.reduce(jnp.maximum, largest),
        leaves=list(views.leaves) or None,
        beside=[own for own, _ in beside],
        first_beside=[jnp.asarray(first, jnp.int32) for _, first in beside],
    )


def _whole(view: PackedView | None) -> Any:
    return None if view is None else view.whole()


def _replayed(match: FfnMatch) -> Callable[..., Any]:
    numbers, region = _up_numbers(match), match.region

    def run(hiddens: Sequence[Any], sides: Sequence[Any], gather: Callable[[Any], Any], moments: Sequence[Any]) -> Any:
        known = {n: m for n, m in zip(numbers, moments, strict=True) if m is not None}
        mean = {n: m.computed_mean for n, m in known.items()}
        variance = next((m.computed_variance for m in known.values()), None)
        return replay(region, hiddens, sides, gather, jax.nn.relu, OfChosen(mean, variance))

    return run
