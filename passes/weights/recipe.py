"""How a weight as the program uses it is computed from an argument leaf or a closed-over array, when packing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hire_xform.lowering.primitives.stored_rows import Operation
from hire_xform.passes.ir.links import How, Link, permuted, regrouped, sliced, straight

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Root:
    """Where a weight comes from.

    Attributes:
      kind: "const" for a closed-over array, else the argument: "arg0" by position, "arg:params" by name.
      index: the array's identity (``id``), or the number of the leaf among the argument's array leaves.
    """

    kind: str
    index: int

    @classmethod
    def of(cls, argument: int | str, index: int) -> Root:
        """A leaf of the argument that is at a position or has a name."""
        return cls(f"arg{argument}" if isinstance(argument, int) else f"arg:{argument}", index)

    def anywhere(self) -> Root:
        """The same leaf of whichever argument."""
        return Root("", self.index)

    @property
    def argument(self) -> int | str | None:
        """The position or name of the argument; None for a closed-over array."""
        if self.kind == "const":
            return None
        return self.kind[4:] if self.kind.startswith("arg:") else int(self.kind[3:])


class _Step:
    """A step, as far as it leaves axes where they are."""

    def axes(self, shape: Shape) -> tuple[list[Link], Shape]:
        """Where the axes of an array of some shape go, and the shape that it makes of it."""
        return straight(range(len(shape))), shape


@dataclass(frozen=True)
class Transpose(_Step):
    """Axis permutation."""

    perm: tuple[int, ...]

    def axes(self, shape: Shape) -> tuple[list[Link], Shape]:
        """Where axes go."""
        return permuted(self.perm), tuple(shape[d] for d in self.perm)

    def apply(self, x: Any) -> Any:
        """The step on an array."""
        return jnp.transpose(x, self.perm)


@dataclass(frozen=True)
class Reshape(_Step):
    """Row-major reshape."""

    shape: tuple[int, ...]

    def axes(self, shape: Shape) -> tuple[list[Link], Shape]:
        """Where axes go."""
        return regrouped(shape, self.shape), self.shape

    def apply(self, x: Any) -> Any:
        """The step on an array."""
        return jnp.reshape(x, self.shape)


@dataclass(frozen=True)
class Convert(_Step):
    """Change of dtype. ``exact``: it rounds nothing, since it has every value of the dtype that is stored."""

    dtype: Any
    exact: bool = False

    def apply(self, x: Any) -> Any:
        """The step on an array."""
        return lax.convert_element_type(x, self.dtype)


def represents(target: Any, source: Any) -> bool:
    """True when a dtype of 16 bits or more has every value of another one: of an integer, or a float of 8 bits or more.

    Integers are represented by integers and floats, floats by floats.
    """
    if jnp.issubdtype(source, jnp.integer):
        lowest, highest = int(jnp.iinfo(source).min), int(jnp.iinfo(source).max)
        if jnp.issubdtype(target, jnp.integer):
            return int(jnp.iinfo(target).min) <= lowest and highest <= int(jnp.iinfo(target).max)
        # One that is a power of two takes a digit less than those next to it.
        digits = int(jnp.finfo(target).nmant) + 1
        return jnp.finfo(target).bits >= 16 and max(highest, -lowest - 1) < 2**digits
    if not jnp.issubdtype(target, jnp.floating):
        return False
    wide, narrow = jnp.finfo(target), jnp.finfo(source)
    if wide.bits < 16 or narrow.bits < 8:
        return False
    # The digits of its numbers, its largest power of two, and the spacing of its smallest numbers.
    digits, largest = wide.nmant >= narrow.nmant, wide.maxexp >= narrow.maxexp
    return digits and largest and wide.minexp - wide.nmant <= narrow.minexp - narrow.nmant


@dataclass(frozen=True)
class Slice(_Step):
    """Static strided slice."""

    start: tuple[int, ...]
    limit: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what is left."""
        ends = zip(self.start, self.limit, self.strides, strict=True)
        return tuple(-(-(limit - start) // stride) for start, limit, stride in ends)

    def axes(self, shape: Shape) -> tuple[list[Link], Shape]:
        """Where axes go."""
        return sliced(shape, self.shape, self.start, self.strides), self.shape

    def apply(self, x: Any) -> Any:
        """The step on an array."""
        return lax.slice(x, self.start, self.limit, self.strides)


@dataclass(frozen=True)
class Stack(_Step):
    """The leading axis is a stack of matrices, of which the program sees one at a time. ``size`` is its length."""

    size: int

    def axes(self, shape: Shape) -> tuple[list[Link], Shape]:
        """Where axes go: the first is no longer there."""
        return [Link((d,), (d - 1,)) for d in range(1, len(shape))], shape[1:]


@dataclass(frozen=True)
class Cyclic(_Step):
    """Rows distributed cyclically over equal parts: row ``i`` is row ``i // parts`` of part ``i % parts``."""

    parts: int

    def axes(self, shape: Shape) -> tuple[list[Link], Shape]:
        """Where axes go."""
        return [Link((0,), (0,), How.PLACED, step=0), *straight(range(1, len(shape)))], shape

    def apply(self, x: Any) -> Any:
        """The step on an array."""
        return self._swapped(x, (-1, self.parts))

    def undo(self, x: Any) -> Any:
        """Its inverse."""
        return self._swapped(x, (self.parts, -1))

    def _swapped(self, x: Any, sizes: tuple[int, int]) -> Any:
        return jnp.swapaxes(x.reshape(*sizes, *x.shape[1:]), 0, 1).reshape(x.shape)


@dataclass(frozen=True)
class Stretch(_Step):
    """Axes repeated, as ``lax.broadcast_in_dim`` has it. Of what weights are scaled by only, never of weights.

    Attributes:
      before: the shape that is stretched.
      shape: what it is stretched to.
      dims: for each dimension before, which it becomes.
    """

    before: tuple[int, ...]
    shape: tuple[int, ...]
    dims: tuple[int, ...]

    def apply(self, x: Any) -> Any:
        """The step on an array."""
        return lax.broadcast_in_dim(x, self.shape, self.dims)


Step = Transpose | Reshape | Convert | Slice | Stack | Cyclic | Stretch


@dataclass(frozen=True)
class Scaling:
    """One operation of those that make weights of what is stored in few bits.

    Attributes:
      how: the operation, with the dtype that it runs in.
      by: the other operand, as stored and stretched to the weight's shape; None where it is a number, or none.
      stored: dtype of that operand as it is stored.
    """

    how: Operation
    by: Recipe | None = None
    stored: Any = None


@dataclass(frozen=True)
class Recipe:
    """A weight as the program uses it: a leaf and the steps from it. Hashable; equal recipes are equal arrays.

    Where it is stored in few bits, ``scalings`` make the weight of what ``steps`` make of the leaf: each takes a recipe
    of its own, of the same shape and with the same stacks.
    """

    root: Root
    steps: tuple[Step, ...] = ()
    scalings: tuple[Scaling, ...] = ()

    def then(self, *steps: Step) -> Recipe:
        """This recipe with more steps, those that do nothing left out by the caller."""
        if not self.scalings:
            return Recipe(self.root, self.steps + steps)
        moves = tuple(s for s in steps if not isinstance(s, Convert))
        own = [replace(s, by=None if s.by is None else s.by.then(*moves)) for s in self.scalings]
        own += [Scaling(Operation("convert", s.dtype)) for s in steps if isinstance(s, Convert)]
        return Recipe(self.root, self.steps + moves, tuple(own))

    def each(self, change: Callable[[Recipe], Recipe]) -> Recipe:
        """The same with every recipe that it is made of changed: that of the leaf, and those that scale it."""
        if not self.scalings:
            return change(self)
        own = change(Recipe(self.root, self.steps))
        scalings = (replace(s, by=None if s.by is None else change(s.by)) for s in self.scalings)
        return Recipe(own.root, own.steps, tuple(scalings))

    @property
    def parts(self) -> tuple[Recipe, ...]:
        """The recipes that it is made of: that of the leaf, then those that scale it."""
        if not self.scalings:
            return (self,)
        return (Recipe(self.root, self.steps), *(s.by for s in self.scalings if s.by is not None))

    @property
    def roots(self) -> tuple[Root, ...]:
        """The leaves that it is made of."""
        return tuple(part.root for part in self.parts) if self.scalings else (self.root,)

    def from_roots(self, change: Callable[[Root], Root]) -> Recipe:
        """The same of other leaves."""
        if not self.scalings:
            return Recipe(change(self.root), self.steps)
        return self.each(lambda part: part.from_roots(change))

    @property
    def as_stored(self) -> Recipe:
        """The same values in the narrowest dtype that is known to have them: without the steps that only widen."""
        if self.scalings:
            return self.each(lambda part: part.as_stored)
        return Recipe(self.root, tuple(s for s in self.steps if not (isinstance(s, Convert) and s.exact)))

    @property
    def is_leaf(self) -> bool:
        """True when it makes the leaf itself: no steps but stacks that are taken as they lie."""
        return not self.scalings and all(isinstance(s, Stack) for s in self.steps)

    @property
    def operations(self) -> tuple[Operation, ...]:
        """What its scalings do, without what they do it with."""
        return tuple(s.how for s in self.scalings)

    def apply(self, leaf: Any, finish: Callable[[Any], Any] | None = None) -> Any:
        """Runs the steps, then ``finish``, on the leaf; the result leads with the stack axes.

        What there is to finish is done one matrix of a stack after the other: its temporaries are those of one.
        """
        return _apply(self.steps, leaf, finish)

    def one(self, leaf: Any, index: Sequence[Any]) -> Any:
        """The one matrix at these stack indices, outermost first; of the others as little is moved as can be."""
        return _one(self.steps, leaf, list(index))


def _apply(steps: Sequence[Step], x: Any, finish: Callable[[Any], Any] | None) -> Any:
    over = jax.vmap if finish is None else (lambda fun: functools.partial(lax.map, fun))
    for i, step in enumerate(steps):
        if isinstance(step, Stack):
            return over(lambda y: _apply(steps[i + 1 :], y, finish))(x)  # noqa: B023 - used before i moves on
        x = step.apply(x)
    return x if finish is None else finish(x)


def _one(steps: Sequence[Step], x: Any, index: list[Any]) -> Any:
    if not steps:
        return x
    step, rest = steps[0], steps[1:]
    if isinstance(step, Stack):
        return _one(rest, lax.dynamic_index_in_dim(x, index[0], 0, keepdims=False), index[1:])
    if isinstance(step, Transpose) and rest and isinstance(rest[0], Stack):
        # An axis that is moved to the front to be indexed is indexed where it lies.
        axis = step.perm[0]
        x = lax.dynamic_index_in_dim(x, index[0], axis, keepdims=False)
        return _one((Transpose(tuple(p - (p > axis) for p in step.perm[1:])), *rest[1:]), x, index[1:])
    if isinstance(step, Convert) and rest and isinstance(rest[0], Stack):
        return _one((rest[0], step, *rest[1:]), x, index)
    return _one(rest, step.apply(x), index)
