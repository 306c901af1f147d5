"""A top-k of logits that are sharded along the vocabulary: each device sends its own best few, a value and an id each.

The compiler would send every logit to every device first. The result is that of ``lax.top_k``: the best k of all are
among the best k of each device, and of equal values the lowest id is first, since devices are taken in order.
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

from hire_xform.passes.decisions import Decision, Need
from hire_xform.passes.detect import VocabMatch
from hire_xform.passes.pointwise import is_pointwise
from hire_xform.passes.shards import Placement
from hire_xform.passes.top_k import top_k_of
from hire_xform.passes.walk import Node, Value

# What leaves the last axis as it is wherever it leaves its length.
_MOVES = frozenset({prims.reshape_p, prims.squeeze_p, prims.broadcast_in_dim_p, prims.slice_p, prims.dynamic_slice_p})


@dataclass(frozen=True, eq=False, repr=False)
class MergedTopK:
    """A top-k over logits that several devices have parts of.

    Attributes:
      node: the equation.
      k: how many it takes.
      placement: of the logits.
      needs: packed forms; none.
    """

    node: Node
    k: int
    placement: Placement
    needs: tuple[Need, ...] = ()


def merged_top_ks(decisions: Iterable[Decision]) -> list[MergedTopK]:
    """The top-ks that read the logits of a sharded site. Where axes are explicit the program says itself what moves."""
    found: dict[Node, MergedTopK] = {}
    for decision in decisions:
        match, placement = decision.match, decision.placement
        if not isinstance(match, VocabMatch) or placement is None or placement.shards == 1 or placement.explicit:
            continue
        for node in _readers(match.product.out, match.product.width):
            top = top_k_of(node) if node.primitive is prims.top_k_p else None
            if top is not None and top.axis == len(top.operand.shape) - 1:
                found[node] = MergedTopK(node, top.k, placement)
    return list(found.values())


def _readers(logits: Value, vocab: int) -> Iterable[Node]:
    """What reads logits whose last axis is the vocabulary, through what keeps it."""
    seen = {logits}
    waiting = [logits]
    while waiting:
        value = waiting.pop()
        if not value.shape or value.shape[-1] != vocab:
            continue
        for node in value.consumers:
            yield node
            if is_pointwise(node) or node.primitive in _MOVES:
                waiting += [result for result in node.outputs if result not in seen]
                seen.update(node.outputs)


def merged_top_k(treatment: MergedTopK, logits: Any) -> list[Any]:
    """``lax.top_k`` of ``[..., V]`` along the last axis, V split over the devices of the placement."""
    placement, k = treatment.placement, treatment.k
    rows, lead = placement.rows, logits.shape[:-1]
    tokens = placement.tokens if math.prod(lead) % placement.size(placement.tokens) == 0 else ()

    def merge(own: Any) -> tuple[Any, Any]:
        values, ids = lax.top_k(own, min(k, own.shape[1]))
        ids = ids + lax.axis_index(rows) * own.shape[1]
        values, ids = (lax.all_gather(part, rows, axis=1, tiled=True) for part in (values, ids))
        values, places = lax.top_k(values, k)
        return values, jnp.take_along_axis(ids, places, axis=1, mode="promise_in_bounds")

    mesh = jax.sharding.get_abstract_mesh()
    out = PartitionSpec(tokens or None, None)
    mapped = jax.shard_map(
        merge,
        mesh=placement.mesh if mesh.empty else mesh,
        in_specs=PartitionSpec(tokens or None, rows),
        out_specs=(out, out),
        check_vma=False,  # what is gathered is the same on all devices, which its type does not say
    )
    return [part.reshape(*lead, k) for part in mapped(logits.reshape(-1, logits.shape[-1]))]
