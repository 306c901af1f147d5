"""Puts a certified block in place whose model chooses its units itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hire_xform.lowering.engine.certified_choice import ChoiceBlock
from hire_xform.lowering.engine.engine import Operands, proved_or_dense
from hire_xform.passes.match.matches import FfnMatch
from hire_xform.passes.match.own_choice import OfAll, OfChosen
from hire_xform.passes.match.region import Region, Up, replay
from hire_xform.passes.plan.decisions import Decision
from hire_xform.passes.plan.forms import Proving, down_forms, up_forms
from hire_xform.passes.plan.settings import Ffn
from hire_xform.passes.prove.region_intervals import Bounded, ranks_of
from hire_xform.passes.rewrite.canonical import (
    canonical_activation,
    canonical_side,
    dense_product,
    dense_up,
    result_shape,
)
from hire_xform.passes.rewrite.environment import PackedView
from hire_xform.passes.rewrite.own_equations import own_block


def choice_block(
    decision: Decision, match: FfnMatch, operands: Sequence[Any], views: Sequence[PackedView]
) -> tuple[ChoiceBlock, Operands, PackedView]:
    """A block for ``proved_or_dense``, its operands, and the rows of its contracting product as packed."""
    settings, region, tokens = decision.settings, match.region, match.tokens
    assert isinstance(settings, Ffn)
    given = iter(views)
    forms = [{form: next(given) for form in read} for read in up_forms(region, settings)]
    last = {form: next(given) for form in down_forms(region, settings)}
    rows = [own["rows"].rows() for own in forms]
    down, first_down = last["rows"].rows()
    values = operands[len(region.ups) :]
    sides = [canonical_side(v, s.layout, tokens, match.units) for v, s in zip(values, region.sides, strict=True)]

    def whole(form: Any) -> list[Any]:
        return [own[form].whole() if form in own else None for own in forms]

    block = ChoiceBlock(
        units=match.units,
        region=_replayed(region),
        proving=Bounded(region),
        ranks=ranks_of(region),
        dense_region=lambda hiddens, sides: replay(region, hiddens, sides, lambda v: v, jax.nn.relu, OfAll()),
        dense_up=lambda i, x, rows: dense_up(region.ups[i], x, rows),
        dense_down=lambda h, rows: dense_product(match.down, h, rows, contracted_first=True),
        own=lambda xs, sides, leaves: own_block(match, xs, sides, leaves),
        spec=settings.spec,
        active=decision.count,
        group_size=settings.group_size,
        up_dtypes=tuple(up.product.out.aval.dtype for up in region.ups),
        hidden_dtypes=tuple(up.dtype for up in region.ups),
        out_dtype=match.down.out.aval.dtype,
        input_bits=decision.input_bits,
    )
    made = Operands(
        xs=[
            own["rows"].filled(canonical_activation(up.product, operand, up.layout, tokens))
            for own, up, operand in zip(forms, region.ups, operands, strict=False)
        ],
        sides=[jnp.asarray(s) for s in sides],
        rows=[r for r, _ in rows],
        first_rows=[jnp.asarray(first, jnp.int32) for _, first in rows],
        down=down,
        first_down=jnp.asarray(first_down, jnp.int32),
        proofs=whole(Proving(settings.spec)),
        largest=whole("largest"),
        moments=whole("bounded_moments"),
        largest_down=last["largest"].whole(),
        leaves=list(given) or None,
    )
    return block, made, last["rows"]


def _replayed(region: Region) -> Callable[..., Any]:
    numbers = [i for i, e in enumerate(region.exprs) if isinstance(e, Up)]

    def run(hiddens: Sequence[Any], sides: Sequence[Any], gather: Callable[[Any], Any], moments: Sequence[Any]) -> Any:
        known = {n: m for n, m in zip(numbers, moments, strict=True) if m is not None}
        mean = {n: m.computed_mean for n, m in known.items()}
        variance = next((m.computed_variance for m in known.values()), None)
        return replay(region, hiddens, sides, gather, jax.nn.relu, OfChosen(mean, variance))

    return run


def choice_result(
    decision: Decision, match: FfnMatch, operands: Sequence[Any], views: Sequence[PackedView]
) -> tuple[Any, Any]:
    """The certified block's result, and whether the dense form was run."""
    block, given, down = choice_block(decision, match, operands, views)
    result, fallback = proved_or_dense(block, given)
    return result_shape(match.down, down.filled(result)), fallback
