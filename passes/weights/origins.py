"""Where a weight comes from, and what each layout and dtype operation makes of that: a rule for each primitive."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as prims

from hire_xform.passes.ir import compat
from hire_xform.passes.ir.axis_rules import links_of
from hire_xform.passes.ir.graph import Node, Operand, Scope, Value, dtype_of
from hire_xform.passes.ir.links import How
from hire_xform.passes.weights.recipe import Convert, Recipe, Reshape, Slice, Stack, Step, Transpose, represents


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


def shape_of(operand: Operand) -> tuple[int, ...]:
    """The shape of a value or literal."""
    aval: Any = operand.aval
    return tuple(aval.shape)


Rule = Callable[[Node, Origin], "list[Origin] | None"]


def sharded(origin: Origin, value: Value) -> Origin:
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
    return stacked(origin, steps, refs)


def stacked(origin: Origin, steps: Sequence[Step], refs: Sequence[Ref]) -> Origin:
    """With more steps, and what resolves the stack axes among them."""
    return dataclasses.replace(origin, recipe=origin.recipe.then(*steps), refs=(*origin.refs, *refs))


def _extended(origin: Origin, *steps: Step) -> list[Origin]:
    return [dataclasses.replace(origin, recipe=origin.recipe.then(*steps))]


def _same(node: Node, origin: Origin) -> list[Origin]:
    return [origin]


def moved(node: Node, origin: Origin) -> list[Origin] | None:
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
    # Of integers only what keeps each of them: any other cast is not a change of dtype of a matrix of weights.
    source, target = dtype_of(node.inputs[0]), np.dtype(node.params["new_dtype"])
    if source == target:
        return [origin]
    floats = jnp.issubdtype(source, jnp.floating) and jnp.issubdtype(target, jnp.floating)
    if origin.recipe.scalings:
        from_integers = jnp.issubdtype(source, jnp.integer) and jnp.issubdtype(target, jnp.floating)
        return _extended(origin, Convert(target)) if floats or from_integers else None
    if not jnp.issubdtype(origin.stored, jnp.floating) and not jnp.issubdtype(origin.stored, jnp.integer):
        return None
    if represents(target, origin.stored):
        return _extended(origin, Convert(target, exact=True))
    return _extended(dataclasses.replace(origin, stored=target), Convert(target)) if floats else None


def _dynamic_slice(node: Node, origin: Origin) -> list[Origin] | None:
    shape, sizes = shape_of(node.inputs[0]), tuple(node.params["slice_sizes"])
    indexed = [axis for axis, (have, take) in enumerate(zip(shape, sizes, strict=True)) if have != take]
    if not indexed or any(sizes[axis] != 1 for axis in indexed):
        return None
    return _indexed(node, origin, indexed, [IndexSlice(node, 1 + axis) for axis in indexed])


def _gather(node: Node, origin: Origin) -> list[Origin] | None:
    """One whole slice: every indexed axis is taken at one index, and the others are kept as they are."""
    numbers, mode = node.params["dimension_numbers"], node.params["mode"]
    shape, sizes = shape_of(node.inputs[0]), tuple(node.params["slice_sizes"])
    axes = tuple(numbers.start_index_map)
    fills = mode == lax.GatherScatterMode.FILL_OR_DROP
    if math.prod(shape_of(node.inputs[1])) != len(axes) or numbers.operand_batching_dims:
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
    return [stacked(origin, steps, refs)]


def picks_matrix(node: Node) -> bool:
    """True for an index or slice that takes matrices, where a look-up of embeddings takes rows."""
    if node.primitive not in (prims.gather_p, prims.dynamic_slice_p):
        return False
    return sum(size > 1 for size in node.params["slice_sizes"]) >= 2


def _of_matrices(rule: Rule) -> Rule:
    return lambda node, origin: rule(node, origin) if picks_matrix(node) else None


# What takes entries of a stack by an index, matrices or not.
TAKES: dict[Any, Rule] = {prims.dynamic_slice_p: _dynamic_slice, prims.gather_p: _gather}

RULES: dict[Any, Rule] = {
    prims.convert_element_type_p: _convert,
    **{primitive: _of_matrices(rule) for primitive, rule in TAKES.items()},
    prims.copy_p: _same,
    compat.PVARY: _same,
    prims.name_p: _same,
    prims.stop_gradient_p: _same,
    prims.device_put_p: _same,
    prims.sharding_constraint_p: _same,
}
