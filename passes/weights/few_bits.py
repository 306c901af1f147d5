"""Weights that are stored in few bits: integers or narrow floats, times scales, of which each is of a block of entries.

A program makes them by a few operations: a zero point is taken off, what is left is multiplied by a scale. The other
operand is a weight as well, stretched along axes: one number for each row, column, or group. Both keep a recipe of
their own, to the weight's shape, so that they are cut and moved alike; packed, each is as small as it is stored.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as prims

from hire_xform.lowering.primitives.stored_rows import Operation
from hire_xform.passes.ir.compat import Literal
from hire_xform.passes.ir.graph import Node, Operand, Value, dtype_of
from hire_xform.passes.ir.pointwise import known_number, literal_number
from hire_xform.passes.weights.origins import IndexSlice, Origin, Ref, ScanSlice, shape_of
from hire_xform.passes.weights.recipe import Recipe, Reshape, Scaling, Slice, Stack, Stretch, Transpose

# What makes weights of what is stored in few bits, and which of it takes its operands either way around.
SCALES = {prims.mul_p: "mul", prims.div_p: "div", prims.add_p: "add", prims.sub_p: "sub"}
COMMUTES = frozenset({prims.mul_p, prims.add_p})

# Equations that two indices may be made by to be known as one.
_MOST_EQUATIONS = 32


@functools.lru_cache(maxsize=64)
def in_few_bits(dtype: Any) -> bool:
    """True for integers and floats of at most eight bits."""
    return bits_of(dtype) <= 8 and any(jnp.issubdtype(dtype, kind) for kind in (jnp.integer, jnp.floating))


@functools.lru_cache(maxsize=64)
def bits_of(dtype: Any) -> int:
    """Bits that an entry takes as it is stored: half a byte of what has four."""
    kind = next((k for k in (jnp.integer, jnp.floating) if jnp.issubdtype(dtype, k)), None)
    if kind is None:
        return 8 * int(np.dtype(dtype).itemsize)
    return int((jnp.iinfo if kind is jnp.integer else jnp.finfo)(dtype).bits)


def stored_bytes(origin: Origin, shape: Sequence[int]) -> int:
    """Bytes of a weight of some shape as it is stored, what it is scaled by included."""
    if not origin.recipe.scalings:
        return -(-math.prod(shape) * bits_of(origin.stored) // 8)
    return sum(size for _, size in stored_parts(origin, shape))


def stored_parts(origin: Origin, shape: Sequence[int]) -> list[tuple[Recipe, int]]:
    """The same of each recipe that a weight is made of."""
    recipe, size = origin.recipe, math.prod(shape)
    found = [(recipe.parts[0], -(-size * bits_of(origin.stored) // 8))]
    if not recipe.scalings:
        return found
    for scaling in recipe.scalings:
        if scaling.by is not None:
            copies = math.prod(n for digits in _digits(scaling.by.steps) or [] for n, copied in digits if copied)
            found.append((scaling.by, size // max(1, copies) * np.dtype(scaling.stored).itemsize))
    return found


def stretched(node: Node, origin: Origin) -> Origin:
    """A weight that a ``broadcast_in_dim`` repeats."""
    step = Stretch(shape_of(node.inputs[0]), node.outputs[0].shape, tuple(node.params["broadcast_dimensions"]))
    return replace(origin, recipe=origin.recipe.then(step))


def scaled(node: Node, origin: Origin, by: Operand, other: Origin | None) -> Origin | str | None:
    """What an operation makes of a weight in few bits.

    Args:
      node: the operation.
      origin: of the weight.
      by: the other operand.
      other: where that comes from; None where it is no weight.

    Returns:
      The weight; or why it is none, of what is made of weights and numbers alone; None where data goes in.
    """
    dtype = dtype_of(by)
    number = literal_number(by) if isinstance(by, Literal) else known_number(by)
    if number is not None:
        how = Operation(SCALES[node.primitive], dtype, number)
        return replace(origin, recipe=replace(origin.recipe, scalings=(*origin.recipe.scalings, Scaling(how))))
    if other is None:
        return None
    if other.recipe.scalings:
        return "its scales are themselves integers times scales"
    if not _same_refs(origin.refs, other.refs) or _stacks(origin) != _stacks(other):
        return "its scales are not taken from a stack as it is, by the same index"
    kinds = {root.kind for root in (*origin.recipe.roots, other.recipe.root)}
    if len(kinds) > 1:
        return "its scales are in another argument than it is"
    recipe, shape = other.recipe, node.outputs[0].shape
    if shape_of(by) != shape:
        recipe = recipe.then(Stretch(shape_of(by), shape, tuple(range(len(shape)))[: len(shape_of(by))]))
    if not any(isinstance(step, Stretch) for step in recipe.steps):
        return "it has a scale for each entry"
    scaling = Scaling(Operation(SCALES[node.primitive], dtype), recipe, other.stored)
    return replace(origin, recipe=replace(origin.recipe, scalings=(*origin.recipe.scalings, scaling)))


def _stacks(origin: Origin) -> list[int]:
    return [step.size for step in origin.recipe.steps if isinstance(step, Stack)]


def _same_refs(refs: Sequence[Ref], others: Sequence[Ref]) -> bool:
    return len(refs) == len(others) and all(map(_same_ref, refs, others))


def _same_ref(ref: Ref, other: Ref) -> bool:
    if isinstance(ref, ScanSlice) and isinstance(other, ScanSlice):
        return ref.scope is other.scope
    if not (isinstance(ref, IndexSlice) and isinstance(other, IndexSlice)):
        return False  # a part of a weight that one device has
    return (ref.entry, ref.fills) == (other.entry, other.fills) and same_value(ref.index, other.index)


def same_value(one: Operand, other: Operand) -> bool:
    """Whether two operands have one value, being the same or made alike of the same."""
    pairs, budget = [(one, other)], _MOST_EQUATIONS
    while pairs:
        a, b = pairs.pop()
        if a is b:
            continue
        if isinstance(a, Literal) or isinstance(b, Literal):
            known = literal_number(a), literal_number(b)
            if None in known or known[0] != known[1] or dtype_of(a) != dtype_of(b):
                return False
            continue
        budget -= 1
        if budget < 0 or not _made_alike(a, b):
            return False
        assert a.node is not None
        assert b.node is not None
        pairs += zip(a.node.inputs, b.node.inputs, strict=True)
    return True


def _made_alike(a: Value, b: Value) -> bool:
    first, second = a.node, b.node
    if first is None or second is None or first.primitive is not second.primitive or first.children or second.children:
        return False
    if first.eqn.effects or len(first.inputs) != len(second.inputs) or a.scope is not b.scope:
        return False
    return first.outputs.index(a) == second.outputs.index(b) and str(first.params) == str(second.params)


def blocks(recipe: Recipe) -> tuple[int, int]:
    """Of what scales a matrix ``[n, d]``, how many neighbouring rows, and columns, have each entry of it."""
    digits = _digits(recipe.steps)
    if digits is None:
        return 1, 1
    rows, columns = digits
    return _last_copies(rows), _last_copies(columns)


def compact(recipe: Recipe, shape: tuple[int, int]) -> Recipe:
    """What scales a matrix of a shape, with every entry once for a block of rows and columns."""
    block = blocks(recipe)
    return recipe if block == (1, 1) else recipe.then(Slice((0, 0), shape, block))


def in_blocks(recipe: Recipe, shape: tuple[int, int]) -> Recipe:
    """The recipe of a matrix with all that scales it as small as it is stored."""
    own = (replace(s, by=None if s.by is None else compact(s.by, shape)) for s in recipe.scalings)
    return replace(recipe, scalings=tuple(own))


def in_words(recipe: Recipe, shape: tuple[int, int], stored: Any) -> str:
    """How a matrix ``[n, d]`` is stored, for reports; empty where it is not in few bits."""
    if not in_few_bits(stored):
        return ""
    told = np.dtype(stored).name
    for scaling in recipe.scalings:
        word = _WORDS.get(scaling.how.name)
        if word is None:
            continue
        if scaling.by is None:
            told += f" {word} {scaling.how.number:g}"
            continue
        told += f" {word} {np.dtype(scaling.stored).name} {_each(blocks(scaling.by), shape)}"
    return told


_WORDS = {"mul": "times", "div": "over", "add": "plus", "sub": "minus"}


def _each(block: tuple[int, int], shape: tuple[int, int]) -> str:
    rows, columns = block
    if block == shape:
        return "for all"
    if columns == shape[1]:
        return "per row" if rows == 1 else f"per {rows} rows"
    if rows == shape[0]:
        return "per column" if columns == 1 else f"per {columns} columns"
    if rows == 1 or columns == 1:
        return f"per group of {max(block)}"
    return f"per block of {rows} x {columns}"


# A dimension's digits, the outermost first: how many, and whether they are copies of one entry.
_Digits = list[tuple[int, bool]]


def _last_copies(digits: _Digits) -> int:
    """How many neighbours are copies, of the innermost digits that are."""
    count = 1
    for size, copied in reversed(digits):
        if not copied and size > 1:
            break
        count *= size
    return count


def _digits(steps: Sequence[Any]) -> list[_Digits] | None:
    """For each dimension of what some steps make its digits; None where nothing is stretched, or that is not known."""
    dims: list[_Digits] | None = None
    for step in steps:
        if isinstance(step, Stretch):
            dims = _stretch([[(n, False)] for n in step.before] if dims is None else dims, step)
        elif dims is not None and isinstance(step, Transpose):
            dims = [dims[d] for d in step.perm]
        elif dims is not None and isinstance(step, Reshape):
            dims = _regrouped(dims, step.shape)
        elif dims is not None and isinstance(step, Stack):
            dims = dims[1:]
        elif dims is not None and isinstance(step, Slice):
            dims = [_cut(digits, n) for digits, n in zip(dims, step.shape, strict=True)]
    return dims


def _stretch(dims: list[_Digits], step: Stretch) -> list[_Digits]:
    made: list[_Digits] = [[(n, True)] for n in step.shape]
    for own, before, after in zip(dims, step.before, step.dims, strict=True):
        if before == step.shape[after]:
            made[after] = own
    return made


def _cut(digits: _Digits, size: int) -> _Digits:
    if math.prod(n for n, _ in digits) == size:
        return digits
    return [(size, all(copied for n, copied in digits if n > 1))]


def _regrouped(dims: list[_Digits], shape: Sequence[int]) -> list[_Digits]:
    """Digits read as those of another shape; a digit that is cut where it can't be counts as no copy."""
    digits = [digit for own in dims for digit in own if digit[0] != 1]
    made: list[_Digits] = []
    for size in shape:
        own: _Digits = []
        left = size
        while left > 1:
            if not digits:
                return [[(n, False)] for n in shape]
            n, copied = digits.pop(0)
            if n <= left and left % n == 0:
                own.append((n, copied))
                left //= n
            elif n > left and n % left == 0:
                own.append((left, copied))
                digits.insert(0, (n // left, copied))
                left = 1
            else:
                return [[(n, False)] for n in shape]
        made.append(own or [(1, True)])
    return made
