"""What is picked, set or compared at places that hang on the logits: an order's, a draw's, or those of an edge."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as prims

from hire_xform.lowering.prove import reductions
from hire_xform.lowering.prove.intervals import Interval
from hire_xform.lowering.prove.reductions import Held, Order
from hire_xform.passes.ir.graph import Node
from hire_xform.passes.prove.edges import Edge
from hire_xform.passes.prove.write_rules import put_back


def picked(node: Node, values: Held, places: Held, same: int, located: bool) -> Interval:
    """Entries along the last axis at places that hang on the logits.

    Args:
      node: the equation that takes them.
      values: what they are taken of, ``[..., n]``.
      places: of the same rows, or an order that all of its places are taken in.
      same: 1 where an order is that of the values themselves, -1 of their negatives, 0 of something else.
      located: whether places are decided, or nothing is known of them.
    """
    shape = node.outputs[0].shape
    if isinstance(places, Order):
        assert isinstance(values, Interval)
        made = _in_order(values, places, same)
    else:
        rows = (values.keys if isinstance(values, Order) else values).low.shape[:-1]
        places = places.map(lambda end: end.reshape(*rows, -1))
        if located and isinstance(values, Interval):
            made = reductions.taken_where_known(values, places)
        else:
            made = reductions.taken(values, places)
    return made.map(lambda end: end.reshape(shape))


def beside_its_edge(node: Node, entries: Interval, edge: Edge, places: Held | None, made: Interval) -> Interval:
    """Which entries are below their edge, or not: none is that fewer than so many others can be above.

    Args:
      node: the comparison.
      entries: what is compared, ``[..., n]``.
      edge: with what.
      places: of an edge that is not the same for all tokens, the numbers that its place is made of.
      made: what is known without that.
    """
    rows, n = entries.low.shape[:-1], entries.low.shape[-1]
    if places is None:
        if edge.at + 1 >= n:
            next_high = jnp.full((*rows, 1), -jnp.inf)
        else:
            next_high = lax.top_k(entries.high, edge.at + 2)[0][..., -1:]
    else:
        assert isinstance(places, Interval)
        number = (places.low if edge.step > 0 else places.high).reshape(*rows, 1)
        at = edge.at + edge.step * number + 1.0
        falling = -jnp.sort(-entries.high, axis=-1)
        # Beyond the last entry the edge may be a NaN, which nothing is at least.
        last = edge.at + edge.step * (places.high if edge.step > 0 else places.low).reshape(*rows, 1)
        known = (at >= 1.0) & (last < n if node.primitive in (prims.ge_p, prims.le_p) else jnp.isfinite(last))
        place = jnp.where(known, jnp.minimum(at, n - 1.0), 0.0).astype(jnp.int32)
        next_high = jnp.where(at >= n, -jnp.inf, jnp.take_along_axis(falling, place, axis=-1))
        next_high = jnp.where(known, next_high, jnp.inf)
    unknown = jnp.any(jnp.isnan(entries.low) | jnp.isnan(entries.high), axis=-1, keepdims=True)
    # At most as many as the edge's place, with itself one more, can be as high as this one's lower end.
    not_below = (entries.low > next_high) & ~unknown
    if node.primitive in (prims.lt_p, prims.gt_p):
        return Interval(made.low & ~not_below, made.high & ~not_below)
    return Interval(made.low | not_below, made.high | not_below)


def placed(node: Node, into: Interval, order: Order, update: Interval) -> Interval:
    """Entries of each row that are set at the places of an order."""
    rows = order.keys.low.shape[:-1]
    made = put_back(order, update.map(lambda end: jnp.broadcast_to(end, (*rows, order.held))), into)
    return made.map(lambda end: end.reshape(node.outputs[0].shape))


def _in_order(values: Interval, order: Order, same: int) -> Interval:
    if not same or values.low.dtype == jnp.bool_:
        return reductions.in_order(values, order)
    n = values.low.shape[-1]
    ranked = reductions.sorted_entries(values, values.low.ndim - 1)
    ranked = ranked if same < 0 else ranked.map(lambda end: end[..., ::-1])
    places = order.start + order.step * jnp.arange(order.held)
    return ranked.map(lambda end: jnp.take(end, places, axis=-1)) if order.held <= n else values
