"""What a calibration is at and how long that will take: a progress bar on stderr."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Sized
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as _TimeRemaining


class Shown:
    """A line for each phase: ``inputs``, ``fitting`` in MB of weights, ``predictors`` and ``sizes``; or nothing.

    It is shown inside a ``with``.
    """

    def __init__(self, show: bool):
        """Whether anything is shown."""
        columns = (
            *(TextColumn("calibrating: {task.description}"), BarColumn(), MofNCompleteColumn()),
            *(TextColumn("{task.fields[of]}"), TimeElapsedColumn(), TextColumn("left:"), _TimeRemaining()),
        )
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True) if show else None
        self._fitting: TaskID | None = None

    def __enter__(self) -> Shown:
        """Begins."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: types.TracebackType | None
    ) -> None:
        """Ends."""
        if self._bar is not None:
            self._bar.stop()

    def each(self, values: Iterable[Any], phase: str, of: str = "batches") -> Iterator[Any]:
        """The values, with a line that goes on when the next is asked for."""
        if self._bar is None:
            yield from values
            return
        task = self._bar.add_task(phase, total=len(values) if isinstance(values, Sized) else None, of=of)
        for value in values:
            yield value
            self._bar.advance(task)

    def packing(self, done: int, total: int) -> None:
        """So many bytes of weights are packed, of so many that are to be."""
        if self._bar is None:
            return
        if self._fitting is None:
            self._fitting = self._bar.add_task("fitting", total=None, of="MB of weights")
        self._bar.update(self._fitting, completed=done >> 20, total=max(total >> 20, 1))
