"""Sizes of a site: one, one for each of a few levels of layers, and of certified sites a ladder of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hire_xform.lowering.engine.selection import Selection, rungs, selection_of
from hire_xform.passes.match.kinds import kind_of
from hire_xform.passes.match.matches import Match
from hire_xform.passes.plan.cost import Taken, bytes_read
from hire_xform.passes.plan.decisions import Rung
from hire_xform.passes.plan.ladder import Ladder, ladder_of
from hire_xform.passes.plan.levels import WORTH, Levels, levels_of, told
from hire_xform.passes.plan.measurement import Chosen
from hire_xform.passes.plan.settings import Settings
from hire_xform.passes.weights.cut_weights import is_cut

UNCHOSEN = Chosen(None, None, "")


@dataclass(frozen=True)
class Reading:
    """What a site reads, on one device.

    Attributes:
      match: the match.
      settings: its settings.
      tokens: of one execution.
      groups: rows, or groups of units, to choose from.
      group_size: units in one.
      shards: over how many devices the site is.
      static: units that are always computed, and not chosen from.
    """

    match: Match
    settings: Settings
    tokens: int
    groups: int
    group_size: int
    shards: int
    static: int = 0

    def selection(self, count: int) -> Selection:
        """How tokens share so many rows, or groups, each; none are of a site that chooses none."""
        return selection_of(self.tokens, self.groups, count) if count else Selection(mode="shared", size=0, k=0)

    def rows(self, count: int) -> int:
        """Rows computed exactly, where that is the site's one size."""
        return self.selection(count).rows_read(self.tokens) * self.group_size + self.static

    def rows_of(self, ladder: Sequence[int]) -> list[int]:
        """The same of each of several sizes."""
        selections = rungs(self.tokens, self.groups, ladder)
        return [s.rows_read(self.tokens) * self.group_size for s in selections]

    def bytes(self, count: int) -> tuple[int, int]:
        """Bytes of the predictor, and of the rows of one size."""
        return bytes_read(self.match, self.settings, self.rows(count), self.shards, self.static)

    def exact(self, rows: int) -> int:
        """Bytes of so many rows."""
        return bytes_read(self.match, self.settings, rows, self.shards)[1]

    @property
    def dense(self) -> int:
        """Bytes of the dense form."""
        return sum(p.nbytes for p in self.match.products) // self.shards

    @property
    def tried(self) -> bool:
        """Whether what is computed exactly is read before it is known whether the dense form must be run."""
        return kind_of(self.match).tries(self.match)


@dataclass(frozen=True)
class Sizes:
    """The sizes of a site and what they read, per execution on one device.

    Attributes:
      predicted: bytes of the predictor.
      exact: bytes of the rows computed exactly, expected where that is known.
      smaller: sizes below its one size, of a certified site.
      levels: sizes of layers that have their own.
      rungs: what reports say of a certified site's sizes.
      how: what to tell of them.
    """

    predicted: int
    exact: int
    smaller: tuple[int, ...] = ()
    levels: Levels | None = None
    rungs: tuple[Rung, ...] = ()
    how: str = ""

    def taken(self, tried: bool) -> list[Taken]:
        """What is expected to be taken; without a calibration the largest size always."""
        *rungs, dense = self.rungs or (None,)
        if dense is None or dense.share is None:
            return [(1.0, self.exact, False)]
        found = [(rung.share or 0.0, rung.bytes - self.predicted, False) for rung in rungs if rung is not None]
        most = max(rows for _, rows, _ in found)
        return [*found, (dense.share, most if tried else 0, True)]


def sizes_of(read: Reading, chosen: Chosen, count: int) -> Sizes:
    """The sizes of a site whose largest, or one, is ``count``, by what a calibration says of it."""
    predicted, exact = read.bytes(count)
    needs = chosen.needs if read.settings.certify else None
    ladder = None if needs is None else _ladder(read, predicted, needs, count)
    one = Sizes(predicted, exact)
    if read.settings.certify:
        one = _with_ladders(read, predicted, [((count,), None) if ladder is None else (ladder.counts, ladder.shares)])
        one = replace(one, smaller=() if ladder is None else ladder.counts[:-1])
        exact = one.exact
    if (
        chosen.sizes is None
        or len(set(chosen.sizes.ravel().tolist())) < 2
        or is_cut(read.match.products[0].origin.refs)
    ):
        return one
    levels = levels_of(chosen.sizes)
    if needs is None:
        own = [read.bytes(c)[1] for c in levels.counts]
        several = Sizes(predicted, math.ceil(sum(own[n] for n in levels.numbers) / chosen.sizes.size))
    else:
        layers = needs.reshape(-1, needs.shape[-1])
        numbers = np.asarray(levels.numbers)
        ladders = [_ladder(read, predicted, layers[numbers == n], c) for n, c in enumerate(levels.counts)]
        levels = replace(levels, smaller=tuple(found.counts[:-1] for found in ladders))
        weights = np.bincount(numbers, minlength=len(ladders)) / len(numbers)
        several = _with_ladders(
            read,
            predicted,
            [(f.counts, tuple(float(w) * s for s in f.shares)) for f, w in zip(ladders, weights, strict=True)],
        )
    saved = (exact - several.exact) / (predicted + exact)
    if saved < WORTH:
        own_sizes = told(chosen.sizes.ravel().tolist())
        return replace(one, how=f"; the layers share it, as sizes of their own ({own_sizes}) save {saved:.1%}")
    counts = [levels.counts[n] for n in levels.numbers]
    how = f"; each layer has its own in a branch ({told(counts)}), which saves {saved:.1%}"
    return replace(several, levels=levels, how=how)


def _ladder(read: Reading, predicted: int, needs: np.ndarray, last: int) -> Ladder:
    def bytes_of(count: int) -> float:
        return read.exact(read.rows_of((count, last) if count < last else (last,))[0])

    return ladder_of(
        needs,
        bytes_of,
        read.dense,
        tried=read.tried,
        fixed=predicted,
        tokens=read.tokens,
        last=last,
    )


def _with_ladders(
    read: Reading, predicted: int, ladders: Sequence[tuple[tuple[int, ...], tuple[float, ...] | None]]
) -> Sizes:
    """Of a certified site's ladders, each with the shares of its sizes and of the dense form, where these are known."""
    found: list[Rung] = []
    expected, most, dense_share = 0.0, 0, 0.0
    known = True
    for counts, shares in ladders:
        exact = [read.exact(rows) for rows in read.rows_of(counts)]
        most = max(most, exact[-1])
        dense = read.dense + (exact[-1] if read.tried else 0)
        for i, rows in enumerate(read.rows_of(counts)):
            found.append(Rung(rows, predicted + exact[i], None if shares is None else shares[i]))
        if shares is None:
            known = False
            continue
        expected += sum(s * e for s, e in zip(shares, (*exact, dense), strict=True))
        dense_share += shares[-1]
    whole = read.dense + (most if read.tried else 0)
    found.append(Rung(read.groups * read.group_size, predicted + whole, dense_share if known else None))
    return Sizes(predicted, math.ceil(expected) if known else most, rungs=tuple(found))
