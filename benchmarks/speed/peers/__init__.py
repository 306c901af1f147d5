"""Everybody who takes part, one module each, with one protocol.

A peer says what it misses, and makes kernels of the weights of a case: how many bytes a call reads,
and the call. What can't run is a ``Left`` with the reason. Modules are loaded in the worker that runs them, since no
interpreter need have all frameworks.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from benchmarks.speed.cases import Weights

# How far from NumPy's a result may be: see ``cases.disagreement``. Weights of 8-bit floats are rounded by some, and
# units that fire are left out by some.
EXACT, BF16, INT8, INT4, NARROW, LOSSY = 2e-3, 0.1, 0.1, 0.5, 0.35, 0.9


@dataclass
class Kernel:
    """Something that is timed. A call takes its number, for other weights and inputs at each, and waits."""

    name: str
    # Bytes of weights that a call reads, and that are held for it.
    read: int
    held: int
    call: Callable[[int], np.ndarray]
    tolerance: float
    # What all are compared with is the fastest of these.
    dense: bool = False
    note: str = ""


@dataclass
class Left:
    """Something that is not run, and why."""

    name: str
    reason: str


class Peer(Protocol):
    """What a module of this package is."""

    def missing(self) -> str | None:
        """What to install, or None where it can run."""

    def idle(self) -> None:
        """After a round, where there is such a function: lets others have the processors."""

    def kernels(self, weights: Weights, settings: Settings) -> Iterator[Kernel | Left]:
        """Of a case, made one after the other."""


@dataclass(frozen=True)
class Settings:
    """Of a run, for peers."""

    threads: int
    # Bytes that lie between two readings of the same one.
    apart: int
    # Bytes that must stay free on this machine.
    reserve: int = 0
    # The folder of ggml's libraries.
    ggml: str = ""

    def short_of(self, nbytes: float) -> str | None:
        """Why so many more bytes can't be held, or None."""
        free = available() - self.reserve
        if nbytes <= free:
            return None
        return f"needs {nbytes / 1e9:.1f} GB more memory, and {max(free, 0) / 1e9:.1f} GB are free"


def available() -> float:
    """Bytes of memory that are free, as Linux says; elsewhere no limit is known."""
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except OSError:
        return float("inf")


# Family to module; the order is that of the table.
MODULES = {
    "memory": "memory",
    "dense": "dense",
    "ours": "ours",
    "naive": "naive",
    "int8": "int8",
    "qwix": "qwix_int8",
    "portable": "portable",
    "ggml": "ggml",
    "torch": "pytorch",
}
# Each runs in a process of its own: their threads would spin against each other's.
PROCESSES = {
    "jax": ("memory", "dense", "ours", "naive", "int8", "qwix"),
    "portable": ("portable",),
    "ggml": ("ggml",),
    "torch": ("torch",),
}
# Takes part only where it is asked for.
OPTIONAL = ("portable",)


def load(family: str) -> Peer:
    """The peer of a family."""
    peer: Any = importlib.import_module(f"{__name__}.{MODULES[family]}")
    return peer
