"""Follows the token and hidden axes of a feed-forward block backwards, by the links of the equations on the way.

The flattened hidden units ``0 .. m-1`` and the flattened tokens ``0 .. T-1`` are two index spaces. Each dimension of a
value holds some digits (``Atom``) of those indices; a ``Layout`` says which, for every dimension. Given the layout an
equation's result must have, ``operand_layouts`` gives those of its operands, or raises ``UnsupportedLayoutError`` where
the equation does not move whole units about.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from hire_xform.passes.ir.axis_rules import links_of
from hire_xform.passes.ir.graph import Node
from hire_xform.passes.ir.links import How


class UnsupportedLayoutError(Exception):
    """An equation splits or merges units in a way that is not followed."""


@dataclass(frozen=True)
class Atom:
    """One digit of a token ("t") or hidden ("h") index: index = sum of digit * stride over its atoms."""

    space: str
    stride: int
    size: int


@dataclass(frozen=True)
class Dim:
    """One dimension: the entries ``start + step * i`` of ``extent`` are used, ``i`` running over the atoms' digits."""

    atoms: tuple[Atom, ...]
    extent: int
    start: int = 0
    step: int = 1

    @property
    def size(self) -> int:
        """How many entries are used."""
        return math.prod(a.size for a in self.atoms)

    @property
    def full(self) -> bool:
        """True when every entry is used, in order."""
        return self.start == 0 and self.size == self.extent and (self.step == 1 or self.extent == 1)


Layout = tuple[Dim, ...]


def merged(atoms: Sequence[Atom]) -> tuple[Atom, ...]:
    """The same digits with neighbours that form one larger digit put together; the normal form."""
    found: list[Atom] = []
    for atom in atoms:
        if atom.size == 1:
            continue
        last = found[-1] if found else None
        if last is not None and last.space == atom.space and last.stride == atom.stride * atom.size:
            found[-1] = Atom(atom.space, atom.stride, last.size * atom.size)
        else:
            found.append(atom)
    return tuple(found)


def row_major(space: str, sizes: Sequence[int]) -> list[Atom]:
    """Atoms of axes of these sizes that together run over ``0 .. prod(sizes)-1`` in row-major order."""
    atoms, stride = [], math.prod(sizes)
    for size in sizes:
        stride = stride // size if size else 0
        atoms.append(Atom(space, stride, size))
    return atoms


def whole(atoms: Sequence[Atom], extent: int) -> Dim:
    """A fully used dimension."""
    return Dim(merged(atoms), extent)


def spaces(layout: Layout) -> set[str]:
    """Which of the two index spaces the layout's dimensions run over."""
    return {a.space for dim in layout for a in dim.atoms}


def operand_layouts(node: Node, result: int, layout: Layout) -> list[Layout]:
    """The layouts that an equation's operands must have for its result number ``result`` to have ``layout``.

    Args:
      node: an equation that acts on each element alone, or moves elements only.
      result: the number of the result.
      layout: its layout.

    Raises:
      UnsupportedLayoutError: whole units are not moved.
    """
    shapes: list[Any] = [tuple(atom.aval.shape) for atom in node.eqn.invars]
    found: list[dict[int, Dim]] = [{d: Dim((), 1) for d, size in enumerate(shape) if size == 1} for shape in shapes]
    for link in links_of(node) or ():
        if link.result != result or link.how is How.STRETCHED:
            continue
        shape, dims = shapes[link.operand], [layout[d] for d in link.after]
        first = link.before[0]
        if link.how is How.CUT:
            dim = dims[0] if dims else Dim((), 1)
            start, step = link.start + link.step * dim.start, link.step * dim.step
            dims = [dataclasses.replace(dim, extent=shape[first], start=start, step=step)]
        elif len(link.before) > 1 or len(dims) > 1:
            dims = _reshaped(dims, [shape[d] for d in link.before])
        found[link.operand].update(zip(link.before, dims, strict=True))
    if any(len(known) < len(shape) for known, shape in zip(found, shapes, strict=True)):
        raise UnsupportedLayoutError("it is not known where an axis goes")
    return [tuple(known[d] for d in range(len(known))) for known in found]


