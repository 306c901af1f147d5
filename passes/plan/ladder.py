"""Sizes to compile for a certified site: a few, so that a token that needs few rows reads few."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# Sizes at most: each is a branch, and a copy of the site's code.
MOST = 3
# One more size is worth a branch where it saves this share of what the site reads.
WORTH = 0.005
# Distinct sizes that are weighed against each other; more are thinned out.
_POINTS = 256


@dataclass(frozen=True)
class Ladder:
    """Sizes of a certified site, and how often each is expected to be taken.

    Attributes:
      counts: the sizes (its rungs), ascending: candidates, or groups of units, of each token.
      shares: for each, and last for the dense form, the share of the executions that take it.
      read: bytes of rows that an execution is expected to read, dense ones included.
    """

    counts: tuple[int, ...]
    shares: tuple[float, ...]
    read: float


def ladder_of(
    needs: np.ndarray,
    read: Callable[[int], float],
    dense: float,
    *,
    tried: bool,
    fixed: float = 0.0,
    tokens: int = 1,
    least: int = 1,
    last: int | None = None,
) -> Ladder:
    """The at most ``MOST`` sizes with the fewest expected bytes.

    Each token takes the smallest size that holds what it needs; needs between two sizes take the larger, so a table
    over the sizes that are needed finds the best ones (dynamic programming).

    Args:
      needs: ``[..., n]``, how many tokens were seen to need 1, 2, ... rows (or groups), of each layer that shares the
        sizes; not all zero.
      read: bytes of so many.
      dense: bytes of the dense form.
      tried: whether the largest size is read before the dense form is, as of a vocabulary projection.
      fixed: bytes that are read whatever the size.
      tokens: of one execution, which takes what the neediest of them does; they are taken as independent.
      least: what the largest size must be at least.
      last: what it is to be; None leaves that open.
    """
    seen = needs.reshape(-1, needs.shape[-1]).astype(np.float64)
    within = np.mean((np.cumsum(seen, axis=1) / np.sum(seen, axis=1, keepdims=True)) ** tokens, axis=0)
    counts = _points(seen.sum(axis=0), least if last is None else last, last is not None)
    held, cost = within[counts - 1], np.asarray([read(int(c)) for c in counts], np.float64)
    ends = (1.0 - held) * (dense + cost * tried)
    ends[counts < least] = np.inf
    if last is not None:
        ends[counts != last] = np.inf
    # Of the best ladder that ends at each size: what is read of rows, but for the dense form, and its sizes.
    total, steps = held * cost, [np.full(len(counts), -1)]
    best = _ladder(counts, within, steps, int(np.argmin(total + ends)), float(np.min(total + ends)))
    for _ in range(1, min(MOST, len(counts))):
        # From a size h to a larger one i: those that need more than h take i.
        longer = np.where(counts[:, None] < counts[None, :], total[:, None] + (held - held[:, None]) * cost, np.inf)
        steps.append(np.argmin(longer, axis=0))
        total = np.min(longer, axis=0)
        found = _ladder(counts, within, steps, int(np.argmin(total + ends)), float(np.min(total + ends)))
        # Two more may be worth it where one is not.
        if best.read - found.read >= (len(found.counts) - len(best.counts)) * WORTH * (fixed + best.read):
            best = found
    return best


def _ladder(counts: np.ndarray, within: np.ndarray, steps: list[np.ndarray], end: int, read: float) -> Ladder:
    found = []
    for step in reversed(steps):
        found.append(int(counts[end]))
        end = int(step[end])
    found.reverse()
    shares = np.diff([0.0, *(within[c - 1] for c in found), 1.0])
    return Ladder(tuple(found), tuple(float(s) for s in shares), read)


def _points(needs: np.ndarray, own: int, nothing_above: bool) -> np.ndarray:
    """Sizes to weigh, ascending: those that were needed, at most so many, and one of its own."""
    known = np.flatnonzero(needs) + 1
    known = known[np.unique(np.linspace(0, len(known) - 1, _POINTS).astype(int))]
    if nothing_above:
        known = known[known < own]
    return np.union1d(known, [own])
