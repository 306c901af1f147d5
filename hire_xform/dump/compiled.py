"""What the compiler of a device made of a function, dense and sparse: bytes, memory, steps and its own estimates."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
from jax.extend.core import jaxpr_as_fun

from hire_xform.call.program import struct
from hire_xform.dump.hlo import Counts, counts
from hire_xform.explain import size
from hire_xform.lowering.primitives.kernels import backends

if TYPE_CHECKING:
    from hire_xform.call.stages import Traced

# Of the arrays that a program writes, how many are listed.
_LARGEST = 5


@dataclass(frozen=True)
class Made:
    """A compiled program.

    Attributes:
      counts: what it does, read off its text.
      memory: bytes of arguments, results, temporaries and code, as its compiler says; None where it says nothing.
      estimate: the compiler's own "bytes accessed", "flops" and "optimal_seconds", where it has them.
      text: the program.
    """

    counts: Counts
    memory: dict[str, int] | None
    estimate: dict[str, float]
    text: str


@dataclass(frozen=True)
class Compiled:
    """A traced function, compiled dense and sparse for the device of its arguments."""

    name: str
    device: str
    platform: str
    profile: str
    planned: tuple[int, int]
    dense: Made
    sparse: Made

    def table(self) -> str:
        """Dense beside sparse, a line for each figure that is known of both."""
        lines = [f"{'':34s}{'dense':>14s}{'sparse':>14s}{'dense/sparse':>14s}"]
        for what, kind, dense, sparse in self._rows():
            shown = [size(round(v)) if kind == "bytes" else f"{v:,.0f}" for v in (dense, sparse)]
            ratio = f"{dense / sparse:.2f}" if sparse else "-"
            lines.append(f"{what:34s}{shown[0]:>14s}{shown[1]:>14s}{ratio:>14s}")
        endless = self.dense.counts.endless + self.sparse.counts.endless
        if endless:
            lines.append(f"{endless} loops run an unknown number of times, and are counted once")
        for which, made in (("dense", self.dense), ("sparse", self.sparse)):
            most = sorted(made.counts.largest.items(), key=lambda one: -one[1])[:_LARGEST]
            lines.append(f"written most, {which}: " + ", ".join(f"{name} {size(round(b))}" for name, b in most))
        ran = [f"{name} x{runs}" for name, runs in sorted(self.sparse.counts.kernels.items())]
        lines.append(f"kernels called, sparse: {', '.join(ran) or 'none'}")
        return "\n".join(lines)

    def _rows(self) -> list[tuple[str, str, float, float]]:
        dense, sparse = self.dense.counts, self.sparse.counts
        rows: list[tuple[str, str, float, float]] = [
            ("weights, by the plan", "bytes", *self.planned),
            ("moved, by the program", "bytes", dense.moved, sparse.moved),
            ("  of it read", "bytes", dense.read, sparse.read),
            ("  of it written", "bytes", dense.written, sparse.written),
        ]
        if self.dense.memory and self.sparse.memory:
            rows += [(f"memory of {k}", "bytes", v, self.sparse.memory[k]) for k, v in self.dense.memory.items()]
        for key, what, kind in (("bytes accessed", "compiler's bytes accessed", "bytes"), ("flops", "its flops", "")):
            if key in self.dense.estimate and key in self.sparse.estimate:
                rows.append((what, kind, self.dense.estimate[key], self.sparse.estimate[key]))
        if dense.cycles and sparse.cycles:
            rows.append(("compiler's cycles", "", dense.cycles, sparse.cycles))
        rows.append(("steps that are launched", "", dense.steps, sparse.steps))
        return rows

    def headline(self) -> str:
        """What it was compiled for, and what it was planned for."""
        return f"{self.name}, compiled for {self.device}, planned for {self.profile}"

    def to_text(self) -> str:
        """The table, and the sparse program as the compiler left it."""
        return f"{self.headline()}\n\n{self.table()}\n\n{_EXPLAINED}\n\n{self.sparse.text}\n"

    def to_json(self) -> str:
        """All of it as JSON."""
        found: dict[str, Any] = {"function": self.name, "device": self.device, "platform": self.platform}
        found["profile"] = self.profile
        found["planned_bytes"] = {"dense": self.planned[0], "sparse": self.planned[1]}
        found["kernels"] = {step: there[self.platform] for step, there in backends().items()}
        for which, made in (("dense", self.dense), ("sparse", self.sparse)):
            found[which] = {
                "counts": dataclasses.asdict(made.counts),
                "memory": made.memory,
                "estimate": made.estimate,
                "text": made.text,
            }
        return json.dumps(found, indent=1)


_EXPLAINED = (
    "Moved is read off the program below: bodies of loops as often as they run, of gathered and sliced arrays what is\n"
    "taken, whole arrays otherwise. It knows nothing of caches and of tiles, which may make it less or more. The\n"
    "compiler's figures are its own, with each body once."
)


def compile_both(traced: Traced, name: str) -> Compiled:
    """Compiles a traced function, dense and sparse, for the device that its arguments are placed on.

    Raises:
      ValueError: they are on several devices, or what came out is for another.
    """
    devices = {d for s in traced.call.where for d in getattr(s, "device_set", ())}
    if len(devices) > 1 or any(placed is not None for placed in traced.call.placed):
        raise ValueError(
            f"dump: the arguments are over {len(devices)} devices; expected arguments on one, as show='compiled' "
            "compares programs of one device"
        )
    device = next(iter(devices), None) or jax.devices()[0]
    sparse = _made(traced.lower(), device)
    structs = [struct(a, s) for a, s in zip(traced.call.avals, traced.call.where, strict=True)]
    dense = _made(jax.jit(jaxpr_as_fun(traced.jaxpr)).trace(*structs).lower(), device)
    plan = traced.plan
    left = plan.refused_bytes
    platform = {"gpu": "cuda"}.get(device.platform, device.platform)
    planned = plan.dense_bytes + left, plan.sparse_bytes + left
    profile = plan.profile.in_words if plan.profile is not None else "none"
    return Compiled(name, device.device_kind, platform, profile, planned, dense, sparse)


def _made(lowered: jax.stages.Lowered, device: Any) -> Made:
    compiled = lowered.compile()
    kinds = {d.device_kind for s in jax.tree.leaves(compiled.input_shardings) for d in getattr(s, "device_set", ())}
    if kinds and kinds != {device.device_kind}:
        raise ValueError(
            f"dump: the program is for {', '.join(sorted(kinds))}; expected one for {device.device_kind}: place all "
            "arguments there"
        )
    stats = compiled.memory_analysis()
    memory = stats and {
        "arguments": stats.argument_size_in_bytes,
        "results": stats.output_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    found = compiled.cost_analysis() or {}
    found = found[0] if isinstance(found, list) else found
    estimate = {k: float(found[k]) for k in ("bytes accessed", "flops", "optimal_seconds") if found.get(k, -1) > 0}
    text = compiled.as_text() or ""
    return Made(counts(text), memory or None, estimate, text)
