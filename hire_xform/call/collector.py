"""Pauses Python's garbage collector while programs are traced and rewritten."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Pauses the garbage collector: programs are many small live objects, which full collections walk over and over.

    It is a fifth of the time to trace and lower a deep model. What was made meanwhile counts as old afterwards, as it
    would without the pause; else the next collection, of young objects, would walk over all of it at once.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # else a user has frozen objects, which are to stay so
            gc.freeze()
            gc.unfreeze()
        gc.enable()
