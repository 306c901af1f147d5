"""What entries can be after some of them are set, added to or multiplied, at places that are known or are an order's.

Of several updates of one place any may be the last that is set. Added or multiplied, m of them are rounded m times, in
any order: the sum is within ``m u / (1 - m u)`` of the exact one, times the sum of their magnitudes and the entry's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as prims

from hire_xform.lowering.prove import intervals, reductions
from hire_xform.lowering.prove.bounds import U
from hire_xform.lowering.prove.intervals import Interval
from hire_xform.lowering.prove.reductions import Order
from hire_xform.passes.ir.graph import Node

# Below any logit: what is masked by minus infinity, or by a number that stands for it.
DEEP = -1e30
WRITES = frozenset({prims.scatter_p, prims.scatter_add_p, prims.scatter_mul_p})


def written(node: Node, result: int, operands: Sequence[Any]) -> Interval:
    """Entries of which some, at known places, are set, added to or multiplied."""
    into, where, update = operands
    if node.primitive is prims.scatter_p:
        return _set(node, into, where.low.astype(jnp.int32), update)
    if node.outputs[0].aval.dtype.kind not in "fV":
        unknown = jnp.full(into.low.shape, jnp.nan)
        return Interval(unknown, unknown)
    change = _added if node.primitive is prims.scatter_add_p else _multiplied
    return change(node, into, where.low.astype(jnp.int32), update)


def _put(node: Node, into: Any, at: Any, update: Any, how: Callable[..., Any]) -> Any:
    return how(into, at, update, node.params["dimension_numbers"], mode=node.params["mode"])


def _set(node: Node, into: Interval, at: Any, update: Interval) -> Interval:
    truth = into.low.dtype == jnp.bool_
    low, high = (end.astype(jnp.float32) for end in into)
    # The least and the largest of what goes to a place, infinite where nothing does.
    least, most = (
        _put(node, jnp.full(low.shape, fill), at, end.astype(jnp.float32), how)
        for fill, end, how in ((jnp.inf, update.low, lax.scatter_min), (-jnp.inf, update.high, lax.scatter_max))
    )
    touched = _put(node, jnp.zeros(low.shape), at, jnp.ones(update.low.shape), lax.scatter_max) > 0
    low, high = jnp.where(touched, least, low), jnp.where(touched, most, high)
    return Interval(low > 0.5, high > 0.5) if truth else Interval(low, high)


def _added(node: Node, into: Interval, at: Any, update: Interval) -> Interval:
    zeros = jnp.zeros(into.low.shape)
    masks = _put(node, zeros, at, (update.high < DEEP).astype(jnp.float32), lax.scatter_max) > 0
    kept = update.map(lambda end: jnp.where(update.high < DEEP, 0.0, end))
    low, high, sizes = (_put(node, zeros, at, end, lax.scatter_add) for end in (*kept, kept.magnitude))
    count = _put(node, zeros, at, jnp.ones(update.low.shape), lax.scatter_add)
    share = 1.2 * (count + 2.0) * (_unit(node) + U)
    off = share * (sizes + _finite(into).magnitude) + 2.0**-120
    touched = count > 0
    low, high = (jnp.where(touched, x + y + z, x) for x, y, z in ((into.low, low, -off), (into.high, high, off)))
    low, high = _usual(low, high, touched)
    return Interval(jnp.where(masks, -jnp.inf, low), jnp.where(masks, high - 1e29, high))


def _multiplied(node: Node, into: Interval, at: Any, update: Interval) -> Interval:
    known = update.low == update.high
    factor = _put(node, jnp.ones(into.low.shape), at, jnp.where(known, update.low, jnp.nan), lax.scatter_mul)
    count = _put(node, jnp.zeros(into.low.shape), at, jnp.ones(update.low.shape), lax.scatter_add)
    made = intervals.multiplied(into, intervals.point(factor), jnp.float32)
    off = 1.2 * (count + 2.0) * (_unit(node) + U) * made.magnitude + 2.0**-120
    touched = count > 0
    low, high = jnp.where(touched, made.low - off, into.low), jnp.where(touched, made.high + off, into.high)
    return Interval(*_usual(low, high, touched))


def _unit(node: Node) -> float:
    return float(jnp.finfo(node.outputs[0].aval.dtype).eps) / 2.0


def _finite(a: Interval) -> Interval:
    """Without the infinite ends of what is masked."""
    return a.map(lambda end: jnp.where(jnp.isneginf(end), 0.0, end))


def _usual(low: Any, high: Any, touched: Any) -> tuple[Any, Any]:
    """Of what may overflow nothing is known; the lower end may be minus infinity."""
    known = ~touched | ((high < -DEEP) & (low < -DEEP))
    return jnp.where(known, low, jnp.nan), jnp.where(known, high, jnp.nan)


def put_back(order: Order, payload: Interval, into: Interval | None = None) -> Interval:
    """What stands at the places of an order, where its entries came from, ``[..., n]``.

    Args:
      order: the order, of all entries, or of the first ones with ``into``.
      payload: ``[..., held]``, at its places.
      into: what stands for entries that have no place.
    """
    places = reductions.positions(order)
    end = order.held - 1.0
    found = reductions.hull(payload, places.map(lambda place: jnp.minimum(place, end)))
    if into is None or order.full:
        return found
    inside, outside = places.high <= end, places.low > end
    return intervals.chosen_of(Interval(inside, ~outside), into, found)
