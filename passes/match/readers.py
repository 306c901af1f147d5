"""What reads a product's output as logits: the evidence that it is a vocabulary projection, and what is to be proved.

A wide product that leaves the program may be anything: keys and values, random features, a regression. What makes it
the logits of a vocabulary is a reader that a head has (an arg max, a top-k, a softmax), or that it is returned by a
program that looks up rows of as many entries by id. All else needs a word of the user.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from jax.extend.core import primitives as prims

from hire_xform.passes.ir import compat
from hire_xform.passes.ir.axis_rules import is_pointwise, moves_only
from hire_xform.passes.ir.graph import Graph, Node, Operand, Value, carry_of
from hire_xform.passes.ir.pointwise import known_number
from hire_xform.passes.match.negative_zeros import source_of_replaced_zeros
from hire_xform.passes.match.output_axis import Fate
from hire_xform.passes.match.top_k import top_k_of
from hire_xform.passes.weights.origins import shape_of
from hire_xform.passes.weights.products import Product
from hire_xform.passes.weights.provenance import Provenance

# Equations between a value and the exponential that it is made of.
_TO_EXP = 6


@dataclass(frozen=True, eq=False, repr=False)
class Reader:
    """Something that takes the axis of logits as a whole.

    Attributes:
      kind: "arg max", "top-k" (of the ``k`` largest), "arg min" and "bottom-k" of the smallest, "softmax" (or a sum of
        exponentials), "returned", or "picked", of a number picked by a draw among ranks. What is made of all logits
        and has no entry for each: "number", of floats, and "decision", of what these decide.
      node: the equation; None for what is returned.
      value: what it reads.
      dims: where the axis is in it.
      k: of a top-k.
      slope: whether what it reads rises with the logits (1), falls (-1), or neither is known (0).
    """

    kind: Literal["arg max", "top-k", "arg min", "bottom-k", "softmax", "returned", "picked", "number", "decision"]
    node: Node | None
    value: Value
    dims: frozenset[int]
    k: int = 1
    slope: int = 0

    @property
    def inverted(self) -> bool:
        """True where it takes the smallest of what it reads."""
        return self.kind in ("arg min", "bottom-k")

    @property
    def has_places(self) -> bool:
        """True where what it reads has an entry for each of some logits, of which it takes the best."""
        return self.kind not in ("picked", "number", "decision")

    @property
    def wants(self) -> int:
        """1 where the largest logits decide, -1 where the smallest do, 0 where neither is known."""
        return -self.slope if self.inverted else self.slope

    @property
    def where(self) -> str:
        """For messages: the reader and its source line."""
        return "the program's result" if self.node is None else f"{self.node.primitive} at {self.node.source}"


def readers_of(product: Product, fate: Fate) -> list[Reader]:
    """Everything that takes the axis as a whole, in the order in which it was met; entries drawn from it are not."""
    found: list[Reader] = []
    slopes = Slopes(product, fate)
    for value, dims in fate.axes.items():
        if value in fate.drawn:
            continue
        for node in value.consumers:
            reader = _reader(node, value, dims)
            if reader is not None:
                found.append(dataclasses.replace(reader, slope=slopes.of(reader.value)))
        if value.is_output and value.scope.node is None:
            found.append(Reader("returned", None, value, dims, slope=slopes.of(value)))
    return found


def others_of(fate: Fate, readers: Sequence[Reader], unseen: Callable[[Node], bool] = lambda node: False) -> list[str]:
    """What else takes entries of the axis, or adds them up: for messages. A largest entry is that of an arg max.

    Args:
      fate: what becomes of the axis.
      readers: what is known to take it.
      unseen: whether nothing that is made by an equation is seen but by what is proved.
    """
    known = {reader.node for reader in readers}
    found = []
    for kind, node in fate.events:
        if node is None or kind not in ("reduced", "gathered", "mixed") or node in known:
            continue
        operand = node.inputs[0]
        if (
            unseen(node)
            or node.primitive is prims.reduce_max_p
            or (isinstance(operand, Value) and operand in fate.drawn)
        ):
            continue
        if node.primitive in (prims.reduce_sum_p, prims.sort_p, prims.gather_p, prims.dynamic_slice_p, prims.slice_p):
            found.append(f"{node.primitive} at {node.source}")
    return list(dict.fromkeys(found))


def _reader(node: Node, value: Value, dims: frozenset[int]) -> Reader | None:
    p, params = node.primitive, node.params
    if p in (prims.argmax_p, prims.argmin_p):
        kind: Literal["arg max", "arg min"] = "arg max" if p is prims.argmax_p else "arg min"
        return Reader(kind, node, value, dims) if dims & set(params["axes"]) else None
    if p is prims.approx_top_k_p and not params["is_max_k"]:
        axis = params["reduction_dimension"] % len(value.shape)
        return Reader("bottom-k", node, value, dims, params["k"]) if axis in dims else None
    if p in (prims.top_k_p, prims.approx_top_k_p):
        top = top_k_of(node)
        if top is None:
            return None
        return Reader("top-k", node, value, dims, top.k) if top.axis in dims else None
    if p is prims.cumlogsumexp_p and params["axis"] in dims:
        return Reader("softmax", node, value, dims)
    if p is prims.reduce_sum_p and dims & set(params["axes"]):
        made = exponent_of(value)
        return None if made is None else Reader("softmax", node, made, dims)
    return None


def exponent_of(value: Value) -> Value | None:
    """What a value is the exponential of, through casts and masks; None for one that is none."""
    for _ in range(_TO_EXP):
        node = value.node
        if node is None:
            return None
        if node.primitive in (prims.exp_p, prims.exp2_p):
            return node.inputs[0] if isinstance(node.inputs[0], Value) else None
        if node.primitive not in _AROUND_EXP:
            return None
        operands = [o for o in node.inputs if isinstance(o, Value) and o.shape == value.shape and _is_float(o)]
        if len(operands) != 1 and node.primitive is not prims.select_n_p:
            return None
        if not operands:
            return None
        value = operands[-1]
    return None


_AROUND_EXP = frozenset({prims.convert_element_type_p, prims.mul_p, prims.select_n_p, prims.copy_p, prims.name_p})


def _is_float(value: Value) -> bool:
    return value.aval.dtype.kind in "fV"


# --- whether what is read rises with the logits ---

_RISING = {compat.PVARY, compat.RESHARD} | compat.primitives_named(
    "add add_jaxvals asinh atan cbrt clamp convert_element_type copy erf exp exp2 expm1 log log1p logistic max min "
    "name reduce_precision select_n sharding_constraint sinh sqrt stop_gradient tanh"
)
_FALLING = frozenset({prims.neg_p, prims.erfc_p})


class Slopes:
    """For each value that holds the axis, whether an entry rises (1) or falls (-1) with its logit; 0: not known."""

    def __init__(self, product: Product, fate: Fate):
        self._fate = fate
        self._known: dict[Value, int | None] = {product.out: 1}

    def of(self, value: Value) -> int:
        """The slope of a value, factors that are not known taken as positive, as a temperature is."""
        found = self._of(value)
        return 0 if found is None else found

    def _of(self, value: Value) -> int | None:
        if value not in self._known:
            self._known[value] = None  # while it is looked for: a loop's state says nothing of itself
            self._known[value] = self._found(value)
        return self._known[value]

    def _found(self, value: Value) -> int | None:
        node = value.node
        if node is None:
            carry = carry_of(value)
            sources: list[Operand] = [o for o in (value.outer, carry) if o is not None]
            return self._together(sources)
        if node.children:
            place = node.outputs.index(value)
            return self._together([child.outputs[place] for child in node.children])
        places = [i for i, o in enumerate(node.inputs) if isinstance(o, Value) and o in self._fate.axes]
        if not is_pointwise(node):
            return self._together([node.inputs[i] for i in places])
        return self._pointwise(node, places)

    def _together(self, operands: Iterable[Operand]) -> int | None:
        held = [o for o in operands if isinstance(o, Value) and o in self._fate.axes]
        return _agreed([self._of(o) for o in held])

    def _pointwise(self, node: Node, places: list[int]) -> int | None:
        p = node.primitive
        slopes = [self._of(node.inputs[i]) for i in places]  # type: ignore[arg-type]
        if p in _FALLING:
            return _flipped(slopes[0])
        if p is prims.sub_p:
            return _agreed([_flipped(s) if i == 1 else s for i, s in zip(places, slopes, strict=True)])
        if p in (prims.mul_p, prims.div_p):
            if len(places) > 1 or (p is prims.div_p and places[0] == 1):
                return 0
            number = known_number(node.inputs[1 - places[0]])
            return _flipped(slopes[0]) if number is not None and number < 0 else 0 if number == 0 else slopes[0]
        if p is prims.integer_pow_p:
            return slopes[0] if node.params["y"] > 0 and node.params["y"] % 2 else 0
        if (source := source_of_replaced_zeros(node)) is not None:
            return self._of(source)
        if p is prims.select_n_p and 0 in places:
            return 0
        if p in _RISING or p is compat.OPTIMIZATION_BARRIER:
            return _agreed(slopes)
        return 0


def _flipped(slope: int | None) -> int | None:
    return None if slope is None else -slope


def _agreed(slopes: list[int | None]) -> int | None:
    known = {s for s in slopes if s is not None}
    return known.pop() if len(known) == 1 else 0 if known else None


# --- what tells a vocabulary ---


def rows_looked_up(graph: Graph, provenance: Provenance) -> frozenset[int]:
    """How many rows there are in each weight of which rows are taken by id, as an embedding's are."""
    found: set[int] = set()
    for node in graph.program_order():
        if node.primitive in (prims.gather_p, prims.dynamic_slice_p):
            operand = node.inputs[0]
            if provenance.origin(operand) is not None or provenance.derived(operand) is not None:
                found.update(_rows_taken(node))
        elif node.primitive is prims.dot_general_p:
            found.update(_one_hot_rows(node, provenance))
    return frozenset(found)


