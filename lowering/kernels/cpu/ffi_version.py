"""Which version of XLA's FFI a jaxlib has, by its headers; ``setup.py`` reads it, too, where nothing is installed."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["ffi_version"]


def ffi_version(include: Path) -> tuple[int, int] | None:
    """Major and minor version that headers are of, such as ``(0, 5)``; None where they are missing or do not say.

    XLA refuses a library that was built for a later one.
    """
    header = include / "xla" / "ffi" / "api" / "c_api.h"
    text = header.read_text() if header.exists() else ""
    major, minor = (re.search(rf"#define XLA_FFI_API_{part} (\d+)", text) for part in ("MAJOR", "MINOR"))
    return (int(major[1]), int(minor[1])) if major and minor else None
