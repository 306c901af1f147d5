"""Sizes of the layers of one loop, where each of a few has a branch of the loop's body."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from hire_xform.passes.plan.forms import Whole

# Branches at most: each is compiled, and is a copy of the site's code.
MOST = 4
# Sizes of their own are worth branches where they save this share of what the site reads.
WORTH = 0.02


@dataclass(frozen=True)
class Levels(Whole):
    """Which of a few sizes each layer has. As a packed form: int32 ``[*shape]``, the number of its size.

    Attributes:
      counts: the sizes, ascending.
      smaller: of certified sites, for each of them the sizes that are taken where they will do, ascending.
      numbers: for each layer the number of its size, in row-major order.
      shape: of the stack of layers.
    """

    counts: tuple[int, ...]
    numbers: tuple[int, ...]
    shape: tuple[int, ...]
    smaller: tuple[tuple[int, ...], ...] = ()

    @property
    def ladders(self) -> tuple[tuple[int, ...], ...]:
        """For each of ``counts`` all sizes up to it."""
        smaller = self.smaller or ((),) * len(self.counts)
        return tuple((*below, count) for below, count in zip(smaller, self.counts, strict=True))

    @property
    def array(self) -> np.ndarray:
        """The numbers as they are read."""
        return np.asarray(self.numbers, np.int32).reshape(self.shape)

    def pack(self, leaf: Any, *given: Any) -> Any:
        """The numbers."""
        return jnp.asarray(self.array)


def levels_of(sizes: np.ndarray, most: int = MOST) -> Levels:
    """The at most ``most`` sizes of which each layer has one at least as large as its own, with the smallest sum.

    Neighbours in order of size share one, so a table over the sorted sizes finds the best ways to cut them (dynamic
    programming): the best into ``j`` parts ends in a part that costs its length times its largest.
    """
    known = [int(s) for s in np.unique(sizes)]
    often = [int((sizes == s).sum()) for s in known]
    before = np.concatenate([[0], np.cumsum(often)])
    nothing: tuple[int, ...] = ()
    best = [(0.0, nothing), *[(np.inf, nothing)] * len(known)]
    for _ in range(min(most, len(known))):
        longer = list(best)
        for end in range(1, len(known) + 1):
            for start in range(end):
                cost = best[start][0] + float(before[end] - before[start]) * known[end - 1]
                if cost < longer[end][0]:
                    longer[end] = cost, (*best[start][1], known[end - 1])
        best = longer
    counts = best[-1][1]
    numbers = tuple(int(n) for n in np.searchsorted(counts, np.ravel(sizes)))
    return Levels(counts, numbers, tuple(sizes.shape))


def told(sizes: Sequence[int]) -> str:
    """Sizes of layers, in a few words."""
    return ", ".join(f"{s:,}" for s in sizes[:8]) + (f" and {len(sizes) - 8} more" if len(sizes) > 8 else "")
