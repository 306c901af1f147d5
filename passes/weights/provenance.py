"""Answers for a value: is it a weight, and how is it computed once, outside the program?

A weight is an argument leaf marked as weights, or a closed-over array, reached only through layout and dtype
operations, a scan's slicing of its leading axis, a shard_map's cutting, or indexing a stack. The steps from the leaf to
the value are its ``Recipe``: applied to the leaf when packing, never at run time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as prims

from hire_xform.passes.ir import compat
from hire_xform.passes.ir.axis_rules import links_of, moves_only
from hire_xform.passes.ir.compat import Literal
from hire_xform.passes.ir.graph import Graph, Node, Operand, Scope, Value, carried_inputs, dtype_of
from hire_xform.passes.ir.links import How
from hire_xform.passes.weights.recipe import Convert, Recipe, Reshape, Root, Slice, Stack, Step, Transpose, represents


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


@dataclass(frozen=True, eq=False, repr=False)
class ShardSlice:
    """One stack axis, of which each device has one entry: that of a dimension that a shard_map cuts.

    Attributes:
      scope: the shard_map's body.
      axes: the mesh axes, as its spec names them.
      parts: over how many devices it is cut.
      dim: the dimension.
      shape: what one device has of the whole.
    """

    scope: Scope
    axes: Any
    parts: int
    dim: int
    shape: tuple[int, ...]


Ref = ScanSlice | IndexSlice | ShardSlice


@dataclass(frozen=True)
class Origin:
    """A weight value: its recipe, and what resolves each stack axis at run time, outermost first.

    ``stored`` is the dtype of ``recipe.as_stored``, the narrowest one that is known to have its values: the leaf's, or
    the last one on the way that rounds.
    """

    recipe: Recipe
    refs: tuple[Ref, ...] = ()
    stored: Any = None


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
        # Of a value made of weights the operation that made it, and of what.
        self._derived: dict[Value, tuple[str, tuple[Operand, ...]]] = {}
        self._fixed: set[Value] = set()
        self.consts: dict[int, Any] = {}
        for value, root in zip(graph.top.inputs, roots, strict=True):
            if root is not None:
                self._origins[value] = Origin(Recipe(root), stored=dtype_of(value))
        self._scope(graph.top)

    def origin(self, operand: Operand) -> Origin | None:
        """How a value is computed from a weight leaf; None when it is not a weight."""
        if isinstance(operand, Literal):
            return None
        if operand.const is not None:
            self.consts[id(operand.const)] = operand.const
            return Origin(Recipe(Root("const", id(operand.const))), stored=dtype_of(operand))
        return self._origins.get(operand)

    def derived(self, operand: Operand) -> str | None:
        """For a value computed from weights alone but by more than layout and dtype: the operation that did it."""
        found = self._derived.get(operand) if isinstance(operand, Value) else None
        return None if found is None else found[0]

    def read_by(self, operands: Iterable[Operand]) -> dict[Root, int]:
        """The weights that some values are made of, in the order they are met, and the bytes read of each in a call.

        What is taken of a weight is read once in each execution of the scope that takes it.
        """
        parts: dict[tuple[Recipe, int], Root] = {}
        seen: set[Value] = set()
        queue = [o for o in operands if isinstance(o, Value)][::-1]
        while queue:
            value = queue.pop()
            if value in seen:
                continue
            seen.add(value)
            origin = self.origin(value)
            if origin is None:
                queue += [o for o in self._derived.get(value, ("", ()))[1] if isinstance(o, Value)][::-1]
                continue
            size = math.prod(value.shape) * np.dtype(origin.stored).itemsize * value.scope.iterations
            parts[origin.recipe, size] = origin.recipe.root
        read: dict[Root, int] = {}
        for (_, size), root in parts.items():
            read[root] = read.get(root, 0) + size
        return read

    def _scope(self, scope: Scope) -> None:
        for value in scope.inputs:
            if scope.kind == "top" or value.outer is None:
                continue
            origin = self.origin(value.outer)
            if origin is not None and value.scanned:
                size = shape_of(value.outer)[0]
                origin = _stacked(origin, [Stack(size)], [ScanSlice(scope)])
            if origin is not None and value.split:
                origin = _sharded(origin, value)
            if origin is not None:
                self._origins[value] = origin
            elif (how := self.derived(value.outer)) is not None:
                self._derived[value] = how, (value.outer,)
        for node in scope.nodes:
            self._node(node)
            for child in node.children:
                self._child(child)
            self._leave(node)

    def _child(self, scope: Scope) -> None:
        """An inner scope. Weights in its state that it changes count as computed, if it makes them of weights."""
        node = scope.node
        if node is None or scope.kind not in ("scan", "while"):
            self._scope(scope)
            return
        carry = carried_inputs(node)
        first = len(node.inputs) - len(scope.inputs) + (scope.inputs.index(carry[0]) if carry else 0)
        guessed = {
            i: value
            for i, value in enumerate(carry)
            if value.outer is None and self._is_weight_matrix(node.inputs[first + i])
        }
        while True:
            how = f"{node.primitive} at {node.source}"
            self._derived.update((value, (how, (node.inputs[first + i],))) for i, value in guessed.items())
            self._scope(scope)
            wrong = [i for i in guessed if not self._is_weight_matrix(scope.outputs[i])]
            if not wrong:
                return
            self._forget(scope)
            for i in wrong:
                del guessed[i]

    def _leave(self, node: Node) -> None:
        """Results of a loop or branch that are weights again, whichever way they were come by."""
        if not node.children:
            return
        for i, result in enumerate(node.outputs):
            made = [child.outputs[i] for child in node.children]
            stacked = node.children[0].kind == "scan" and i >= len(carried_inputs(node))
            if not stacked and all(self._is_weight_matrix(value) for value in made):
                self._derived[result] = f"{node.primitive} at {node.source}", tuple(made)

    def _forget(self, scope: Scope) -> None:
        for value in scope.inputs:
            self._origins.pop(value, None)
            self._derived.pop(value, None)
        for node in scope.nodes:
            for value in node.outputs:
                self._origins.pop(value, None)
                self._derived.pop(value, None)
            for child in node.children:
                self._forget(child)

    def _is_weight_matrix(self, operand: Operand) -> bool:
        if not _is_matrix(operand):
            return False
        return self.origin(operand) is not None or self.derived(operand) is not None

    def _node(self, node: Node) -> None:
        if node.children:
            return
        if node.primitive is compat.OPTIMIZATION_BARRIER:
            for operand, result in zip(node.inputs, node.outputs, strict=True):
                self._set(result, self.origin(operand))
            return
        origin = self.origin(node.inputs[0]) if node.inputs else None
        rule = _moved if moves_only(node) else _RULES.get(node.primitive)
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
        """Marks what is made of weights alone. Data may say which part of a weight is taken, and how it is scaled."""
        made_of = [v for v in node.inputs if isinstance(v, Value)]
        if made_of and all(self._is_data(v) for v in made_of):
            return
        if _picks_matrix(node):
            made_of = made_of[:1]
        elif any(_is_matrix(v) for v in made_of) and node.primitive not in _READS_BY_DATA:
            made_of = [v for v in made_of if math.prod(v.shape) > 1]
        made_of = [v for v in made_of if v not in self._fixed]
        if not made_of:
            self._fixed.update(node.outputs)
        elif all(v.const is not None or v in self._origins or v in self._derived for v in made_of):
            how = f"{node.primitive} at {node.source}"
            for result in node.outputs:
                self._derived[result] = how, tuple(made_of)

    def _is_data(self, value: Value) -> bool:
        fixed = value in self._fixed or value in self._origins or value in self._derived
        return not fixed and value.const is None


# With one row of data these give data: a product, and the look-up of one token.
_READS_BY_DATA = (prims.dot_general_p, prims.gather_p, prims.dynamic_slice_p)


def _is_matrix(operand: Operand) -> bool:
    """True for what has two axes longer than one."""
    return sum(size > 1 for size in shape_of(operand)) >= 2


def shape_of(operand: Operand) -> tuple[int, ...]:
    """The shape of a value or literal."""
    aval: Any = operand.aval
    return tuple(aval.shape)


Rule = Callable[[Node, Origin], "list[Origin] | None"]


def _sharded(origin: Origin, value: Value) -> Origin:
    """The part of a weight that one device of a shard_map sees: a stack of parts for each dimension that is cut."""
    parts = {dim: count for dim, count, _ in value.split}
    cut: list[int] = []
    lead: list[int] = []
    for dim, size in enumerate(value.shape):
        if dim in parts:
            lead.append(len(cut))
            cut.append(parts[dim])
        cut.append(size)
    perm = (*lead, *(d for d in range(len(cut)) if d not in lead))
    steps: list[Step] = [Reshape(tuple(cut))]
    steps += [Transpose(perm)] if perm != tuple(range(len(cut))) else []
    steps += [Stack(count) for _, count, _ in value.split]
    refs = [ShardSlice(value.scope, axes, count, dim, value.shape) for dim, count, axes in value.split]
    return _stacked(origin, steps, refs)


def _stacked(origin: Origin, steps: Sequence[Step], refs: Sequence[Ref]) -> Origin:
    return dataclasses.replace(origin, recipe=origin.recipe.then(*steps), refs=(*origin.refs, *refs))


def _extended(origin: Origin, *steps: Step) -> list[Origin]:
    return [dataclasses.replace(origin, recipe=origin.recipe.then(*steps))]


def _same(node: Node, origin: Origin) -> list[Origin]:
    return [origin]


def _moved(node: Node, origin: Origin) -> list[Origin] | None:
    """Cut, then transposed, then reshaped, as far as it is either; None where elements are repeated."""
    shape, links = shape_of(node.inputs[0]), links_of(node) or ()
    found = []
    for number, result in enumerate(node.outputs):
        own = [link for link in links if link.result == number]
        own.sort(key=lambda link: link.after[0] if link.after else link.before[0] - 0.5)
        start, left, strides = [0] * len(shape), list(shape), [1] * len(shape)
        for link in own:
            if link.how is How.CUT:
                (d,), size = link.before, result.shape[link.after[0]] if link.after else 1
                start[d], strides[d], left[d] = link.start, link.step, size
        limit = [s + (n - 1) * by + 1 if n else s for s, n, by in zip(start, left, strides, strict=True)]
        perm = [d for link in own for d in link.before]
        perm += [d for d in range(len(shape)) if d not in perm]
        if math.prod(left) != math.prod(result.shape):
            return None
        steps: list[Step] = [] if left == list(shape) else [Slice(tuple(start), tuple(limit), tuple(strides))]
        steps += [] if perm == sorted(perm) else [Transpose(tuple(perm))]
        steps += [] if tuple(left[d] for d in perm) == result.shape else [Reshape(result.shape)]
        found += _extended(origin, *steps)
    return found


def _convert(node: Node, origin: Origin) -> list[Origin] | None:
    # Only between floating types: a cast to integers is not a layout change of a matrix of weights.
    source, target = dtype_of(node.inputs[0]), np.dtype(node.params["new_dtype"])
    if not (jnp.issubdtype(source, jnp.floating) and jnp.issubdtype(target, jnp.floating)):
        return None
    if source == target:
        return [origin]
    if represents(target, origin.stored):
        return _extended(origin, Convert(target, exact=True))
    return _extended(dataclasses.replace(origin, stored=target), Convert(target))


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
        if not jnp.issubdtype(dtype_of(node.inputs[0]), jnp.floating) or not (value is None or np.isnan(value)):
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
    return [_stacked(origin, steps, refs)]


def _picks_matrix(node: Node) -> bool:
    """True for an index or slice that takes matrices, where a look-up of embeddings takes rows."""
    if node.primitive not in (prims.gather_p, prims.dynamic_slice_p):
        return False
    return sum(size > 1 for size in node.params["slice_sizes"]) >= 2


_RULES: dict[Any, Rule] = {
    prims.convert_element_type_p: _convert,
    prims.dynamic_slice_p: _dynamic_slice,
    prims.gather_p: _gather,
    prims.copy_p: _same,
    compat.PVARY: _same,
    prims.name_p: _same,
    prims.stop_gradient_p: _same,
    prims.device_put_p: _same,
    prims.sharding_constraint_p: _same,
}
