"""Rounds of calls, medians and quartiles."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

# Between two readings of the same byte so many others are read, several times the third-level cache.
APART = 256 << 20
MOST_SETS = 64
# A kernel gets about so many seconds of a round, and no more calls than that.
SECONDS, CALLS = 0.04, 8


def sets_for(read: int, apart: int = APART) -> int:
    """How many sets of weights a kernel that reads so many bytes a call goes round."""
    return int(np.clip(-(-apart // max(read, 1)), 1, MOST_SETS))


@dataclass
class Turn:
    """What a kernel does in a round: a call that is not timed, then so many that are."""

    call: Callable[[int], Any]
    number: int = 0
    calls: int = 1

    def warm_up(self) -> None:
        """Two calls, of which the second says how many a round has."""
        for _ in range(2):
            seconds = self._once()
        self.calls = int(np.clip(SECONDS / seconds, 1, CALLS))

    def round(self) -> list[float]:
        """Seconds of each timed call."""
        if self.calls > 1:
            self._once()
        return [self._once() for _ in range(self.calls)]

    def _once(self) -> float:
        start = time.perf_counter()
        self.call(self.number)
        seconds = time.perf_counter() - start
        self.number += 1
        return seconds


@dataclass(frozen=True)
class Spread:
    """Median and quartiles in seconds."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, seconds: list[float]) -> Spread:
        """Of all calls of all rounds."""
        return cls(*(float(q) for q in np.quantile(seconds, (0.25, 0.5, 0.75))))
