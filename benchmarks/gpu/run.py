"""What all parts know, the lines that they add to the table, and the summary of it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.timing import Kernels
from hire_xform.dump.targets import Target

PARTS = ("check", "head", "ffn", "step")


@dataclass
class Row:
    """A line of the table; kernels and busy time of one step are None where there is no profiler."""

    part: str
    name: str
    tokens: int
    milliseconds: float
    nbytes: float
    share: float
    note: str
    kernels: float | None
    busy_us: float | None


@dataclass
class Run:
    """What all parts know, and what they found.

    Attributes:
      sizes, tokens: what is run.
      deadline: when nothing more is begun, by ``time.monotonic()``.
      compiling: what everything is only compiled for; None to run it.
      forms: parts of the names of what is run.
      profiles: whether the profiler sees kernels.
      copy_speed: bytes a second.
      rows, wrong, left_out: what was found.
    """

    sizes: Sizes
    tokens: tuple[int, ...]
    deadline: float
    compiling: Target | None = None
    forms: tuple[str, ...] = ("",)
    profiles: bool = False
    copy_speed: float = float("nan")
    rows: list[Row] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def takes(self, name: str) -> bool:
        """Whether a form is to be run."""
        return any(form in name for form in self.forms)

    def placed(self, shapes: Any) -> Any:
        """Shapes, on the device that is compiled for."""
        return self.compiling.placed(shapes) if self.compiling else shapes

    def fails(self, what: str, error: BaseException) -> None:
        """Notes it and goes on: the parts after it are as good without it, and the time on a GPU is short."""
        self.wrong.append(f"{what}: {type(error).__name__}: {str(error)[:2000]}")
        print(f"{what} FAILED: {type(error).__name__}: {str(error)[:2000]}", flush=True)

    def tell(
        self,
        part: str,
        name: str,
        tokens: int,
        seconds: float,
        nbytes: float,
        notes: Sequence[str] = (),
        kernels: Kernels | None = None,
    ) -> None:
        """Prints a line at once: what was measured stays, whatever comes after it.

        Args:
          part, name, tokens: of what.
          seconds, nbytes: of a step.
          notes: further words.
          kernels: of a step.
        """
        speed = nbytes / seconds
        if kernels:
            notes = [*notes, f"{kernels.count:.1f} kernels a step, busy {kernels.busy_us:.1f} us a step"]
        found = (kernels.count, kernels.busy_us) if kernels else (None, None)
        row = Row(part, name, tokens, 1e3 * seconds / tokens, nbytes, speed / self.copy_speed, ", ".join(notes), *found)
        self.rows.append(row)
        print(
            f"{part:6s} {name:44s} {tokens:2d} tokens {1e3 * seconds:9.4f} ms a step {row.milliseconds:9.4f} ms a "
            f"token {nbytes / 1e6:9.2f} MB {speed / 1e9:8.1f} GB/s {row.share:6.1%} of copying  {row.note}",
            flush=True,
        )

    def summary(self) -> None:
        """Of each part and number of tokens ours and int8 beside the best dense form; what is wrong or left out."""
        for part in PARTS[1:]:
            for tokens in self.tokens:
                rows = [row for row in self.rows if (row.part, row.tokens) == (part, tokens)]
                best = min((row.milliseconds for row in rows if row.name.startswith("dense")), default=None)
                others = [row for row in rows if not row.name.startswith("dense")]
                if best is not None and others:
                    ratios = [f"{row.name} {best / row.milliseconds:.2f}x" for row in others]
                    print(f"{part}, {tokens} tokens, of the best dense form: {'; '.join(ratios)}")
        for what, found in (("left out", self.left_out), ("WRONG", self.wrong)):
            for one in found:
                print(f"{what}: {one}")

    def write(self, path: str, **others: Any) -> None:
        """The same as JSON, with what else is told of the run."""
        found = {**others, "copy": self.copy_speed, "sizes": vars(self.sizes), "wrong": self.wrong}
        found |= {"left_out": self.left_out, "rows": [vars(row) for row in self.rows]}
        with open(path, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)

    def has_time(self, what: str, until: float | None = None) -> bool:
        """Whether there is time left; if not, what does without it is noted."""
        if time.monotonic() < (self.deadline if until is None else until):
            return True
        self.left_out.append(what)
        return False
