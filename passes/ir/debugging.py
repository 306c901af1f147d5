"""Aids for whoever develops the pass, switched on by environment variables: ``HIRE_DEBUG`` and ``HIRE_WHY``.

``docs/debugging.md`` shows them; ``HIRE_DUMP`` is in ``hire_xform/dump/stage_files.py``.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any


def debugging() -> bool:
    """Whether ``HIRE_DEBUG`` is on: errors that are handled elsewhere are raised, and what passes make is verified."""
    return os.environ.get("HIRE_DEBUG", "0") not in ("", "0")


def type_text(aval: Any) -> str:
    """A type, such as ``float32[1,32]``."""
    if not hasattr(aval, "shape") or not hasattr(aval, "dtype"):
        return str(aval)
    return f"{aval.dtype}[{','.join(str(d) for d in aval.shape)}]"


def path_matches(glob: str, path: str) -> bool:
    """Whether an equation's path fits a pattern: ``*`` and ``?`` stand for any characters, brackets for themselves."""
    pattern = "".join(".*" if c == "*" else "." if c == "?" else re.escape(c) for c in glob)
    return re.fullmatch(pattern, path) is not None


class Why:
    """Prints the checks that products go through, of those whose paths fit ``HIRE_WHY``; a line to stderr for each."""

    def __init__(self) -> None:
        """Reads the variable, once for a pass."""
        self._glob = os.environ.get("HIRE_WHY", "")

    def asks_for(self, *paths: str) -> bool:
        """Whether one of these products' checks are to be printed."""
        return bool(self._glob) and any(path_matches(self._glob, path) for path in paths)

    def tell(self, path: str, check: str, outcome: str) -> None:
        """Prints the outcome of a check, where its product's are asked for."""
        if self.asks_for(path):
            self.write(path, check, outcome)

    def write(self, path: str, check: str, outcome: str) -> None:
        """Prints it, whatever its path."""
        print(f"hire_why {path}: {check}: {outcome}", file=sys.stderr)
