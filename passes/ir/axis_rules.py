"""The axis algebra: one rule for each JAX primitive that says where the axes of its operands go in its results.

Whatever follows an axis asks these rules: the hidden axis backwards to the products that make it, logits forwards to
their readers. A primitive without a rule ends the way. ``register_axis_rule`` teaches a new one, from outside too.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jax.extend.core import primitives as prims

from hire_xform.passes.ir import compat
from hire_xform.passes.ir.compat import Eqn
from hire_xform.passes.ir.graph import Node
from hire_xform.passes.ir.links import How, Link, behind, permuted, regrouped, sliced, straight, without
from hire_xform.passes.ir.registry import enter


class Kind(enum.Enum):
    """What a primitive does to values, whatever their axes."""

    POINTWISE = "each element of the one result hangs on the operands' elements there alone"
    MOVES = "the elements of the one operand are moved, copied or left out, and no more"
    HANDED = "each operand is handed through as the result of its number"
    OTHER = "anything else"


class AxisRule(Protocol):
    """What a primitive does to the axes of its operands.

    The contract, which ``tests/passes/ir/test_axis_rules.py`` holds the rules of JAX's own primitives to:

    * ``kind`` is true of every equation of the primitive. ``Kind.POINTWISE`` promises that each operand is a scalar or
      of the result's rank with axes of length one stretched to the result's, and that the primitive can be bound again
      with the same parameters to operands of other shapes that fit each other: that is how a block is replayed on some
      of its units. An equation with operands of another rank, or with an effect, is taken for none. ``Kind.MOVES``
      promises that the links are of ``How.SAME``, ``CUT`` and ``STRETCHED`` only, and that a dimension of the result
      that no link names is the same all along.
    * ``links`` states for each dimension of each operand what becomes of its entries. A link that is stated holds; of a
      dimension that none is stated for nothing may be taken for granted, unless its length is one. Two links of one
      operand and result have no dimension in common.

    ``POINTWISE`` is the rule of a primitive that acts on each element alone.
    """

    @property
    def kind(self) -> Kind:
        """What it does to values."""

    def links(self, eqn: Eqn, /) -> Sequence[Link]:
        """Where axes go in one equation, by the shapes of its operands and results and its parameters."""


@dataclass(frozen=True)
class Rule:
    """An axis rule, of a function that makes the links of an equation."""

    links: Callable[[Eqn], Sequence[Link]]
    kind: Kind = Kind.OTHER


_RULES: dict[Any, AxisRule] = {}


def register_axis_rule(primitive: Any, rule: AxisRule) -> Callable[[], None]:
    """Teaches the library what a primitive does to axes, in place of what it knew.

    A block with such a primitive between its products, or logits that go through it, are then followed as any other.

    Args:
      primitive: the ``jax.extend.core.Primitive``, matched by identity.
      rule: see ``AxisRule``; ``POINTWISE`` for one that acts on each element alone.

    Returns:
      What takes the rule away again, and puts back what was known.
    """
    return enter(_RULES, primitive, rule)


def registered() -> dict[Any, AxisRule]:
    """The rules that are known, by primitive."""
    return dict(_RULES)


# --- what is asked of them ---


def kind_of(node: Node) -> Kind | None:
    """What an equation does to values; None where no rule applies to it."""
    rule = _RULES.get(node.primitive)
    if rule is None or (rule.kind is Kind.POINTWISE and not _fit(node.eqn)):
        return None
    return rule.kind


def _fit(eqn: Any) -> bool:
    """Whether an equation of a pointwise primitive is so: bits of an element may be cut in parts, which are an axis."""
    rank, most = len(eqn.outvars[0].aval.shape), 0
    for operand in eqn.invars:
        have = len(operand.aval.shape)
        if have and have != rank:
            return False
        most = max(most, have)
    return most == rank and not eqn.effects


def links_of(node: Node) -> Sequence[Link] | None:
    """Where the axes of an equation's operands go; None where no rule applies to it."""
    return None if kind_of(node) is None else _RULES[node.primitive].links(node.eqn)


