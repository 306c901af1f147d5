"""Threads that compile what is lowered, the longest first, while the next is lowered."""

from __future__ import annotations

import itertools
import math
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

# Seconds that threads without work get to end.
MOMENT = 2.0


class Pool:
    """Threads that work through what is added. JAX lets others run while XLA compiles.

    They are daemons: what still compiles when the time is up does not hold the process.
    """

    def __init__(self, threads: int | None, until: float):
        """Starts them.

        Args:
          threads: how many; None for as many as there are cores.
          until: when nothing more is begun, by ``time.monotonic()``; what is waiting then is cancelled.
        """
        self._todo: queue.PriorityQueue[Any] = queue.PriorityQueue()
        self._number, self._until = itertools.count(), until
        self.threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads or os.cpu_count() or 1)]
        for thread in self.threads:
            thread.start()

    def add(self, rank: float, size: int, call: Callable[[], Any] | None) -> Future:
        """Has a call made: those of a lower rank first, and of these the largest; None ends a thread."""
        future: Future = Future()
        self._todo.put((rank, -size, next(self._number), future, call))
        return future

    def close(self, deadline: float) -> bool:
        """Waits for all that was added, until a moment; whether it is done, and nothing runs any more."""
        for _ in self.threads:
            self.add(float("inf"), 0, None)
        if not math.isinf(deadline):
            deadline = max(deadline, time.monotonic() + MOMENT)
        for thread in self.threads:
            thread.join(None if math.isinf(deadline) else max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self.threads)

    def _work(self) -> None:
        while True:
            *_, future, call = self._todo.get()
            if call is None:
                return
            if time.monotonic() > self._until:
                future.cancel()
                continue
            future.set_running_or_notify_cancel()
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
