"""Which packed forms of which weights a site reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hire_xform.passes.match.equations import equations_between
from hire_xform.passes.match.matches import FfnMatch, VocabMatch, up_rows, vocab_rows
from hire_xform.passes.plan.decisions import Need, PackKey
from hire_xform.passes.plan.forms import Proving, down_forms, up_forms, vocab_forms
from hire_xform.passes.plan.measurement import Fitted, Inputs, Measurement, Order, Predicted, Regrouped, takes_inputs
from hire_xform.passes.plan.placement import in_parts
from hire_xform.passes.plan.settings import Ffn, Vocab
from hire_xform.passes.weights.cut_weights import is_cut
from hire_xform.passes.weights.products import normal_form
from hire_xform.passes.weights.provenance import Origin, Recipe, Stack


def stack_need(match: VocabMatch | FfnMatch, form: Any) -> Need:
    """A form that has an entry for each layer of a site's (first) weight, whatever the weight."""
    if isinstance(match, VocabMatch):
        return Need(PackKey(vocab_rows(match), form), match.product.origin.refs)
    up = match.region.ups[0]
    return Need(PackKey(up_rows(up), form), up.product.origin.refs)


def needs_of(
    match: VocabMatch | FfnMatch,
    settings: Vocab | Ffn,
    inputs: Sequence[Inputs] | None,
    shards: int,
    order: Order | None,
    static: int = 0,
) -> tuple[Need, ...]:
    """The packed forms of a site, in the order of ``Decision.needs``."""

    def needs(recipe: Recipe, forms: list[Any], origin: Origin, columns: int, number: int = 0) -> list[Need]:
        fitted = (settings.spec, Proving(settings.spec))
        predicting = [form in fitted for form in forms]
        if inputs is not None and takes_inputs(settings.spec):
            forms = [Fitted(form, inputs[number]) if form in fitted else form for form in forms]
        if static:
            forms = [Predicted(form, static) if own else form for form, own in zip(forms, predicting, strict=True)]
        if order is not None:
            forms = [Regrouped(form, order) for form in forms]
        # Rows lie as they are, each device's part of them together; all else is made of each part by itself.
        parts, rows = in_parts(recipe, match.units, columns, shards), normal_form(recipe.as_stored)
        return [Need(PackKey(rows if form == "rows" else parts, form), origin.refs) for form in forms]

    if isinstance(match, VocabMatch):
        assert isinstance(settings, Vocab)
        product = match.product
        return tuple(needs(vocab_rows(match), vocab_forms(settings), product.origin, product.contracted))
    assert isinstance(settings, Ffn)
    region = match.region
    found: list[Need] = []
    for number, (up, forms) in enumerate(zip(region.ups, up_forms(region, settings), strict=True)):
        found += needs(up_rows(up), forms, up.product.origin, up.product.contracted, number)
    found += needs(match.down_rows(), down_forms(region, settings), match.down.origin, match.down.width)
    if order is not None:
        found.append(stack_need(match, Regrouped("order", order)))
    return tuple(found)


def leaf_needs(match: VocabMatch | FfnMatch) -> tuple[Need, ...]:
    """The leaves that a site's own products are made of, for its fallback; none where one of them can't be passed on.

    In the order of ``match.products``. A part of a weight that one device of a shard_map has is none.
    """
    origins = [product.origin for product in match.products]
    if any(is_cut(origin.refs) for origin in origins):
        return ()
    if isinstance(match, FfnMatch) and equations_between(match) is None:
        return ()
    return tuple(Need(PackKey(origin.recipe, "leaf"), origin.refs) for origin in origins)


def order_of(match: VocabMatch | FfnMatch, settings: Vocab | Ffn, measurement: Measurement | None) -> Order | None:
    """The order that a block's units are packed in, where its groups are of units that fire together."""
    if measurement is None or not may_reorder(match, settings):
        return None
    return measurement.order_for(settings)


def may_reorder(match: VocabMatch | FfnMatch, settings: Vocab | Ffn) -> bool:
    """Whether the units of a site may be packed in another order."""
    if isinstance(match, VocabMatch) or settings.certify or match.region.own is not None:
        return False
    weights = [(up_rows(up), up.product.origin) for up in match.region.ups] + [(match.down_rows(), match.down.origin)]
    stacks = {tuple(s.size for s in recipe.steps if isinstance(s, Stack)) for recipe, _ in weights}
    return len(stacks) == 1 and not any(is_cut(origin.refs) for _, origin in weights)


def may_be_static(match: VocabMatch | FfnMatch, settings: Vocab | Ffn) -> bool:
    """Whether some units of a site may be always computed: of those that zeros tell apart, and that are no groups."""
    if not isinstance(match, FfnMatch) or not isinstance(settings, Ffn) or settings.group_size > 1:
        return False
    return match.region.zeroing and may_reorder(match, settings)