def is_pointwise(node: Node) -> bool:
    """True for an equation that acts on each element alone and has no effect."""
    rule = _RULES.get(node.primitive)
    if rule is None:
        return False
    return _fit(node.eqn) if rule.kind is Kind.POINTWISE else rule.kind is Kind.HANDED


def moves_only(node: Node) -> bool:
    """True for equations that only move the elements of their operand: layouts, static slices, splits."""
    rule = _RULES.get(node.primitive)
    return rule is not None and rule.kind is Kind.MOVES and len(node.inputs) == 1


# --- the rules ---


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(atom.aval.shape)


def _each(eqn: Eqn) -> list[Link]:
    target = _shape(eqn.outvars[0])
    return [
        Link((d,), (d,), How.EACH if size == target[d] else How.STRETCHED, operand=i)
        for i, operand in enumerate(eqn.invars)
        for d, size in enumerate(_shape(operand))
    ]


POINTWISE: AxisRule = Rule(_each, Kind.POINTWISE)

_POINTWISE = compat.primitives_named(
    "abs add add_jaxvals acos acosh and asin asinh atan atan2 atanh bessel_i0e bessel_i1e bitcast_convert_type cbrt "
    "ceil clamp convert_element_type copy cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt "
    "integer_pow is_finite le lgamma log log1p logistic lt max min mul name ne neg nextafter not or pow real "
    "reduce_precision rem round rsqrt select_n sharding_constraint shift_left shift_right_arithmetic "
    "shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor"
)
for _primitive in (*_POINTWISE, compat.PVARY, compat.RESHARD):
    register_axis_rule(_primitive, POINTWISE)

Links = Callable[[Eqn], Sequence[Link]]


def _of(*primitives: Any, kind: Kind = Kind.OTHER) -> Callable[[Links], Links]:
    """Registers a function that makes links as the rule of some primitives; those that JAX has not are None."""

    def register(links: Links) -> Links:
        for primitive in primitives:
            if primitive is not None:
                register_axis_rule(primitive, Rule(links, kind))
        return links

    return register


@_of(compat.OPTIMIZATION_BARRIER, kind=Kind.HANDED)
def _handed(eqn: Eqn) -> list[Link]:
    return [
        link
        for i, operand in enumerate(eqn.invars)
        for link in straight(range(len(_shape(operand))), operand=i, result=i)
    ]


@_of(prims.reshape_p, prims.squeeze_p, kind=Kind.MOVES)
def _reshape(eqn: Eqn) -> list[Link]:
    before, after = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    order = eqn.params.get("dimensions") if eqn.primitive is prims.reshape_p else None  # a squeeze's are those dropped
    return regrouped(before, after) if order is None else behind(regrouped([before[d] for d in order], after), order)


@_of(prims.transpose_p, kind=Kind.MOVES)
def _transpose(eqn: Eqn) -> list[Link]:
    return permuted(eqn.params["permutation"])


@_of(prims.broadcast_in_dim_p, kind=Kind.MOVES)
def _broadcast(eqn: Eqn) -> list[Link]:
    after = _shape(eqn.outvars[0])
    sizes = zip(_shape(eqn.invars[0]), eqn.params["broadcast_dimensions"], strict=True)
    return [Link((d,), (e,), How.SAME if size == after[e] else How.STRETCHED) for d, (size, e) in enumerate(sizes)]


@_of(prims.slice_p, kind=Kind.MOVES)
def _slice(eqn: Eqn) -> list[Link]:
    start, before = eqn.params["start_indices"], _shape(eqn.invars[0])
    return sliced(before, _shape(eqn.outvars[0]), start, eqn.params["strides"] or (1,) * len(start))


