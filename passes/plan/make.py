"""Decides by bytes which matches are rewritten, and says why the others stay dense."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from hire_xform.lowering.engine.selection import choose
from hire_xform.passes.ir.graph import Node
from hire_xform.passes.match.derivatives import derivative_of
from hire_xform.passes.match.kinds import kind_of
from hire_xform.passes.match.matches import Detection, FfnMatch, Match, VocabMatch
from hire_xform.passes.match.zeros import gate_of
from hire_xform.passes.plan.cost import dense_cost, sparse_cost, why_slower
from hire_xform.passes.plan.decisions import Decision, Plan, Refusal, Rung, Site
from hire_xform.passes.plan.measurement import Measure, Measurement, unpredicted, with_choices
from hire_xform.passes.plan.needs import needs_of, order_of, stack_need
from hire_xform.passes.plan.placement import Placement
from hire_xform.passes.plan.settings import Choice, Ffn, Vocab
from hire_xform.passes.plan.sizes import UNCHOSEN, Reading, sizes_of
from hire_xform.passes.prove.certifiable import ALL_BITS, input_bits, not_certifiable
from hire_xform.passes.prove.what_to_prove import NOTHING_READ, reads_of
from hire_xform.passes.weights.cut_weights import is_cut, parts_of_rows
from hire_xform.passes.weights.recipe import Root


def make_plan(
    detection: Detection,
    choose_settings: Callable[[str, str], Choice],
    platform: str,
    name_of: Callable[[Root], str],
    measure: Measure = lambda match, names: None,
    placed: Callable[[Match], Placement | str | None] = lambda match: None,
    runs_dense: bool = False,
) -> Plan:
    """Turns matches into decisions or refusals.

    Args:
      detection: what was found.
      choose_settings: for a kind ("ffn", "vocab") and a path, the user's settings.
      platform: where it will run: "cpu", "gpu" or "tpu".
      name_of: the name of a weight, for reports.
      measure: what a calibration says of a match.
      placed: where a match runs; see ``place``.
      runs_dense: True where the program stays dense and sites are measured only, so that their sizes don't matter.
    """
    decisions: list[Decision] = []
    refusals: list[tuple[Node, Refusal]] = []
    for match in detection.matches:
        kind = match.kind
        choice = choose_settings(kind, match.node.path)
        names = tuple(name_of(p.origin.recipe.root) for p in match.products)
        dense = sum(p.nbytes for p in match.products) * match.node.scope.iterations
        found = _decide(match, kind, choice, platform, names, dense, measure(match, names), placed(match), runs_dense)
        if isinstance(found, Decision):
            decisions.append(found)
            continue
        for product, name in zip(match.products, names, strict=True):
            size = product.nbytes * product.node.scope.iterations
            source = product.node.source
            refusals.append((product.node, Refusal(product.path, source, found, kind, size, (name,))))
    for rejection in detection.rejections:
        node, read = rejection.node, rejection.weights_read
        size, weights = sum(read.values()), tuple(name_of(root) for root in read)
        source = node.source
        refusals.append((node, Refusal(node.path, source, rejection.reason, "", size, weights)))
    refusals.sort(key=lambda pair: detection.order[pair[0]])
    return Plan(tuple(d.site for d in decisions), tuple(r for _, r in refusals), platform, tuple(decisions))


def _decide(
    match: Any,
    kind: str,
    choice: Choice,
    platform: str,
    names: tuple[str, ...],
    dense: int,
    measurement: Measurement | None,
    placement: Placement | str | None,
    runs_dense: bool,
) -> Decision | str:
    """A decision, or the reason to stay dense. Checks of meaning come first; the cost model is last."""
    settings = choice.settings
    if settings is None:
        return choice.reason
    if isinstance(match, VocabMatch) and not (match.evidence or choice.named or measurement is not None):
        return _smallest(match) or (
            "nothing says that its outputs are logits: no arg max, top-k or softmax that rises with them, and no "
            "weight of as many rows is looked up by id; if they are, "
            f"hx.Rule({match.node.path!r}, vocab=hx.Vocab()) makes it a site"
        )
    settings = settings.decided(None if measurement is None else measurement.certified)
    settings = _in_own_groups(match, settings)
    may_have_static = placement is None and kind_of(match).may_be_static(match, settings)
    settings, chosen = with_choices(settings, measurement, match.units, may_have_static)
    if (why := unpredicted(match, settings, measurement, placement is not None)) is not None:
        return why
    if not match.node.scope.iterations:
        return "the loop around it has no iterations"
    dtypes = {np.dtype(p.weight.aval.dtype).name for p in match.products}
    if not dtypes <= {"float32", "bfloat16", "float16", "float64"}:
        return f"its weights are {', '.join(sorted(dtypes))}; only floating-point weights are predicted"
    if isinstance(match, FfnMatch) and isinstance(settings, Ffn):
        why = _keeps_small_units(match, settings)
        if why is not None:
            return why
    if settings.certify and (why := not_certifiable(match, platform)) is not None:
        return f"{why}; allow what is not proved with hx.approximate(), a size, or a calibration"
    if isinstance(placement, str):
        return placement
    reads = NOTHING_READ
    if isinstance(match, VocabMatch):
        split = placement is not None or is_cut(match.product.origin.refs)
        found = reads_of(match, settings, split)
        if isinstance(found, str):
            return found
        reads = found
    shards = 1 if placement is None else placement.shards
    if isinstance(match, VocabMatch):
        assert isinstance(settings, Vocab)
        product = match.product
        tokens, units, inputs = product.tokens, product.width, product.contracted
        # Each device of a shard_map that cuts the vocabulary takes its share.
        parts = parts_of_rows(match.matrices[0].rows, product.origin.refs)
        if settings.certify and (settings.candidates or units) < min(reads.most, units):
            return f"candidates={settings.candidates} are fewer than the {reads.most} largest, which are read"
        count, computed_each, activation = -(-settings.candidates_of(units * parts, reads.most) // parts), 1, ""
        if count < units and (why := _smallest(match)):
            return why
    else:
        assert isinstance(settings, Ffn)
        tokens, units, inputs = match.tokens, match.units, match.region.ups[0].product.contracted
        activation = match.region.activation
        own = match.region.own
        if own is not None and settings.group_size % own.group:
            return (
                f"group_size={settings.group_size} is no multiple of the {own.group} units that the model itself keeps "
                "or leaves out together"
            )
        if units % settings.group_size:
            return f"group_size={settings.group_size} does not divide its {units} hidden units"
        if own is not None and own.share is None and settings.active is None and not (settings.certify or runs_dense):
            return (
                f"the model itself keeps {own.name}, so how many of its units are to be computed is not known; state "
                "it, hx.Ffn(active=...), calibrate, or prove it for each input, hx.Ffn(certify=True)"
            )
        computed_each = settings.group_size
        count = settings.groups_of(units, own.share if own is not None else None)
    if tokens > settings.max_tokens:
        return f"{tokens} tokens in one call, more than max_tokens={settings.max_tokens}; a prefill runs dense"
    if isinstance(match, FfnMatch) and shards > 1 and match.region.own is not None:
        return f"the model itself chooses among all its units, which are sharded over {placement}"
    if isinstance(match, FfnMatch) and placement is not None and settings.certify and match.region.own is not None:
        return "the model itself chooses among its units, which is certified without explicit axes only"
    if units // shards % computed_each:
        return f"group_size={computed_each} does not divide the {units // shards} hidden units of each device"
    # From here on of one device, which has its share of the units, and of the tokens where data is sharded too.
    here = tokens if placement is None else tokens // placement.size(placement.tokens)
    count = -(-count // shards)
    static = chosen.static
    groups = (units // shards - static) // computed_each
    selection = choose(here, groups, count)
    computed = selection.rows_read(here) * computed_each + static
    iterations = match.node.scope.iterations
    order = None if placement is not None else order_of(match, settings, measurement)
    if static and measurement is not None:
        order = measurement.static_sets()[0]
    told_more = "" if order is None else f"; {order.how}"
    read = Reading(match, settings, here, groups, computed_each, shards, static)
    sizes = sizes_of(read, chosen if placement is None else UNCHOSEN, count)
    predicted, exact = sizes.predicted, sizes.exact
    sparse = (predicted + exact) * iterations * shards
    taken = sizes.taken(read.tried)
    cost = iterations * sparse_cost(match, settings, here, predicted, taken, platform, shards, static)
    dense_as_read = dense_cost(match, platform) * iterations
    if cost * shards >= dense_as_read and not choice.force:
        excess = (cost - dense_as_read / shards) / iterations
        why = why_slower(match, settings, excess, taken, platform, shards, static)
        return (
            f"it reads {dense:,} bytes dense and {sparse:,} sparse{_over(placement)}, which would not be faster on "
            f"{platform}{why}; a Rule with force=True overrides this"
        )
    site = Site(
        kind=kind,
        path=match.node.path,
        source=match.node.source,
        tokens=tokens,
        dense_bytes=dense,
        sparse_bytes=sparse,
        settings=settings,
        weights=names,
        inputs=inputs,
        units=units,
        computed=computed * shards,
        shared=selection.mode == "shared",
        activation=activation,
        own=match.region.own.name if isinstance(match, FfnMatch) and match.region.own is not None else "",
        forced=choice.force,
        calibrated=chosen.how + told_more + sizes.how,
        shards=shards,
        placed="" if placement is None else str(placement),
        rungs=tuple(Rung(r.computed * shards, r.bytes * shards, r.share) for r in sizes.rungs),
        static=static,
        derivative=derivative_of(match),
        proved=reads.proved,
        unproved=reads.unproved,
        widened=dense_as_read > dense,
    )
    forms = needs_of(match, settings, None if measurement is None else measurement.inputs, shards, order, static)
    if sizes.levels is not None:
        forms = dataclasses.replace(forms, level=stack_need(match, sizes.levels))
    bits = input_bits(match, platform) or ALL_BITS
    return Decision(
        match,
        site,
        settings,
        count,
        forms,
        bits,
        placement,
        sizes.levels,
        smaller=sizes.smaller,
        static=static,
        reads=reads,
    )


def _keeps_small_units(match: FfnMatch, settings: Ffn) -> str | None:
    """Why units of a block can't be left out, its activation not being zero often; None where they can.

    Certified, zeros are proved for each input, however rare they are: of a gate, or of the model's own choice.
    """
    region = match.region
    proves = settings.certify and (region.own is not None or gate_of(region) is not None)
    if settings.activations == "any" or region.zeroing or proves:
        return None
    if region.zero_share is None:
        what = "does not leave exact zeros"
    else:
        often = f"about {region.zero_share:.0%}" if region.zero_share >= 0.01 else "under 1%"
        what = f"is zero for {often.replace('%', ' %')} of ordinary inputs only"
    return (
        f"its activation ({region.activation}) {what}, so units left out would change the result; allow it with "
        'activations="any"'
    )


def _in_own_groups(match: Match, settings: Vocab | Ffn) -> Vocab | Ffn:
    """Settings that choose the groups that the model itself keeps, where they state none."""
    own = match.region.own if isinstance(match, FfnMatch) else None
    if own is None or own.group == 1 or not isinstance(settings, Ffn) or settings.group_size > 1:
        return settings
    return dataclasses.replace(settings, group_size=own.group)


def _smallest(match: VocabMatch) -> str:
    """Why a projection is left of which the smallest outputs are wanted; empty where they are not."""
    if not match.smallest:
        return ""
    return f"{match.smallest} reads the smallest of its outputs, where candidates are the largest"


def _over(placement: Placement | None) -> str:
    return "" if placement is None else f", over {placement}"
