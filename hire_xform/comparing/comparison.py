"""What comparing a function with its sparse form says, as data, as text and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from hire_xform.comparing.agreement import Agreement
from hire_xform.explain import size
from hire_xform.passes.plan.decisions import Refusal
from hire_xform.passes.plan.profile import seconds_text


@dataclass(frozen=True)
class Run:
    """One of the two programs.

    Attributes:
      seconds: of a call, the median.
      spread: the range of the middle half of the times, of the median.
      weight_bytes: bytes of weights that a call reads, by the plan; of certified sites by the sizes that were taken.
      speed: these bytes a second; None where they are not known.
      share: that, of the speed of memory; None where one of both is not known.
    """

    seconds: float
    spread: float
    weight_bytes: int
    speed: float | None
    share: float | None


@dataclass(frozen=True)
class SiteComparison:
    """A site that is rewritten.

    Attributes:
      kind, path, source: as of ``Site``.
      dense_bytes, sparse_bytes: as of ``Site``: what is planned.
      dense_seconds, sparse_seconds: as of ``Site``: what is predicted.
      predicted: how many times as fast that is.
      executions: how often it was run in a call; None where nothing counts that.
      ran_dense: of a certified site, in how many of these it ran dense, being not proved.
      short: of a block that is not certified, in how many it had more non-zero units than it computes.
      saved: seconds by which a call with this site alone sparse is faster than the dense one; only if asked for.
    """

    kind: str
    path: str
    source: str
    dense_bytes: int
    sparse_bytes: int
    dense_seconds: float
    sparse_seconds: float
    predicted: float
    executions: int | None = None
    ran_dense: int | None = None
    short: int | None = None
    saved: float | None = None

    @property
    def gain(self) -> float:
        """By how many seconds a call with this site alone sparse is predicted to be faster."""
        return self.dense_seconds - self.sparse_seconds

    def lines(self) -> list[str]:
        """For people."""
        told = [f"{size(self.dense_bytes)} -> {size(self.sparse_bytes)} ({self.sparse_bytes / self.dense_bytes:.0%})"]
        times = f"{seconds_text(self.dense_seconds)} -> {seconds_text(self.sparse_seconds)}"
        told.append(f"predicted {self.predicted:.2f} times as fast, {times}")
        of = f"{self.executions:,} execution{'' if self.executions == 1 else 's'}" if self.executions else ""
        if self.executions == 0:
            told.append("not executed")
        elif self.ran_dense is not None:
            told.append(f"not proved, and run dense, in {self.ran_dense:,} of {of}")
        elif self.short is not None:
            told.append(f"short of units in {self.short:,} of {of}")
        if self.saved is not None:
            told.append(f"alone it makes the call {_change(self.saved)}, predicted {_change(self.gain)}")
        return [f"  {self.kind:5s}  {self.path}", f"         {self.source}", f"         {'; '.join(told)}"]


def _change(saved: float) -> str:
    return f"{seconds_text(abs(saved))} {'faster' if saved >= 0 else 'slower'}"


@dataclass(frozen=True)
class Comparison:
    """A function, dense and sparse, on arguments of the user's. ``print`` it.

    Attributes:
      name: the function's.
      platform: "cpu", "gpu" or "tpu".
      repeats: calls of each that were timed, in turn.
      dense: the function under ``jax.jit``.
      sparse: the sparsified one, its weights packed.
      ratio: how many times as fast the sparse one is.
      memory_speed: bytes a second that a large product reads here; None where it was not measured.
      predicted: seconds by which a call is predicted to be faster sparse, all sites together.
      profile: the machine that this is predicted for, and how it is known.
      agreement: for each leaf of the result how far the sparse one is from the dense one.
      sites: what is rewritten, in program order.
      refused: how many products with weights stay dense.
      refused_bytes: bytes that these read.
      largest_refusals: those that read the most.
      notes: what to mind in reading all this.
    """

    name: str
    platform: str
    repeats: int
    dense: Run
    sparse: Run
    ratio: float
    memory_speed: float | None
    predicted: float
    profile: str
    agreement: tuple[Agreement, ...]
    sites: tuple[SiteComparison, ...]
    refused: int
    refused_bytes: int
    largest_refusals: tuple[Refusal, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """For people."""
        lines = [
            f"{self.name} on {self.platform}: sparse is {self.ratio:.2f} times as fast as dense",
            *(self._run(name, run) for name, run in (("dense", self.dense), ("sparse", self.sparse))),
            f"  medians of {self.repeats} calls in turn, and the range of their middle half"
            + ("" if self.memory_speed is None else f"; memory gives {self.memory_speed / 1e9:.1f} GB/s"),
            *self._prediction(),
            "",
            "Sparse results, against dense ones:",
            *(f"  {leaf}" for leaf in self.agreement),
        ]
        if self.sites:
            lines += ["", f"{len(self.sites)} site{'s' if len(self.sites) > 1 else ''} rewritten:"]
            lines += [line for site in self.sites for line in site.lines()]
        if self.refused:
            more = "" if len(self.largest_refusals) == self.refused else ", the largest of them"
            stay = "s stay" if self.refused > 1 else " stays"
            lines += ["", f"{self.refused} product{stay} dense ({size(self.refused_bytes)} read){more}:"]
            for refusal in self.largest_refusals:
                lines.append(f"  {refusal.kind or 'dense':5s}  {refusal.path}  {size(refusal.dense_bytes)}")
                lines += [f"         {refusal.source}", f"         {refusal.reason}"]
        if self.notes:
            lines += ["", "Mind:", *(f"  - {note}" for note in self.notes)]
        return "\n".join(lines)

    def _run(self, name: str, run: Run) -> str:
        text = f"  {name:6s}  {seconds_text(run.seconds)} ± {run.spread:.0%}, {size(run.weight_bytes)} of weights read"
        if run.speed is not None:
            text += f", {run.speed / 1e9:.2f} GB/s"
        return text + ("" if run.share is None else f", {run.share:.0%} of the speed of memory")

    def _prediction(self) -> list[str]:
        if not self.sites:
            return []
        measured = self.dense.seconds - self.sparse.seconds
        return [f"  sparse is {_change(measured)}, predicted {_change(self.predicted)} (profile: {self.profile})"]

    def to_json(self, indent: int | None = 2) -> str:
        """All of it as JSON, by the names of the attributes; null for what is unknown, infinite or not a number."""
        return json.dumps(_plain({f.name: getattr(self, f.name) for f in fields(self)}), indent=indent)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(one) for one in value]
    if isinstance(value, (Run, SiteComparison, Agreement, Refusal)):
        return _plain(asdict(value))
    return None if isinstance(value, float) and not math.isfinite(value) else value