@_of(compat.SPLIT, kind=Kind.MOVES)
def _split(eqn: Eqn) -> list[Link]:
    before, found, start = _shape(eqn.invars[0]), [], 0
    for number, result in enumerate(eqn.outvars):
        starts = [start * (d == eqn.params["axis"]) for d in range(len(before))]
        found += sliced(before, _shape(result), starts, (1,) * len(before), number)
        start += _shape(result)[eqn.params["axis"]]
    return found


@_of(compat.UNSTACK, kind=Kind.MOVES)
def _unstack(eqn: Eqn) -> list[Link]:
    axis, rank = eqn.params["axis"], len(_shape(eqn.invars[0]))
    return [
        Link(
            (d,), () if d == axis else (d - (d > axis),), How.CUT if d == axis else How.SAME, i * (d == axis), result=i
        )
        for i in range(len(eqn.outvars))
        for d in range(rank)
    ]


@_of(compat.STACK)
def _stack(eqn: Eqn) -> list[Link]:
    axis, rank = eqn.params["axis"], len(_shape(eqn.invars[0]))
    return [Link((d,), (d + (d >= axis),), operand=i) for i in range(len(eqn.invars)) for d in range(rank)]


@_of(prims.concatenate_p)
def _concatenate(eqn: Eqn) -> list[Link]:
    axis, found, start = eqn.params["dimension"], [], 0
    across = [(d,) for d in range(len(_shape(eqn.outvars[0]))) if d != axis]
    for i, operand in enumerate(eqn.invars):
        for d in across:
            found.append(Link(d, d, How.EACH, operand=i))
        found.append(Link((axis,), (axis,), How.PLACED, start, operand=i))
        start += _shape(operand)[axis]
    return found


@_of(prims.pad_p)
def _pad(eqn: Eqn) -> list[Link]:
    return [
        Link((d,), (d,), How.PLACED if any(by) else How.SAME, by[0], by[2] + 1)
        for d, by in enumerate(eqn.params["padding_config"])
    ]


@_of(prims.rev_p)
def _rev(eqn: Eqn) -> list[Link]:
    turned = eqn.params["dimensions"]
    return [
        Link((d,), (d,), How.PLACED, size - 1, -1) if d in turned else Link((d,), (d,))
        for d, size in enumerate(_shape(eqn.invars[0]))
    ]


@_of(prims.all_gather_p)
def _all_gather(eqn: Eqn) -> list[Link]:
    """All devices' parts: one after another along an axis, or stacked along a new one."""
    at, tiled, rank = eqn.params["all_gather_dimension"], eqn.params["tiled"], len(_shape(eqn.invars[0]))
    return [
        Link((d,), (d,), How.PLACED, step=0)
        if tiled and d == at
        else Link((d,), (d + (not tiled and d >= at),), How.EACH)
        for d in range(rank)
    ]


_LOCATES = {prims.argmax_p, prims.argmin_p}


@_of(
    prims.reduce_sum_p,
    prims.reduce_max_p,
    prims.reduce_min_p,
    prims.reduce_prod_p,
    prims.reduce_and_p,
    prims.reduce_or_p,
    *_LOCATES,
)
def _reduction(eqn: Eqn) -> list[Link]:
    how = How.LOCATED if eqn.primitive in _LOCATES else How.REDUCED
    return without(len(_shape(eqn.invars[0])), set(eqn.params["axes"]), how)


@_of(prims.cumsum_p, prims.cummax_p, prims.cummin_p, prims.cumprod_p, prims.cumlogsumexp_p)
def _cumulative(eqn: Eqn) -> list[Link]:
    axis = eqn.params["axis"]
    return [Link((d,), (d,), How.MIXED if d == axis else How.EACH) for d in range(len(_shape(eqn.invars[0])))]


@_of(prims.sort_p)
def _sort(eqn: Eqn) -> list[Link]:
    along = eqn.params["dimension"]
    return [
        Link((d,), (d,), How.ORDERED if d == along else How.EACH, operand=i, result=i)
        for i, operand in enumerate(eqn.invars)
        for d in range(len(_shape(operand)))
    ]


