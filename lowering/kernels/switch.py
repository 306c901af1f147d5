"""Whether this library's own kernels are wanted: ``HIRE_KERNELS=off`` does without, on every platform."""

from __future__ import annotations

import os

__all__ = ["switched_off"]


def switched_off() -> bool:
    """Whether there are to be none."""
    return os.environ.get("HIRE_KERNELS", "").lower() in ("off", "0")
