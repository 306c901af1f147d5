"""Links: where the entries along an axis of an operand go in a result, and what becomes of them on the way.

Equations have them by the rule of their primitive (``passes/ir/axis_rules.py``), the steps of a weight's recipe by what
they are. Followed forwards and backwards, they say where an axis ends and where it comes from.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

Shape = Sequence[int]


class How(enum.Enum):
    """What becomes of entries along an axis; "the entry there" is the one at the same place along it."""

    SAME = "each entry of the result is the entry there"
    EACH = "each entry of the result hangs, along this axis, on the entry there alone"
    CUT = "entry i of the result is entry start + step * i"
    PLACED = "entry i is entry start + step * i of the result, if there is one; a step of 0: it is one, not known which"
    STRETCHED = "the one entry of the axis is every entry of the result, or every one hangs on it"
    WRITTEN = "each entry of the result is the entry there, or what is written in its place"
    REDUCED = "all entries are reduced, in whichever order"
    LOCATED = "the place of one entry is found"
    CONTRACTED = "all entries are multiplied by another operand's and added up"
    MIXED = "each entry of the result hangs on several, by their places"
    ORDERED = "entries of the result are some or all of them, placed by their size"
    PICKED = "entries of the result are picked from them at run time; with no axis after, one is, or they say which"
    STORED = "they are written somewhere along the result; with no axis after, they say where"


@dataclass(frozen=True)
class Link:
    """Where entries along some dimensions of an operand go.

    Attributes:
      before: dimensions of the operand. Several stand for their entries in row-major order.
      after: dimensions of the result that these go to, likewise; none where there is no such axis in the result.
      how: what becomes of them.
      start, step: of ``CUT`` and ``PLACED``.
      operand, result: numbers of the operand and the result.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    how: How = How.SAME
    start: int = 0
    step: int = 1
    operand: int = 0
    result: int = 0


def straight(dims: Iterable[int], how: How = How.SAME, operand: int = 0, result: int = 0) -> list[Link]:
    """Dimensions that stay where they are."""
    return [Link((d,), (d,), how, operand=operand, result=result) for d in dims]


def permuted(perm: Sequence[int]) -> list[Link]:
    """A transpose: dimension ``i`` of the result is ``perm[i]`` of the operand."""
    return [Link((d,), (i,)) for i, d in enumerate(perm)]


def without(rank: int, dropped: Collection[int], how: How, kept: How = How.EACH) -> list[Link]:
    """A reduction and its kin: some dimensions go, the others move up."""
    left = [d for d in range(rank) if d not in dropped]
    return [*(Link((d,), (i,), kept) for i, d in enumerate(left)), *(Link((d,), (), how) for d in sorted(dropped))]


def regrouped(before: Shape, after: Shape) -> list[Link]:
    """A row-major reshape: the smallest groups of neighbours of the same size; behind the last only lengths of one."""
    if 0 in before:
        return []
    found: list[Link] = []
    i = j = 0
    while i < len(before) and j < len(after):
        k, m = i + 1, j + 1
        while (left := math.prod(before[i:k])) != (right := math.prod(after[j:m])):
            k, m = (k + 1, m) if left < right else (k, m + 1)
        found.append(Link(tuple(range(i, k)), tuple(range(j, m))))
        i, j = k, m
    return found


def sliced(before: Shape, after: Shape, start: Shape, step: Shape, result: int = 0) -> list[Link]:
    """A static slice."""
    return [
        Link((d,), (d,), How.SAME if size == left else How.CUT, at, by, result=result)
        for d, (size, left, at, by) in enumerate(zip(before, after, start, step, strict=True))
    ]


def behind(links: Iterable[Link], perm: Sequence[int]) -> list[Link]:
    """The links of an operand that is transposed before."""
    return [replace(link, before=tuple(perm[d] for d in link.before)) for link in links]


def forwards(links: Iterable[Link], dims: Collection[int]) -> frozenset[int]:
    """Dimensions of the result that hold any part of some dimensions of the operand."""
    return frozenset(e for link in links if not set(link.before).isdisjoint(dims) for e in link.after)
