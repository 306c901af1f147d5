"""Which packed forms of which weights a site reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from hire_xform.passes.match.kinds import kind_of
from hire_xform.passes.match.matches import Match, Matrix
from hire_xform.passes.plan.decisions import Need, PackKey
from hire_xform.passes.plan.forms import ROWS, Form, Inputs, Leaf, Order, PackedPredictor, Rows, UnitOrder
from hire_xform.passes.plan.measurement import Measurement
from hire_xform.passes.plan.placement import in_parts
from hire_xform.passes.plan.settings import Settings
from hire_xform.passes.plan.slots import ProductForms, SiteForms, Stored
from hire_xform.passes.weights.cut_weights import is_cut
from hire_xform.passes.weights.few_bits import blocks, compact, in_blocks
from hire_xform.passes.weights.origins import Ref
from hire_xform.passes.weights.products import normal_form
from hire_xform.passes.weights.recipe import Convert, Recipe


def stack_need(match: Match, form: Form) -> Need:
    """A form that has an entry for each layer of a site's (first) weight, whatever the weight."""
    first = match.matrices[0]
    return Need(PackKey(first.rows.parts[0], form), first.product.origin.refs)


def needs_of(
    match: Match,
    settings: Settings,
    inputs: Sequence[Inputs] | None,
    shards: int,
    order: Order | None,
    static: int = 0,
) -> SiteForms[Need]:
    """The packed forms of a site as it reads them.

    Args:
      match, settings: the site.
      inputs: of each product into the units, what its predictor is fitted to; None where nothing is known.
      shards: over how many devices its rows are.
      order: in which its units are packed; None for that they have.
      static: units that are always computed.
    """
    fitted = inputs if settings.spec.takes_inputs else None

    def made(form: Form, number: int) -> Form:
        if isinstance(form, PackedPredictor):
            form = replace(form, inputs=None if fitted is None else fitted[number], static=static)
        return form if order is None else replace(form, order=order)  # type: ignore[type-var]

    def product(forms: ProductForms[Form], matrix: Matrix, number: int) -> ProductForms[Need]:
        # Rows lie as they are, each device's part of them together; all else is made of each part by itself.
        shape, refs = (match.units, matrix.columns), matrix.product.origin.refs
        whole = in_blocks(matrix.rows, shape)
        if not jnp.issubdtype(matrix.product.weight.aval.dtype, jnp.floating):
            whole = whole.then(Convert(matrix.dtype, exact=True))
        parts = in_parts(whole, *shape, shards)
        slots: dict[str, Any] = {
            slot: rows_need(matrix.rows, shape, refs, order)
            if form == ROWS
            else Need(PackKey(parts, made(form, number)), refs)
            for slot, form in vars(forms).items()
            if form is not None
        }
        return ProductForms(**slots)

    forms = kind_of(match).forms(match, settings)
    made_of = [
        product(own, matrix, n) for n, (own, matrix) in enumerate(zip(forms.products, match.matrices, strict=True))
    ]
    ups = len(forms.up)
    return SiteForms(
        tuple(made_of[:ups]),
        None if forms.down is None else made_of[ups],
        None if order is None else stack_need(match, UnitOrder(order)),
        beside=tuple(made_of[ups + 1 :]),
    )


def rows_need(
    recipe: Recipe, shape: tuple[int, int], refs: tuple[Ref, ...], order: Order | None = None
) -> Need | Stored[Need]:
    """The rows of a matrix as they are stored: where that is in few bits, with what they are scaled by.

    Args:
      recipe: makes ``[n, d]``.
      shape: ``(n, d)``.
      refs: what resolves its stack axes.
      order: that in which its rows are packed; None for that they have.
    """

    def need(part: Recipe, rows: int = 1) -> Need:
        # One row for all has no order.
        return Need(PackKey(normal_form(part), ROWS if order is None or rows > 1 else Rows(order=order)), refs)

    values, *others = recipe.as_stored.parts
    if not recipe.scalings:
        return need(values)
    small = tuple(need(compact(other, shape), blocks(other)[0]) for other in others)
    return Stored(need(values), small, recipe.operations)


def leaf_needs(match: Match) -> tuple[Need, ...]:
    """The leaves that a site's own products are made of, for its fallback; none where one of them can't be passed on.

    In the order of ``match.products``. A part of a weight that one device of a shard_map has is none, nor is a weight
    that is made of several leaves.
    """
    origins = [product.origin for product in match.products]
    if any(is_cut(origin.refs) or origin.recipe.scalings for origin in origins):
        return ()
    if not kind_of(match).has_own_equations(match):
        return ()
    return tuple(Need(PackKey(origin.recipe, Leaf()), origin.refs) for origin in origins)


def order_of(match: Match, settings: Settings, measurement: Measurement | None) -> Order | None:
    """The order that a block's units are packed in, where its groups are of units that fire together."""
    if measurement is None or match.scaled_in_groups or not kind_of(match).may_reorder(match, settings):
        return None
    return measurement.order_for(settings)
