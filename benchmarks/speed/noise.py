"""How busy others kept the processors meanwhile, as Linux says."""

from __future__ import annotations

import os
import pathlib
import time
from collections.abc import Iterable


def others(begin: tuple[float, float, float], end: tuple[float, float, float]) -> float | None:
    """Of the processors' time between two readings, the share that neither was idle nor ours."""
    seconds, busy, own = (after - before for before, after in zip(begin, end, strict=True))
    if not busy:
        return None
    return max(0.0, busy - own) / (seconds * (os.cpu_count() or 1))


def reading(pids: Iterable[int]) -> tuple[float, float, float]:
    """Now, seconds that processors were busy, and seconds of these processes; zeros where there is no such thing."""
    try:
        tick = os.sysconf("SC_CLK_TCK")
        user, nice, system, _, _, *interrupts = _numbers("/proc/stat", 1, 9)
        busy = (user + nice + system + sum(interrupts)) / tick
        # After the name in brackets, which may have spaces: the times are the fields 14 and 15 of all.
        own = sum(sum(_numbers(f"/proc/{pid}/stat", -39, -37)) for pid in pids) / tick
    except (OSError, ValueError):
        return time.perf_counter(), 0.0, 0.0
    return time.perf_counter(), busy, own


def _numbers(path: str, first: int, last: int) -> list[int]:
    return [int(word) for word in pathlib.Path(path).read_text().split("\n", 1)[0].split()[first:last]]
