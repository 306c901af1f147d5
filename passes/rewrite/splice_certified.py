"""Puts the certified subgraphs where a site stood. Each gives its result, and which size it computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hire_xform.lowering.engine.certified_ffn import CertifiedBlock
from hire_xform.lowering.engine.engine import Operands, proved_or_dense
from hire_xform.lowering.engine.head import certified_logits
from hire_xform.lowering.xla.devices import ONE, Devices
from hire_xform.passes.match.matches import FfnMatch, VocabMatch
from hire_xform.passes.match.own_choice import OfChosen
from hire_xform.passes.match.region import replay
from hire_xform.passes.match.zeros import gate_of, upper_of
from hire_xform.passes.plan.decisions import Decision
from hire_xform.passes.plan.forms import Proving, down_forms, up_forms
from hire_xform.passes.plan.settings import Ffn, Vocab
from hire_xform.passes.rewrite.canonical import (
    canonical_activation,
    canonical_side,
    dense_product,
    dense_up,
    flat_activation,
    result_shape,
)
from hire_xform.passes.rewrite.environment import PackedView
from hire_xform.passes.rewrite.own_equations import own_block, own_product
from hire_xform.passes.rewrite.splice_choice import choice_result
from hire_xform.passes.rewrite.splice_readings import as_plain, rank_of, readings_of


def certified_function(decision: Decision) -> Callable[[list[Any], list[PackedView]], Any]:
    """The certified site as a function of ``site_operands`` and its packed forms, in the order of ``needs``."""
    match = decision.match
    if isinstance(match, VocabMatch):
        return lambda operands, views: _vocab(decision, match, operands, views)
    if match.region.own is not None:
        return lambda operands, views: choice_result(decision, match, operands, views)
    return lambda operands, views: _ffn(decision, match, operands, views)


def _vocab(decision: Decision, match: VocabMatch, operands: Sequence[Any], views: Sequence[PackedView]) -> Any:
    x, *sides = operands
    logits, rung = flat_certified_logits(decision, match, flat_activation(match.product, x), views, sides=sides)
    return result_shape(match.product, logits), rung


def flat_certified_logits(
    decision: Decision,
    match: VocabMatch,
    x: Any,
    views: Sequence[PackedView],
    devices: Devices = ONE,
    sides: Sequence[Any] = (),
) -> tuple[Any, Any]:
    """The logits ``[T, V]`` of ``[T, d]``, or one device's part of them, proved of all; and the size."""
    product, settings = match.product, decision.settings
    assert isinstance(settings, Vocab)
    # Of rows on several devices only logits are proved; what is added is the same for all of them, and keeps the order.
    reads = as_plain(decision.reads) if devices != ONE else decision.reads
    rows, first = views[0].rows()
    logits, rung = certified_logits(
        x,
        rows,
        views[1].whole(),
        settings.spec,
        lambda x, rows: dense_product(product, x, rows).astype(match.out_dtype),
        own=lambda x, leaf: own_product(product, x, leaf).astype(match.out_dtype),
        leaf=views[2] if decision.leaves else None,
        candidates=decision.count,
        smaller=decision.smaller,
        readings=readings_of(product, reads, settings.certify or False),
        sides=[jnp.asarray(side) for side in sides],
        rank=rank_of(product, reads),
        vocab=product.width // devices.count,
        first_row=first,
        fill=settings.fill,  # type: ignore[arg-type]
        out_dtype=match.out_dtype,
        rounded_to=product.out.aval.dtype,
        input_bits=decision.input_bits,
        devices=devices,
    )
    return views[0].filled(logits), rung


def certified_block(
    decision: Decision,
    match: FfnMatch,
    operands: Sequence[Any],
    views: Sequence[PackedView],
    shards: int = 1,
    canonical: bool = False,
) -> tuple[CertifiedBlock, Operands, PackedView]:
    """A block for ``proved_or_dense``, or one device's part of it, its operands, and its down rows as packed.

    ``canonical``: the operands are in canonical layout already.
    """
    settings, region, tokens = decision.settings, match.region, match.tokens
    gate = gate_of(region)
    assert isinstance(settings, Ffn)
    assert gate is not None
    statistics = OfChosen({}, None)
    given = iter(views)
    xs, rows, first_rows, largest, proofs = [], [], [], [], []
    for up, read, operand in zip(region.ups, up_forms(region, settings), operands, strict=False):
        forms = {form: next(given) for form in read}
        own, first = forms["rows"].rows()
        rows.append(own)
        first_rows.append(jnp.asarray(first, jnp.int32))
        x = operand if canonical else canonical_activation(up.product, operand, up.layout, tokens)
        xs.append(forms["rows"].filled(x))
        largest.append(forms["largest"].whole() if "largest" in forms else None)
        proofs.append(forms[Proving(settings.spec)].whole() if "largest" not in forms else None)
    last = {form: next(given) for form in down_forms(region, settings)}
    down, first_down = last["rows"].rows()
    values = operands[len(region.ups) :]
    sides = [
        v if canonical else canonical_side(v, side.layout, tokens, match.units)
        for v, side in zip(values, region.sides, strict=True)
    ]
    block = CertifiedBlock(
        units=match.units // shards,
        gate=gate.up,
        region=lambda hiddens, sides, gather, _: replay(region, hiddens, sides, gather, jax.nn.relu, statistics),
        dense_region=lambda hiddens, sides: replay(region, hiddens, sides, lambda v: v, jax.nn.relu, statistics),
        gate_value=lambda upper, sides: upper_of(region, gate.expr, upper, sides),
        dense_up=lambda i, x, rows: dense_up(region.ups[i], x, rows),
        dense_down=lambda h, rows: dense_product(match.down, h, rows, contracted_first=True),
        spec=settings.spec,
        own=lambda xs, sides, leaves: own_block(match, xs, sides, leaves),
        active=decision.count,
        smaller=decision.smaller,
        group_size=settings.group_size,
        up_dtypes=tuple(up.product.out.aval.dtype for up in region.ups),
        hidden_dtypes=tuple(up.dtype for up in region.ups),
        out_dtype=match.down.out.aval.dtype,
        input_bits=decision.input_bits,
    )
    made = Operands(
        xs=xs,
        sides=[jnp.asarray(s) for s in sides],
        rows=rows,
        first_rows=first_rows,
        down=down,
        first_down=jnp.asarray(first_down, jnp.int32),
        proofs=proofs,
        largest=largest,
        largest_down=last["largest"].whole(),
        leaves=list(given) or None,
    )
    return block, made, last["rows"]


def _ffn(decision: Decision, match: FfnMatch, operands: Sequence[Any], views: Sequence[PackedView]) -> Any:
    block, given, down = certified_block(decision, match, operands, views)
    result, rung = proved_or_dense(block, given)
    return result_shape(match.down, down.filled(result)), rung
