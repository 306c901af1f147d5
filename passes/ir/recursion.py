"""Python's limit on nested calls, raised while a deeply nested program is rewritten.

A program whose loops, branches and calls are nested deeply is traced by JAX in so many nested Python calls; rewriting
it traces it again, with some calls more at each level. So a program that JAX lowers could be too deep for the pass.

The limit is one number for the whole process. It is raised, never lowered below what it was, and put back by the last
of those who raised it, so that threads may do so at once. (Another thread with a larger stack would not do: the traces,
meshes and settings around the call are those of its own thread.) What is raised is bounded, since frames take stack.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

# Nested calls for each level of nesting, JAX's and the pass's, and what else stands around; at most so many in all.
_EACH, _AROUND, _MOST = 60, 400, 20_000


class _Raised:
    """The limits that are asked for now; ``before`` is the limit that was there, ``made`` the one that was set."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.asked: list[int] = []
        self.before = self.made = 0


_raised = _Raised()


@contextmanager
def room_for(levels: int) -> Iterator[None]:
    """Lets calls nest as deeply as rewriting a program of so many levels of nesting takes."""
    depth = sum(1 for _ in traceback.walk_stack(None))
    limit = min(depth + _EACH * levels + _AROUND, max(_MOST, sys.getrecursionlimit()))
    with _raised.lock:
        if not _raised.asked:
            _raised.before = _raised.made = sys.getrecursionlimit()
        _raised.asked.append(limit)
        _set_limit()
    try:
        yield
    finally:
        with _raised.lock:
            _raised.asked.remove(limit)
            _set_limit()


def _set_limit() -> None:
    """Sets what is asked for, unless somebody else has set the limit since."""
    if sys.getrecursionlimit() == _raised.made:
        _raised.made = max((_raised.before, *_raised.asked))
        sys.setrecursionlimit(_raised.made)
