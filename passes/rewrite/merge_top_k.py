"""An arg max or a top-k of logits that are sharded along the vocabulary: each device sends its own best few.

A value and an id each. The compiler would send every logit to every device before a top-k, and does not know the ids
of rows that are distributed cyclically. The result is that of ``lax.argmax`` and ``lax.top_k``: the best k of all are
among the best k of each device, and of equal values the lowest id comes first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as prims
from jax.sharding import PartitionSpec

from hire_xform.lowering.xla.devices import Devices
from hire_xform.passes.ir import compat
from hire_xform.passes.ir.each_device import mesh_here, under_automatic_axes
from hire_xform.passes.ir.graph import Node, Value
from hire_xform.passes.match.top_k import top_k_of
from hire_xform.passes.match.whole_axis import cuts_end, reads_of
from hire_xform.passes.plan.decisions import Decision, Need
from hire_xform.passes.plan.placement import Placement, names_of
from hire_xform.passes.plan.row_order import may_be_cyclic, readers
from hire_xform.passes.weights.origins import shape_of


@dataclass(frozen=True, eq=False, repr=False)
class Merged:
    """An arg max or a top-k over logits that several devices have parts of.

    Attributes:
      node: the equation.
      operand: the logits, where they are still whole and on their devices.
      vocab: how many of them there are to choose from: the true size of a vocabulary that is cut after it was padded.
      k: how many it takes; None for an arg max.
      placement: of the logits.
      cyclic: whether their rows are distributed cyclically.
      needs: packed forms; none.
    """

    node: Node
    operand: Value
    vocab: int
    k: int | None
    placement: Placement
    cyclic: bool
    needs: tuple[Need, ...] = ()


def merged(decisions: Iterable[Decision]) -> list[Merged]:
    """What is to be merged of the logits of sharded sites: every top-k, and every arg max of cyclic rows."""
    found: dict[Node, Merged] = {}
    for decision in decisions:
        match, placement = decision.match, decision.placement
        if placement is None or not may_be_cyclic(decision):
            continue
        if decision.cyclic == "kept":
            reading = readers(match)
            assert not isinstance(reading, str), reading
        else:
            reading = [node for node in all_readers(match.last.out) if _is_merged(node)]
        for node in reading:
            operand = _source(node.inputs[0])
            if decision.cyclic == "kept" or _lies_with(operand, placement):
                top = top_k_of(node) if node.primitive is prims.top_k_p else None
                k, vocab = None if top is None else top.k, shape_of(node.inputs[0])[-1]
                found[node] = Merged(node, operand, vocab, k, placement, decision.cyclic == "kept")
    return list(found.values())


def all_readers(logits: Value) -> Iterable[Node]:
    """What reads logits whose last axis is the vocabulary, or all but its end."""
    for _, reads in reads_of(logits):
        for node in reads:
            yield from (node, *node.outputs[0].consumers) if cuts_end(node) else (node,)


def _is_merged(node: Node) -> bool:
    top = top_k_of(node) if node.primitive is prims.top_k_p else None
    return top is not None and top.axis == len(top.operand.shape) - 1


def _source(operand: Any) -> Value:
    """The value before its end is cut off, or it is moved to other devices by name, as before a top-k of typed axes."""
    assert isinstance(operand, Value)
    while operand.node is not None and (operand.node.primitive is compat.RESHARD or cuts_end(operand.node)):
        (operand,) = operand.node.inputs
        assert isinstance(operand, Value)
    return operand


def _lies_with(operand: Value, placement: Placement) -> bool:
    """False where types say that a value is not on the devices of the placement: there is nothing to save."""
    if not placement.explicit:
        return True
    spec = operand.aval.sharding.spec
    return len(spec) == len(operand.shape) and names_of(spec[-1]) == placement.rows


def merge(treatment: Merged, logits: Any) -> list[Any]:
    """The equation's results of ``[..., V]`` along the last axis, V split over the devices of the placement."""
    specs = [value.aval.sharding.spec for value in treatment.node.outputs]
    run = under_automatic_axes(lambda logits: _merge(treatment, logits), treatment.placement.mesh, specs)
    found: list[Any] = run(logits)
    return found


def _merge(treatment: Merged, logits: Any) -> list[Any]:
    placement, k = treatment.placement, treatment.k
    devices, lead = Devices(placement.rows, placement.shards), logits.shape[:-1]
    tokens = placement.tokens if math.prod(lead) % placement.size(placement.tokens) == 0 else ()

    def best(own: Any) -> tuple[Any, Any]:
        n = own.shape[1]
        if treatment.vocab < logits.shape[-1]:
            inside = devices.ids(jnp.arange(n, dtype=jnp.int32), n, treatment.cyclic) < treatment.vocab
            own = jnp.where(inside, own, _below_all(own.dtype, arg_max=k is None))
        if k is None:
            places = lax.argmax(own, 1, jnp.int32)[:, None]
            values = jnp.take_along_axis(own, places, axis=1, mode="promise_in_bounds")
        else:
            values, places = lax.top_k(own, min(k, n))
        return values, devices.ids(places, n, treatment.cyclic)

    def on_each(own: Any) -> tuple[Any, ...]:
        values, ids = (devices.gathered(part, 1) for part in best(own))
        if treatment.cyclic:
            # Of equal values the first is taken, which has to be that of the lowest id.
            ids, values = lax.sort((ids, values), dimension=1, num_keys=1)
        if k is None:
            first = lax.argmax(values, 1, jnp.int32)[:, None]
            return (jnp.take_along_axis(ids, first, axis=1, mode="promise_in_bounds"),)
        values, places = lax.top_k(values, k)
        return values, jnp.take_along_axis(ids, places, axis=1, mode="promise_in_bounds")

    out = PartitionSpec(tokens or None, None)
    mapped = jax.shard_map(
        on_each,
        mesh=mesh_here(placement.mesh),
        in_specs=PartitionSpec(tokens or None, placement.rows),
        out_specs=(out,) * (1 if k is None else 2),
        check_vma=False,  # what is gathered is the same on all devices, which its type does not say
    )
    results = mapped(logits.reshape(-1, logits.shape[-1]))
    outputs = treatment.node.outputs
    return [part.reshape(v.shape).astype(v.aval.dtype) for part, v in zip(results, outputs, strict=True)]


def _below_all(dtype: Any, arg_max: bool) -> Any:
    """What is chosen last. A top-k ranks a negative NaN below minus infinity, an arg max any NaN above all."""
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.asarray(jnp.iinfo(dtype).min, dtype)
    return jnp.asarray(-jnp.inf, dtype) if arg_max else jnp.copysign(jnp.asarray(jnp.nan, dtype), -1)
