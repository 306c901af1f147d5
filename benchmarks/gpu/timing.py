"""Seconds by the clock, and kernels by the profiler."""

from __future__ import annotations

import collections
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

REPEATS = 5


@dataclass(frozen=True)
class Kernels:
    """Of one step: how many kernels there are, for how long they are busy, and the one that takes most of it."""

    count: float
    busy_us: float
    largest: str
    largest_us: float


def timed(call: Callable[[], Any], times: int) -> float:
    """Seconds of one of the ``times`` steps of a call: the median of some calls, after one that is not counted."""
    jax.block_until_ready(call())
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(call())
        found.append((time.perf_counter() - start) / times)
    return statistics.median(found)


def traced(call: Callable[[], Any], times: int) -> Kernels | None:
    """What the profiler sees of a call of so many steps, which has run before; None where it sees no kernels."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        files = sorted(Path(folder).glob("**/*.xplane.pb"))
        # Events are read while the file is there.
        return kernels_in(jax.profiler.ProfileData.from_file(str(files[-1])).planes, times) if files else None


def kernels_in(planes: Iterable[Any], times: int) -> Kernels | None:
    """Kernels and copies in the streams of a GPU's planes, of one of so many steps; None where there are none."""
    lines = [line for plane in planes if "GPU" in plane.name for line in plane.lines if "Stream" in line.name]
    busy: collections.Counter[str] = collections.Counter()
    count = 0
    for event in (event for line in lines for event in line.events):
        busy[event.name] += event.duration_ns
        count += 1
    if not count:
        return None
    (name, most), *_ = busy.most_common(1)
    return Kernels(count / times, sum(busy.values()) / times / 1e3, name, most / times / 1e3)


def profiles() -> bool:
    """Whether the profiler sees kernels here."""
    if jax.devices()[0].platform != "gpu":
        return False
    add = jax.jit(lambda x: x + 1.0)
    x = jax.block_until_ready(add(jax.numpy.zeros(1024)))
    try:
        return traced(lambda: add(x), 1) is not None
    except Exception as error:
        print(f"no profiler: {type(error).__name__}: {error}", flush=True)
        return False
