"""Puts a site on the devices that hold its weights: each predicts, picks its share and computes its own rows.

The whole subgraph is the body of one ``shard_map`` that is manual in every axis, so that nothing is left for the
compiler to move: a block ends with one sum over devices, as its dense form does, and logits stay where they are made.
Where axes are explicit, what stands around the ``shard_map`` is run under automatic axes and its result is given the
type that the program expects.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from hire_xform.lowering.engine.cyclic_rows import from_cyclic, return_candidates
from hire_xform.lowering.engine.engine import proved_or_dense
from hire_xform.lowering.xla.devices import Devices
from hire_xform.passes.ir.each_device import mesh_here, under_automatic_axes
from hire_xform.passes.match.matches import FfnMatch, VocabMatch
from hire_xform.passes.plan.decisions import Decision
from hire_xform.passes.plan.placement import Names, Placement, spec_of
from hire_xform.passes.rewrite.canonical import canonical_activation, canonical_side, flat_activation, result_shape
from hire_xform.passes.rewrite.environment import PackedView
from hire_xform.passes.rewrite.splice import ffn_parts, flat_block, flat_candidates, flat_logits
from hire_xform.passes.rewrite.splice_certified import certified_block, flat_certified_logits


def sharded_function(decision: Decision) -> Callable[[list[Any], list[PackedView]], Any]:
    """The rewritten site as a function of ``site_operands`` and its packed forms, on the devices of its placement."""
    match, placement = decision.match, decision.placement
    assert placement is not None

    def run(operands: list[Any], views: list[PackedView]) -> Any:
        given = _canonical(match, operands)
        tokens = placement.tokens
        specs = [_spec(value, number, match, placement) for number, value in enumerate(given)]
        packed = [_packed_spec(view, placement) for view in views]

        def body(given: list[Any], views: list[PackedView]) -> Any:
            own = [_own_part(view, need.key.form, placement) for view, need in zip(views, decision.needs, strict=True)]
            if isinstance(match, VocabMatch):
                part, rung = _logits(decision, match, given, own, placement)
            else:
                part, rung = _block(decision, match, given, own, placement)
            return (part, rung[None]) if marked else part

        axes = (*placement.rows, *tokens)
        columns: Names = placement.rows if isinstance(match, VocabMatch) else ()
        out = PartitionSpec(tokens or None, columns or None)
        mapped = jax.shard_map(
            body,
            mesh=mesh_here(placement.mesh),
            in_specs=(specs, packed),
            out_specs=(out, PartitionSpec(axes or None)) if marked else out,
            # The program's own equations do not mix what varies over other axes, nor do branches of one device's own.
            check_vma=False,
        )
        if not marked:
            return result_shape(_product(match), mapped(given, views))
        flat, rungs = mapped(given, views)
        return result_shape(_product(match), flat), rungs.max()

    marked = bool(decision.marks)
    result = _product(match).out.aval.sharding.spec
    return under_automatic_axes(run, placement.mesh, (result, PartitionSpec()) if marked else result)


def _logits(
    decision: Decision, match: VocabMatch, given: Sequence[Any], views: Sequence[PackedView], placement: Placement
) -> tuple[jax.Array, Any]:
    """A device's part of the logits: of the rows it has, or, where these are cyclic, of those it had; and the size."""
    (x,), devices = given, _devices(placement)
    if decision.cyclic == "candidates":
        exact, index = flat_candidates(decision, match, x, views, devices.count)
        exact = exact.astype(match.out_dtype)
        return return_candidates(exact, index, devices, match.units // devices.count), None
    rung: Any = None
    if decision.settings.certify:
        logits, rung = flat_certified_logits(decision, match, x, views, devices)
    else:
        logits = flat_logits(decision, match, x, views, devices.count, canonical=True)
    return from_cyclic(logits, devices, axis=1) if decision.cyclic == "logits" else logits, rung


def _block(
    decision: Decision, match: FfnMatch, given: Sequence[Any], views: Sequence[PackedView], placement: Placement
) -> tuple[jax.Array, Any]:
    """The whole block, each device's units added up, and the size that a device took, or whether it was short.

    Each falls back by itself.
    """
    if decision.settings.certify:
        block, operands, down = certified_block(decision, match, given, views, placement.shards, canonical=True)
        part, rung = proved_or_dense(block, operands)
        part = down.filled(part)
    else:
        parts = ffn_parts(decision, match, given, views, canonical=True)
        part, rung = flat_block(decision, match, parts, placement.shards)
    return _devices(placement).total(part), rung.astype(jnp.int32)


def _devices(placement: Placement) -> Devices:
    return Devices(placement.rows, placement.shards)


def _product(match: VocabMatch | FfnMatch) -> Any:
    return match.product if isinstance(match, VocabMatch) else match.down


def _canonical(match: VocabMatch | FfnMatch, operands: Sequence[Any]) -> list[Any]:
    """A site's operands as ``[T, n]``: activations, then side inputs."""
    if isinstance(match, VocabMatch):
        return [flat_activation(match.product, operands[0])]
    region, tokens = match.region, match.tokens
    ups = [canonical_activation(up.product, x, up.layout, tokens) for up, x in zip(region.ups, operands, strict=False)]
    sides = operands[len(ups) :]
    return ups + [canonical_side(v, s.layout, tokens, match.units) for v, s in zip(sides, region.sides, strict=True)]


def _spec(value: Any, number: int, match: VocabMatch | FfnMatch, placement: Placement) -> PartitionSpec:
    """Tokens over their axes; of a side input, hidden units over theirs."""
    shape = jax.numpy.shape(value)
    if isinstance(match, VocabMatch) or number < len(match.region.ups):
        return PartitionSpec(placement.tokens or None, None)
    if not shape:
        return PartitionSpec()
    # One for all tokens or all units stays one on every device.
    tokens = placement.tokens if shape[0] == match.tokens > 1 else ()
    units = placement.rows if shape[1] == match.units > 1 else ()
    return PartitionSpec(tokens or None, units or None)


def _packed_spec(view: PackedView, placement: Placement) -> PackedView:
    """What follows the stack axes is split: rows, or the axis of the parts that each device has one of."""
    arrays = jax.tree.map(lambda _: spec_of(len(view.index), placement.rows), view.arrays)
    whole = jax.tree.map(lambda _: PartitionSpec(), (view.index, view.factor))
    return PackedView(arrays, *whole)


def _own_part(view: PackedView, form: Any, placement: Placement) -> PackedView:
    """The one part that a device has of what is made of each part."""
    if form == "rows" or placement.shards == 1:
        return view
    return dataclasses.replace(view, index=(*view.index, 0))
