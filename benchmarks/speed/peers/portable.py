"""This library without its native kernels, as on machines that have none: a process with ``HIRE_KERNELS=off``."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

from benchmarks.speed.cases import Weights
from benchmarks.speed.peers import Kernel, Left, Settings, ours


def missing() -> str | None:
    """Kernels are on or off for a whole process."""
    off = os.environ.get("HIRE_KERNELS", "").lower() in ("off", "0")
    return None if off else "kernels are on in this process, so none can be without: leave out --in-process"


def kernels(weights: Weights, settings: Settings) -> Iterator[Kernel | Left]:
    """As ``ours``."""
    for made in ours.kernels(weights, settings):
        yield dataclasses.replace(made, name=made.name.replace("ours:", "without kernels:"))