def _reshaped(dims: Sequence[Dim], operand_shape: Sequence[int]) -> list[Dim]:
    """What a reshape's operand has in place of some neighbouring dimensions of its result.

    Raises:
      UnsupportedLayoutError: a sliced dimension would be split, or digits do not fall on dimension boundaries.
    """
    result = [d for d in dims if d.extent != 1]
    found: list[Dim] = []
    at = 0
    for size in operand_shape:
        if size == 1:
            found.append(Dim((), 1))
            continue
        group: list[Dim] = []
        while at < len(result) and math.prod(d.extent for d in group) < size:
            group.append(result[at])
            at += 1
        have = math.prod(d.extent for d in group)
        if have == size:
            found.append(_fuse(group))
        elif have > size and len(group) == 1 and group[0].full and have % size == 0:
            # The result merged several operand dimensions: give this one its leading digits, keep the rest.
            taken, rest = _split_atoms(group[0].atoms, size)
            found.append(whole(taken, size))
            at -= 1
            result[at] = whole(rest, have // size)
        else:
            raise UnsupportedLayoutError("a reshape mixes the hidden axis with others")
    return found


def _fuse(group: Sequence[Dim]) -> Dim:
    fused = group[0]
    for inner in group[1:]:
        extent = fused.extent * inner.extent
        atoms = merged((*fused.atoms, *inner.atoms))
        base = fused.start * inner.extent + inner.start
        if inner.full and fused.step == 1:
            fused = Dim(atoms, extent, base, 1)
        elif fused.size == 1:
            fused = Dim(atoms, extent, base, inner.step)
        elif inner.size == 1:
            fused = Dim(atoms, extent, base, fused.step * inner.extent)
        else:
            raise UnsupportedLayoutError("a slice of the hidden axis is then reshaped")
    return fused


def _split_atoms(atoms: Sequence[Atom], size: int) -> tuple[list[Atom], list[Atom]]:
    taken: list[Atom] = []
    have = 1
    for i, atom in enumerate(atoms):
        if have == size:
            return taken, list(atoms[i:])
        if (size // have) % atom.size == 0:
            taken.append(atom)
            have *= atom.size
            continue
        lead = size // have
        if size % have or atom.size % lead:
            break
        inner = atom.size // lead
        taken.append(Atom(atom.space, atom.stride * inner, lead))
        return taken, [Atom(atom.space, atom.stride, inner), *atoms[i + 1 :]]
    if have == size:
        return taken, []
    raise UnsupportedLayoutError("a reshape splits the hidden axis unevenly")


def to_canonical(value: Any, layout: Layout, tokens: int, units: int) -> Any:
    """Brings a value with a layout to ``[T or 1, m or 1]``; ``[m]`` becomes ``[1, m]``.

    Dimensions that hold only some of the tokens' digits are broadcast along the others.
    """
    if not all(d.full for d in layout):
        start = [d.start for d in layout]
        limit = [d.start + d.step * (d.size - 1) + 1 for d in layout]
        value = lax.slice(value, start, limit, [d.step for d in layout])
    atoms = [a for d in layout for a in d.atoms]
    value = value.reshape([a.size for a in atoms])
    result = value
    order: list[int] = []
    shape: list[int] = []
    for space, total in (("t", tokens), ("h", units)):
        held = sorted((i for i, a in enumerate(atoms) if a.space == space), key=lambda i: -atoms[i].stride)
        if not held:
            shape.append(1)
            continue
        order += held
        shape.append(total)
    result = jnp.transpose(value, order) if order != list(range(len(atoms))) else value
    return _spread(result, [atoms[i] for i in order], tokens, units).reshape(shape)


def from_canonical(value: Any, layout: Layout, tokens: int, units: int) -> Any:
    """What ``to_canonical`` made, or that stretched to ``[T, m]``, in its own shape again; all dimensions are full."""
    atoms = [a for d in layout for a in d.atoms]
    order: list[int] = []
    sizes: list[int] = []
    kept: list[Any] = []
    for axis, (space, total) in enumerate((("t", tokens), ("h", units))):
        held = sorted((i for i, a in enumerate(atoms) if a.space == space), key=lambda i: -atoms[i].stride)
        # Along digits that it does not hold it is the same: the first is taken.
        span = total if held else value.shape[axis]
        for i in held:
            sizes += [span // (atoms[i].stride * atoms[i].size), atoms[i].size]
            kept += [0, slice(None)]
            span = atoms[i].stride
        sizes.append(span)
        kept.append(0)
        order += held
    value = value.reshape(sizes)[tuple(kept)]
    return jnp.transpose(value, [order.index(i) for i in range(len(order))]).reshape([d.extent for d in layout])


def _spread(value: Any, atoms: Sequence[Atom], tokens: int, units: int) -> Any:
    """Inserts broadcast axes where the sorted atoms leave out digits of a space they hold part of."""
    shape: list[int] = []
    target: list[int] = []
    for space, total in (("t", tokens), ("h", units)):
        held = [a for a in atoms if a.space == space]
        if not held:
            continue
        span = total
        for atom in held:
            missing = span // (atom.stride * atom.size)
            shape += [1, atom.size]
            target += [missing, atom.size]
            span = atom.stride
        shape.append(1)
        target.append(span)
    return jnp.broadcast_to(value.reshape(shape), target)