@_of(prims.top_k_p, prims.approx_top_k_p)
def _top_k(eqn: Eqn) -> list[Link]:
    """Of the values; the indices are others'."""
    rank = len(_shape(eqn.invars[0]))
    axis = eqn.params.get("axis", eqn.params.get("reduction_dimension", -1)) % rank
    return [Link((d,), (d,), How.ORDERED if d == axis else How.EACH) for d in range(rank)]


@_of(prims.dot_general_p)
def _product(eqn: Eqn) -> list[Link]:
    (contract, batch), found = eqn.params["dimension_numbers"], []
    at = len(batch[0])
    for i, operand in enumerate(eqn.invars):
        for d in range(len(_shape(operand))):
            if d in contract[i]:
                found.append(Link((d,), (), How.CONTRACTED, operand=i))
            elif d in batch[i]:
                found.append(Link((d,), (batch[i].index(d),), How.EACH, operand=i))
            else:
                found.append(Link((d,), (at,), How.EACH, operand=i))
                at += 1
    return found


@_of(prims.dynamic_slice_p)
def _dynamic_slice(eqn: Eqn) -> list[Link]:
    sizes = zip(_shape(eqn.invars[0]), eqn.params["slice_sizes"], strict=True)
    return [Link((d,), (d,), How.SAME if size == left else How.PICKED) for d, (size, left) in enumerate(sizes)]


@_of(prims.gather_p)
def _gather(eqn: Eqn) -> list[Link]:
    """Windows of the operand at indices; the result has the windows' dimensions, and those of the indices."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    windows = iter(numbers.offset_dims)
    places = [d for d in range(len(_shape(eqn.outvars[0]))) if d not in numbers.offset_dims]
    beside = dict(zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True))
    free = tuple(place for i, place in enumerate(places) if i not in beside.values())
    found = [Link((d,), (), How.PICKED, operand=1) for d in range(len(_shape(eqn.invars[1])))]
    for d, size in enumerate(_shape(eqn.invars[0])):
        if d in beside:
            found.append(Link((d,), (places[beside[d]],), How.EACH))
        elif d in numbers.collapsed_slice_dims:
            found.append(Link((d,), free, How.STRETCHED if size == 1 else How.PICKED))
        else:
            found.append(Link((d,), (next(windows),), How.EACH if sizes[d] == size else How.PICKED))
    return found


@_of(prims.dynamic_update_slice_p)
def _dynamic_update_slice(eqn: Eqn) -> list[Link]:
    dims = range(len(_shape(eqn.invars[0])))
    return [*straight(dims, How.WRITTEN), *straight(dims, How.STORED, operand=1)]


@_of(prims.scatter_p, prims.scatter_add_p, prims.scatter_mul_p, prims.scatter_min_p, prims.scatter_max_p)
def _scatter(eqn: Eqn) -> list[Link]:
    """Operand, indices, updates: windows of the updates are written at the indices."""
    numbers, rank = eqn.params["dimension_numbers"], len(_shape(eqn.invars[0]))
    dropped = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    goes = dict(zip(numbers.update_window_dims, ((d,) for d in range(rank) if d not in dropped), strict=True))
    updates = range(len(_shape(eqn.invars[2])))
    beside = dict(zip(numbers.scatter_indices_batching_dims, numbers.operand_batching_dims, strict=True))
    for i, d in enumerate([d for d in updates if d not in goes]):
        goes[d] = (beside[i],) if i in beside else tuple(numbers.scatter_dims_to_operand_dims)
    return [
        *straight(range(rank), How.WRITTEN),
        *(Link((d,), (), How.STORED, operand=1) for d in range(len(_shape(eqn.invars[1])))),
        *(Link((d,), goes[d], How.STORED, operand=2) for d in updates),
    ]
