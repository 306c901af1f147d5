"""Times of programs that run in turn, and what to judge them by: the speed of memory, and the size of the cache."""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hire_xform.api import Sparsified

# Calls of each program before those that are timed.
WARM_UP = 2
# What is read to measure the speed of memory: far more than caches hold, and long enough that a call costs nothing.
STREAMED = {"cpu": 256 << 20, "gpu": 1 << 30, "tpu": 1 << 30}
_STREAMS = 5
_CACHES = Path("/sys/devices/system/cpu")


class Runnable:
    """The jitted function that a call runs, and its operands: packed already, and on the device."""

    def __init__(self, step: Sparsified, args: tuple[Any, ...], kwargs: Mapping[str, Any]):
        """Packs and traces; compiles nothing."""
        self._jitted, operands = step.program(*args, **kwargs)
        *self._kept, self._donated = jax.tree.map(_on_device, operands)

    def operands(self) -> tuple[Any, ...]:
        """What a call is given. What it donates is a copy, so that the user's arrays live on."""
        donated = [leaf.copy() if isinstance(leaf, jax.Array) else leaf for leaf in self._donated]
        return *self._kept, jax.block_until_ready(donated)

    def __call__(self) -> Any:
        """The result of a call."""
        return self.timed()[0]

    def timed(self) -> tuple[Any, float]:
        """The result of a call, and its seconds."""
        operands = self.operands()
        start = time.perf_counter()
        result = jax.block_until_ready(self._jitted(*operands))
        return result, time.perf_counter() - start


def _on_device(leaf: Any) -> Any:
    return jax.device_put(leaf) if isinstance(leaf, np.ndarray) else leaf


def seconds_in_turn(programs: Sequence[Runnable], repeats: int) -> list[np.ndarray]:
    """The seconds of each call of each program; they take turns, in one order and then in the other."""
    seconds: list[list[float]] = [[] for _ in programs]
    for number in range(-WARM_UP, repeats):
        turns = list(zip(programs, seconds, strict=True))
        for program, taken in turns if number % 2 else reversed(turns):
            once = program.timed()[1]
            if number >= 0:
                taken.append(once)
    return [np.array(taken) for taken in seconds]


def spread_of(seconds: np.ndarray) -> float:
    """The range of the middle half of some times, of their median."""
    low, middle, high = np.percentile(seconds, (25, 50, 75))
    return float((high - low) / middle)


@functools.cache
def memory_speed(device: Any) -> float | None:
    """Bytes a second that XLA reads a large array with on a device, the best of a few; None where it has no room."""
    columns = 4096
    rows = STREAMED.get(device.platform, 1 << 30) // columns // 4
    try:
        with jax.default_device(device):
            matrix, row, column = (jnp.ones(s, jnp.float32) for s in ((rows, columns), rows, columns))
            ways: list[Callable[[], Any]] = [
                functools.partial(jax.jit(jnp.dot), matrix, column),
                functools.partial(jax.jit(jnp.dot), row, matrix),
            ]
            best = min(_once(way) for way in ways for _ in range(_STREAMS))
    except jax.errors.JaxRuntimeError:
        return None
    return matrix.nbytes / best


def _once(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def cache_bytes() -> int | None:
    """Bytes of the CPU's third-level caches together; None where they can't be known."""
    try:
        if sys.platform == "darwin":
            told = subprocess.run(
                ["sysctl", "-n", "hw.l3cachesize"], capture_output=True, text=True, timeout=5, check=True
            )
            return int(told.stdout) or None
        found = {}
        for index in _CACHES.glob("cpu[0-9]*/cache/index*"):
            if (index / "level").read_text().strip() == "3":
                size = (index / "size").read_text().strip()
                found[(index / "shared_cpu_list").read_text()] = int(size.removesuffix("K")) << 10
        return sum(found.values()) or None
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
