"""Answers for a value: is it a weight, and how is it computed once, outside the program?

A weight is an argument leaf marked as weights, or a closed-over array, reached only through layout and dtype
operations, a scan's slicing of its leading axis, or indexing a stack. The steps from the leaf to the value are its
``Recipe``: applied to the leaf when packing, never at run time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as prims

from hire_xform.passes import compat
from hire_xform.passes.compat import Literal
from hire_xform.passes.walk import Graph, Node, Operand, Scope, Value


@dataclass(frozen=True)
class Root:
    """Where a weight comes from.

    Attributes:
      kind: "const" for a closed-over array, else the argument: "arg0", "arg1", ...
      index: the array's identity (``id``), or the number of the leaf among the argument's array leaves.
    """

    kind: str
    index: int


@dataclass(frozen=True)
class Transpose:
    """Axis permutation."""

    perm: tuple[int, ...]

    def apply(self, x: Any) -> Any:
        """The step on an array."""
        return jnp.transpose(x, self.perm)


@dataclass(frozen=True)
class Reshape:
    """Row-major reshape."""

    shape: tuple[int, ...]

    def apply(self, x: Any) -> Any:
        """The step on an array."""
        return jnp.reshape(x, self.shape)


@dataclass(frozen=True)
class Convert:
    """Change of dtype."""

    dtype: Any

    def apply(self, x: Any) -> Any:
        """The step on an array."""
        return lax.convert_element_type(x, self.dtype)


@dataclass(frozen=True)
class Slice:
    """Static strided slice."""

    start: tuple[int, ...]
    limit: tuple[int, ...]
    strides: tuple[int, ...]

    def apply(self, x: Any) -> Any:
        """The step on an array."""
        return lax.slice(x, self.start, self.limit, self.strides)


@dataclass(frozen=True)
class Stack:
    """The leading axis is a stack of matrices, of which the program sees one at a time. ``size`` is its length."""

    size: int


Step = Transpose | Reshape | Convert | Slice | Stack


@dataclass(frozen=True)
class Recipe:
    """A weight as the program uses it: a leaf and the steps from it. Hashable; equal recipes are equal arrays."""

    root: Root
    steps: tuple[Step, ...] = ()

    def then(self, *steps: Step) -> Recipe:
        """This recipe with more steps, those that do nothing left out by the caller."""
        return Recipe(self.root, self.steps + steps)

    @property
    def is_leaf(self) -> bool:
        """True when it makes the leaf itself: no steps but stacks that are taken as they lie."""
        return all(isinstance(s, Stack) for s in self.steps)

    def apply(self, leaf: Any, finish: Callable[[Any], Any] = lambda x: x) -> Any:
        """Runs the steps, then ``finish``, on the leaf; over stack axes by ``vmap``, which the result leads with."""
        return _apply(self.steps, leaf, finish)


def _apply(steps: Sequence[Step], x: Any, finish: Callable[[Any], Any]) -> Any:
    for i, step in enumerate(steps):
        if isinstance(step, Stack):
            return jax.vmap(lambda y: _apply(steps[i + 1 :], y, finish))(x)  # noqa: B023 - used before i moves on
        x = step.apply(x)
    return finish(x)


@dataclass(frozen=True, eq=False, repr=False)
class ScanSlice:
    """One stack axis, resolved by the scan that opened ``scope``."""

    scope: Scope


@dataclass(frozen=True, eq=False, repr=False)
class IndexSlice:
    """One stack axis, resolved by an index that ``node`` (a dynamic_slice or a gather) takes.

    Attributes:
      node: the equation.
      operand: which of its operands holds the index.
      entry: where in that operand, flattened, the index stands.
      fills: True when an index out of range gives NaN instead of the nearest slice.
    """

    node: Node
    operand: int
    entry: int = 0
    fills: bool = False

    @property
    def index(self) -> Operand:
        """The run-time index operand."""
        return self.node.inputs[self.operand]


Ref = ScanSlice | IndexSlice


@dataclass(frozen=True)
class Origin:
    """A weight value: its recipe, and what resolves each stack axis at run time, outermost first."""

    recipe: Recipe
    refs: tuple[Ref, ...] = ()


class Provenance:
    """Origins of all weight values of a graph.

    Args:
      graph: the program.
      roots: for each of the top scope's inputs the root it is as a weight, or None.

    Attributes:
      consts: closed-over arrays that are weights, by identity.
    """

    def __init__(self, graph: Graph, roots: Sequence[Root | None]):
        self._origins: dict[Value, Origin] = {}
        self._derived: dict[Value, str] = {}
        self.consts: dict[int, Any] = {}
        for value, root in zip(graph.top.inputs, roots, strict=True):
            if root is not None:
                self._origins[value] = Origin(Recipe(root))
        self._scope(graph.top)

    def origin(self, operand: Operand) -> Origin | None:
        """How a value is computed from a weight leaf; None when it is not a weight."""
        if isinstance(operand, Literal):
            return None
        if operand.const is not None:
            self.consts[id(operand.const)] = operand.const
            return Origin(Recipe(Root("const", id(operand.const))))
        return self._origins.get(operand)

    def derived(self, operand: Operand) -> str | None:
        """For a value computed from weights alone but by more than layout and dtype: the operation that did it."""
        return self._derived.get(operand) if isinstance(operand, Value) else None

    def _scope(self, scope: Scope) -> None:
        for value in scope.inputs:
            if scope.kind == "top" or value.outer is None:
                continue
            origin = self.origin(value.outer)
            if origin is not None and value.scanned:
                size = shape_of(value.outer)[0]
                origin = Origin(origin.recipe.then(Stack(size)), (*origin.refs, ScanSlice(scope)))
            if origin is not None:
                self._origins[value] = origin
            elif (how := self.derived(value.outer)) is not None:
                self._derived[value] = how
        for node in scope.nodes:
            self._node(node)
            for child in node.children:
                self._scope(child)

    def _node(self, node: Node) -> None:
        if not node.inputs or node.children:
            return
        if node.primitive is compat.OPTIMIZATION_BARRIER:
            for operand, result in zip(node.inputs, node.outputs, strict=True):
                self._set(result, self.origin(operand))
            return
        if not isinstance(node.inputs[0], Value):
            return
        origin = self.origin(node.inputs[0])
        rule = _RULES.get(node.primitive)
        if origin is not None and rule is not None:
            results = rule(node, origin)
            if results is not None:
                for result, found in zip(node.outputs, results, strict=True):
                    self._set(result, found)
                return
        self._mark_derived(node)

    def _set(self, value: Value, origin: Origin | None) -> None:
        if origin is not None:
            self._origins[value] = origin

    def _mark_derived(self, node: Node) -> None:
        some = False
        # Which part of a weight is picked may hang on the data; that it is a part of a weight does not.
        for v in node.inputs[:1] if _picks_matrix(node) else node.inputs:
            if isinstance(v, Value):
                if v.const is None and v not in self._origins and v not in self._derived:
                    return
                some = True
        if some:
            how = f"{node.primitive} at {node.source}"
            for result in node.outputs:
                self._derived[result] = how


def shape_of(operand: Operand) -> tuple[int, ...]:
    """The shape of a value or literal."""
    aval: Any = operand.aval
    return tuple(aval.shape)


def _dtype_of(operand: Operand) -> Any:
    aval: Any = operand.aval
    return aval.dtype


Rule = Callable[[Node, Origin], "list[Origin] | None"]


def _extended(origin: Origin, *steps: Step) -> list[Origin]:
    return [dataclasses.replace(origin, recipe=origin.recipe.then(*steps))]


def _same(node: Node, origin: Origin) -> list[Origin]:
    return [origin]


def _reshape(node: Node, origin: Origin) -> list[Origin] | None:
    if node.params.get("dimensions") is not None:
        return None
    return _extended(origin, Reshape(node.outputs[0].shape))


def _squeeze(node: Node, origin: Origin) -> list[Origin]:
    return _extended(origin, Reshape(node.outputs[0].shape))


def _transpose(node: Node, origin: Origin) -> list[Origin]:
    return _extended(origin, Transpose(tuple(node.params["permutation"])))


def _convert(node: Node, origin: Origin) -> list[Origin] | None:
    # Only between floating types: a cast to integers is not a layout change of a matrix of weights.
    source, target = _dtype_of(node.inputs[0]), np.dtype(node.params["new_dtype"])
    if not (jnp.issubdtype(source, jnp.floating) and jnp.issubdtype(target, jnp.floating)):
        return None
    return _extended(origin, Convert(target)) if source != target else [origin]


def _broadcast(node: Node, origin: Origin) -> list[Origin] | None:
    # Only axes of length one are added: the same elements in the same order.
    if len(node.inputs) != 1 or math.prod(node.outputs[0].shape) != math.prod(shape_of(node.inputs[0])):
        return None
    return _extended(origin, Reshape(node.outputs[0].shape))


def _slice(node: Node, origin: Origin) -> list[Origin]:
    start, limit = tuple(node.params["start_indices"]), tuple(node.params["limit_indices"])
    strides = node.params["strides"] or (1,) * len(start)
    return _extended(origin, Slice(start, limit, tuple(strides)))


def _split(node: Node, origin: Origin) -> list[Origin]:
    axis, found, at = node.params["axis"], [], 0
    shape = shape_of(node.inputs[0])
    for size in (int(s) for s in node.params["sizes"]):
        start, limit = [0] * len(shape), list(shape)
        start[axis], limit[axis] = at, at + size
        found.extend(_extended(origin, Slice(tuple(start), tuple(limit), (1,) * len(shape))))
        at += size
    return found


def _dynamic_slice(node: Node, origin: Origin) -> list[Origin] | None:
    shape, sizes = shape_of(node.inputs[0]), tuple(node.params["slice_sizes"])
    indexed = [axis for axis, (have, take) in enumerate(zip(shape, sizes, strict=True)) if have != take]
    if not _picks_matrix(node) or not indexed or any(sizes[axis] != 1 for axis in indexed):
        return None
    return _indexed(node, origin, indexed, [IndexSlice(node, 1 + axis) for axis in indexed])


def _gather(node: Node, origin: Origin) -> list[Origin] | None:
    """One whole slice: every indexed axis is taken at one index, and the others are kept as they are."""
    numbers, mode = node.params["dimension_numbers"], node.params["mode"]
    shape, sizes = shape_of(node.inputs[0]), tuple(node.params["slice_sizes"])
    axes = tuple(numbers.start_index_map)
    fills = mode == lax.GatherScatterMode.FILL_OR_DROP
    if not _picks_matrix(node) or math.prod(shape_of(node.inputs[1])) != len(axes) or numbers.operand_batching_dims:
        return None
    if fills:
        value = node.params["fill_value"]
        if not jnp.issubdtype(_dtype_of(node.inputs[0]), jnp.floating) or not (value is None or np.isnan(value)):
            return None
    elif mode not in (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS):
        return None
    # An axis taken whole is indexed by zero wherever it is in range, so its index says nothing unless it fills.
    indexed = [axis for axis in axes if fills or shape[axis] != sizes[axis]]
    kept = [axis for axis in range(len(shape)) if axis not in indexed]
    if any(sizes[axis] != 1 for axis in indexed) or any(sizes[axis] != shape[axis] for axis in kept):
        return None
    return _indexed(node, origin, indexed, [IndexSlice(node, 1, axes.index(axis), fills) for axis in indexed])


def _indexed(node: Node, origin: Origin, axes: list[int], refs: list[IndexSlice]) -> list[Origin]:
    """The slice that ``refs`` take along ``axes``, as a stack."""
    shape = shape_of(node.inputs[0])
    to_front = (*axes, *(axis for axis in range(len(shape)) if axis not in axes))
    steps: list[Step] = [] if to_front == tuple(range(len(shape))) else [Transpose(to_front)]
    steps += [*(Stack(shape[axis]) for axis in axes), Reshape(node.outputs[0].shape)]
    return [Origin(origin.recipe.then(*steps), (*origin.refs, *refs))]


def _picks_matrix(node: Node) -> bool:
    """True for an index or slice that takes matrices, where a look-up of embeddings takes rows."""
    if node.primitive not in (prims.gather_p, prims.dynamic_slice_p):
        return False
    return sum(size > 1 for size in node.params["slice_sizes"]) >= 2


_RULES: dict[Any, Rule] = {
    prims.reshape_p: _reshape,
    prims.squeeze_p: _squeeze,
    prims.transpose_p: _transpose,
    prims.convert_element_type_p: _convert,
    prims.broadcast_in_dim_p: _broadcast,
    prims.slice_p: _slice,
    compat.SPLIT: _split,
    prims.dynamic_slice_p: _dynamic_slice,
    prims.gather_p: _gather,
    prims.copy_p: _same,
    prims.name_p: _same,
    prims.stop_gradient_p: _same,
    prims.device_put_p: _same,
    prims.sharding_constraint_p: _same,
}
