"""What each equation of a sampler can make of operands that lie between bounds, whatever it does along an axis.

``interval_rules`` has the pointwise ones, of floats; here are those of whole numbers, and what sorts, sums, counts,
picks and puts back. A rule is of one equation; ``lowering/prove/reductions.py`` has the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as prims

from hire_xform.lowering.prove import intervals, reductions
from hire_xform.lowering.prove.intervals import Interval
from hire_xform.lowering.prove.reductions import Held, Order
from hire_xform.passes.ir import compat
from hire_xform.passes.ir.axis_rules import is_pointwise, moves_only
from hire_xform.passes.ir.graph import Node, dtype_of
from hire_xform.passes.ir.pointwise import COMPARES
from hire_xform.passes.match.top_k import top_k_of
from hire_xform.passes.prove.interval_rules import FLOATS, applied, can_be_bounded
from hire_xform.passes.prove.orders import adds_an_axis
from hire_xform.passes.prove.write_rules import DEEP, WRITES, put_back, written
from hire_xform.passes.weights.origins import shape_of

_SHIFTED = frozenset({prims.add_p, prims.add_jaxvals_p, prims.sub_p, prims.mul_p, prims.div_p})


def exactly(value: Any) -> Interval:
    """What is known: floats and whole numbers in f32, where they fit, and truth values."""
    value = jnp.asarray(value)
    if value.dtype == jnp.bool_:
        return Interval(value, value)
    held = value.astype(jnp.float32)
    return Interval(held, held) if jnp.issubdtype(value.dtype, jnp.floating) else reductions.whole(Interval(held, held))


# --- which equations there are rules for ---


def can_be_replayed(node: Node, result: int, reached: Sequence[bool]) -> bool:
    """Whether :func:`replayed` has a rule for an equation.

    Args:
      node: the equation.
      result: which of its results is wanted.
      reached: of each operand, whether it hangs on the logits.
    """
    p, dtype = node.primitive, node.outputs[result].aval.dtype
    if dtype.name not in (*FLOATS, "bool") and dtype.kind not in "iu":
        return False
    if moves_only(node) or p is compat.OPTIMIZATION_BARRIER:
        return True
    if p in _ALONG:
        return True
    if p in (prims.argmax_p, prims.argmin_p):
        return len(node.params["axes"]) == 1
    if p in (prims.top_k_p, prims.approx_top_k_p):
        return top_k_of(node) is not None
    if p is prims.sort_p:
        return node.params["num_keys"] == 1 and len(node.inputs) <= 2
    if p in (prims.concatenate_p, prims.pad_p):
        return p is not prims.pad_p or reached == [True, False]
    if p is prims.dynamic_slice_p:
        return not any(reached[1:])
    if p in WRITES:
        return not reached[1] and (p is not prims.scatter_p or node.params.get("update_jaxpr") is None)
    if p is prims.gather_p:
        return not reached[1]
    return is_pointwise(node) and (can_be_bounded(node) or _is_whole(node) or p in _FUNCTIONS)


def _is_whole(node: Node) -> bool:
    p, dtypes = node.primitive, [dtype_of(o) for o in node.inputs]
    whole = all(d.kind in "iub" for d in dtypes) and node.outputs[0].aval.dtype.kind in "iub"
    return (whole and p in _WHOLE) or p in (prims.convert_element_type_p, prims.is_finite_p)


_WHOLE = frozenset(
    {
        *(prims.add_p, prims.sub_p, prims.mul_p, prims.neg_p, prims.max_p, prims.min_p, prims.clamp_p),
        *(prims.eq_p, prims.ne_p, prims.select_n_p, prims.copy_p, prims.stop_gradient_p),
        *COMPARES,
    }
)
_FUNCTIONS = frozenset({prims.exp_p, prims.log_p})
_ALONG = frozenset(
    {
        *(prims.reduce_sum_p, prims.reduce_max_p, prims.reduce_min_p, prims.reduce_and_p, prims.reduce_or_p),
        *(prims.cumsum_p, prims.cummax_p, prims.rev_p),
    }
)


# --- the rules ---


def replayed(node: Node, result: int, operands: Sequence[Any], same: bool = False) -> Held:
    """What one result of an equation can be; operands that are known are intervals without width."""
    p = node.primitive
    out = node.outputs[result].aval
    if p is not prims.sort_p and any(isinstance(o, Order) for o in operands):
        order = _of_an_order(node, operands[0])
        if order is not None:
            return order
        operands = [
            _entries(o, shape_of(i)) if isinstance(o, Order) else o for o, i in zip(operands, node.inputs, strict=True)
        ]
    first = operands[0]
    if p is compat.OPTIMIZATION_BARRIER:
        return operands[result]
    if p in _RULES:
        return _RULES[p](node, result, operands)
    if moves_only(node):
        return first.map(lambda end: _bound(node, [end])[result])
    if p is prims.pad_p:
        return first.map(lambda end: _bound(node, [end, operands[1].low.astype(end.dtype)])[0])
    if p is prims.convert_element_type_p:
        return _converted(first, dtype_of(node.inputs[0]), out.dtype)
    if p is prims.is_finite_p:
        return _is_finite(first)
    if out.dtype.kind in "iu":
        return _of_whole_numbers(node, operands)
    if p in _FUNCTIONS:
        return (reductions.exponential if p is prims.exp_p else reductions.logarithm)(first, out.dtype)
    made = applied(node, operands, same)
    return _masked(node, operands, made) if p in _SHIFTED and made.low.dtype != jnp.bool_ else made


def _bound(node: Node, operands: Sequence[Any]) -> Any:
    if node.primitive.multiple_results:
        return node.primitive.bind(*operands, **node.params)
    return compat.bind(node.eqn, operands)


def _masked(node: Node, operands: Sequence[Interval], made: Interval) -> Interval:
    """Where the first operand may be minus infinity, or a number that stands for it, and the other is of usual size.

    Such sums, and products with what is positive, are no NaN, and rise with it: so the upper end is that of a larger
    one, and the lower end is minus infinity.
    """
    if node.primitive in (prims.add_p, prims.add_jaxvals_p):
        for one, other in (operands, operands[::-1]):
            made = _masked_by(node, one, other, made, operands)
        return made
    return _masked_by(node, operands[0], operands[1], made, operands)


def _masked_by(node: Node, masked: Interval, other: Interval, made: Interval, operands: Sequence[Interval]) -> Interval:
    usual = (jnp.abs(other.low) < -DEEP) & (jnp.abs(other.high) < -DEEP)
    if node.primitive in (prims.mul_p, prims.div_p):
        usual &= other.low > 1e-6
        usual &= other.high < 1e6
    deep = usual & (masked.low < DEEP) & (masked.high < -DEEP)
    raised = masked.map(lambda end: jnp.maximum(end, DEEP))
    least = applied(node, [raised if o is masked else o for o in operands])
    return Interval(jnp.where(deep, -jnp.inf, made.low), jnp.where(deep, least.high, made.high))


def _is_finite(a: Interval) -> Interval:
    known = ~(jnp.isnan(a.low) | jnp.isnan(a.high))
    sure = known & jnp.isfinite(a.low) & jnp.isfinite(a.high)
    never = known & (a.low == a.high) & jnp.isinf(a.low)
    return Interval(sure, ~never)


def _converted(a: Interval, before: Any, after: Any) -> Interval:
    if after == jnp.bool_:
        zero = (a.low == 0) & (a.high == 0)
        never = (a.low > 0) | (a.high < 0)
        return Interval(never, ~zero) if before != jnp.bool_ else a
    held = a.map(lambda end: end.astype(jnp.float32))
    if after.kind in "iu":
        if before.kind not in "iub":
            held = held.map(jnp.trunc)
        kind = jnp.iinfo(after)
        fits = (held.low >= float(max(kind.min, -(2**24)))) & (held.high <= float(min(kind.max, 2**24)))
        return held.map(lambda end: jnp.where(fits, end, jnp.nan))
    if jnp.finfo(after).bits >= 32:
        return held
    made = intervals.narrowed(held, after)
    deep = held.low < DEEP
    return Interval(jnp.where(deep, -jnp.inf, made.low), jnp.where(deep, jnp.maximum(held.high, DEEP), made.high))


def _of_whole_numbers(node: Node, operands: Sequence[Interval]) -> Interval:
    p, first = node.primitive, operands[0]
    if p in (prims.add_p, prims.sub_p, prims.mul_p):
        second = intervals.negative(operands[1]) if p is prims.sub_p else operands[1]
        if p is not prims.mul_p:
            return reductions.whole(Interval(first.low + second.low, first.high + second.high))
        ends = [x * y for x in first for y in second]
        low = jnp.minimum(jnp.minimum(ends[0], ends[1]), jnp.minimum(ends[2], ends[3]))
        high = jnp.maximum(jnp.maximum(ends[0], ends[1]), jnp.maximum(ends[2], ends[3]))
        return reductions.whole(Interval(low, high))
    if p is prims.neg_p:
        return intervals.negative(first)
    return applied(node, operands)


def _of_an_order(node: Node, order: Held) -> Order | None:
    """An order that is moved, cut or turned round; None for anything else that is made of it."""
    p, last = node.primitive, len(shape_of(node.inputs[0])) - 1
    if not isinstance(order, Order):
        return None
    if p in (prims.convert_element_type_p, prims.copy_p, prims.stop_gradient_p):
        return order
    if p is prims.rev_p and tuple(node.params["dimensions"]) == (last,):
        return order.cut(order.held - 1, -1, order.held)
    if p is prims.slice_p and _keeps_rows(node):
        step = node.params["strides"][last] if node.params["strides"] else 1
        return order.cut(node.params["start_indices"][last], step, node.outputs[0].shape[last])
    if adds_an_axis(node):
        return order
    return None


def _entries(order: Order, shape: tuple[int, ...]) -> Interval:
    """The numbers of entries in an order, any of them."""
    return Interval(jnp.zeros(shape), jnp.full(shape, order.keys.low.shape[-1] - 1.0))


def _keeps_rows(node: Node) -> bool:
    before, after = shape_of(node.inputs[0]), node.outputs[0].shape
    return before[:-1] == after[:-1]


# --- along an axis ---


def _reduced(node: Node, result: int, operands: Sequence[Any]) -> Held:
    a, axes, dtype = operands[0], tuple(node.params["axes"]), node.outputs[0].aval.dtype
    p = node.primitive
    if p is prims.reduce_sum_p:
        return reductions.counted(a, axes) if dtype.kind in "iu" else reductions.summed(a, axes, dtype)
    if p is prims.reduce_max_p and dtype != jnp.bool_:
        return reductions.largest(a, axes)
    if p is prims.reduce_min_p and dtype != jnp.bool_:
        return intervals.negative(reductions.largest(intervals.negative(a), axes))
    every = p in (prims.reduce_and_p, prims.reduce_min_p)
    return a.map(lambda end: (jnp.all if every else jnp.any)(end, axis=axes))


def _running(node: Node, result: int, operands: Sequence[Any]) -> Held:
    a, axis, reverse = operands[0], node.params["axis"], node.params["reverse"]
    dtype = node.outputs[0].aval.dtype
    if node.primitive is prims.cummax_p:
        return a.map(lambda end: lax.cummax(end, axis=axis, reverse=reverse))
    if dtype.kind in "iu":
        made = a.map(lambda end: lax.cumsum(end, axis=axis, reverse=reverse))
        safe = jnp.sum(a.magnitude, axis=axis, keepdims=True) < 2.0**24
        return made.map(lambda end: jnp.where(safe, end, jnp.nan))
    return reductions.running(a, axis, reverse, dtype)


def _located(node: Node, result: int, operands: Sequence[Any]) -> Held:
    a = operands[0]
    if node.primitive is prims.argmin_p:
        a = intervals.negated(a) if a.low.dtype == jnp.bool_ else intervals.negative(a)
    return reductions.located(a, node.params["axes"][0])


def _top(node: Node, result: int, operands: Sequence[Any]) -> Held:
    top, a = top_k_of(node), operands[0]
    assert top is not None
    if result == 0:
        return reductions.sorted_entries(a, top.axis, top.k)
    return Order(a.map(lambda end: jnp.moveaxis(end, top.axis, -1)), 0, 1, top.k)


def _sorted(node: Node, result: int, operands: Sequence[Any]) -> Held:
    """A sort, or the order it puts numbers of entries in, or what it puts back to where it came from."""
    keys, axis = operands[0], node.params["dimension"]
    if isinstance(keys, Order):
        return _put_in_order(keys, result, operands)
    if result == 0:
        return reductions.sorted_entries(keys, axis)
    n = shape_of(node.inputs[0])[axis]
    falling = intervals.negative(keys).map(lambda end: jnp.moveaxis(end, axis, -1))
    return Order(falling, 0, 1, n)


def _put_in_order(order: Order, result: int, operands: Sequence[Any]) -> Held:
    """What a sort by the numbers of entries makes of what stands at their places."""
    if result == 0:
        return exactly(jnp.broadcast_to(jnp.arange(order.held, dtype=jnp.float32), order.keys.low.shape))
    payload = operands[1]
    assert isinstance(payload, Interval)
    return put_back(order, payload)


def _joined(node: Node, result: int, operands: Sequence[Any]) -> Held:
    axis = node.params["dimension"]
    return Interval(*(jnp.concatenate([o[i] for o in operands], axis=axis) for i in (0, 1)))


def _turned(node: Node, result: int, operands: Sequence[Any]) -> Held:
    return operands[0].map(lambda end: lax.rev(end, node.params["dimensions"]))


def _cut_at(node: Node, result: int, operands: Sequence[Any]) -> Held:
    starts = [o.low.astype(jnp.int32) for o in operands[1:]]
    return operands[0].map(lambda end: compat.bind(node.eqn, [end, *starts])[0])


def _gathered(node: Node, result: int, operands: Sequence[Any]) -> Held:
    """Entries at known places."""
    values, index = operands
    at = index.low.astype(jnp.int32)
    fill = node.params["fill_value"]
    params = dict(node.params, fill_value=None if isinstance(fill, int) else fill)
    return values.map(lambda end: compat.bind(node.eqn, [end, at], params)[0])


_RULES: dict[Any, Callable[[Node, int, Sequence[Any]], Held]] = {
    **dict.fromkeys(
        (prims.reduce_sum_p, prims.reduce_max_p, prims.reduce_min_p, prims.reduce_and_p, prims.reduce_or_p), _reduced
    ),
    **dict.fromkeys((prims.cumsum_p, prims.cummax_p), _running),
    **dict.fromkeys((prims.argmax_p, prims.argmin_p), _located),
    **dict.fromkeys((prims.top_k_p, prims.approx_top_k_p), _top),
    prims.sort_p: _sorted,
    prims.concatenate_p: _joined,
    prims.dynamic_slice_p: _cut_at,
    **dict.fromkeys(WRITES, written),
    prims.rev_p: _turned,
    prims.gather_p: _gathered,
}