def _rows_taken(node: Node) -> set[int]:
    """Lengths of the axes along which single rows are taken: all else of the weight is one axis, taken whole."""
    shape, sizes = shape_of(node.inputs[0]), tuple(node.params["slice_sizes"])
    axes = range(len(shape))
    if node.primitive is prims.gather_p:
        axes = node.params["dimension_numbers"].start_index_map
    if sum(size > 1 for size in sizes) != 1:
        return set()
    return {shape[a] for a in axes if sizes[a] == 1 < shape[a]}


def _one_hot_rows(node: Node, provenance: Provenance) -> set[int]:
    """The same of a product with one-hot rows."""
    (lc, rc), _ = node.params["dimension_numbers"]
    for x, weight, contract in ((node.inputs[0], node.inputs[1], rc), (node.inputs[1], node.inputs[0], lc)):
        if provenance.origin(weight) is None or not isinstance(x, Value):
            continue
        while x.node is not None and (x.node.primitive is prims.convert_element_type_p or moves_only(x.node)):
            source = x.node.inputs[0]
            if not isinstance(source, Value):
                break
            x = source
        if x.node is not None and x.node.primitive is prims.eq_p:
            return {math.prod(shape_of(weight)[d] for d in contract)}
    return set()


def larger_summand(product: Product, fate: Fate) -> str | None:
    """The product whose output this one's is added to, where it reads more weights: a summand of it is no head."""
    for node, places in fate.joins.items():
        if node.primitive not in (prims.add_p, prims.add_jaxvals_p, prims.sub_p):
            continue
        for i, operand in enumerate(node.inputs):
            if i in places or not isinstance(operand, Value) or operand in fate.axes:
                continue
            other = _wide_product(operand, product.width)
            if other is not None and _weight_size(other) > math.prod(product.weight.shape):
                return (
                    f"its output is added at {node.source} to that of {other.path}, which is larger: a summand is no "
                    "head"
                )
    return None


def _wide_product(value: Value, width: int) -> Node | None:
    """The product of as many outputs that a value is made of by moving and pointwise equations."""
    queue, seen = [value], {value}
    while queue and len(seen) <= 64:
        node = queue.pop().node
        if node is None:
            continue
        if node.primitive is prims.dot_general_p:
            if width in node.outputs[0].shape:
                return node
            continue
        if is_pointwise(node) or moves_only(node):
            operands = [o for o in node.inputs if isinstance(o, Value) and o not in seen]
            queue += operands
            seen.update(operands)
    return None


def _weight_size(node: Node) -> int:
    return max(math.prod(shape_of(o)) for o in node.inputs)
