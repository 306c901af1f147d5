"""A jaxpr as data that is the same on every JAX version: what ``dump`` prints, as text, JSON or a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hire_xform.lowering.primitives.da_top_k import da_top_k_p
from hire_xform.passes.ir import compat
from hire_xform.passes.ir.debugging import type_text
from hire_xform.passes.ir.graph import label, numbered
from hire_xform.passes.ir.source_lines import source_line
from hire_xform.passes.plan.decisions import Plan

# What a spliced site does, in order; the names of the scopes its equations stand in.
PHASES = ("predict", "select", "compute")


@dataclass(frozen=True)
class Named:
    """A value: its small name, its type such as ``float32[1,32]``, and what it is, where that is known."""

    name: str
    type: str
    what: str = ""


@dataclass(frozen=True)
class Mark:
    """What an equation has to do with the plan.

    Attributes:
      site: number of the site in ``plan.sites`` whose equation this is, or was spliced in for; None when of none.
      phase: "predict", "select" or "compute" inside a spliced site; "" elsewhere.
      refusal: number in ``plan.refusals`` when the equation was refused.
    """

    site: int | None = None
    phase: str = ""
    refusal: int | None = None


@dataclass
class Equation:
    """One equation.

    Attributes:
      path: its path, as in the plan.
      primitive: its name; for a call, what is called.
      results: what it makes; a result that is never read is named ``_``.
      operands: names of what it reads, or numbers.
      detail: the parameters that say most, where they can be said briefly.
      source: the user's ``file:line:column (function)``.
      mark: what it has to do with the plan.
      bodies: the bodies of a call, loop or branch.
    """

    path: str
    primitive: str
    results: list[Named]
    operands: list[str]
    detail: str
    source: str
    mark: Mark
    bodies: list[Body] = field(default_factory=list)

    def walk(self) -> Iterator[Equation]:
        """This equation and all inside it, in program order."""
        yield self
        for body in self.bodies:
            for equation in body.equations:
                yield from equation.walk()


@dataclass
class Body:
    """A body of equations; ``name`` says which, where an equation has several."""

    name: str
    inputs: list[Named]
    outputs: list[str]
    equations: list[Equation]

    def walk(self) -> Iterator[Equation]:
        """All equations, nested ones too, in program order."""
        for equation in self.equations:
            yield from equation.walk()


@dataclass(frozen=True)
class Dump:
    """What a dump shows; ``before`` and ``after`` are None where they are not asked for."""

    name: str
    plan: Plan
    before: Body | None
    after: Body | None


# Says what an equation at a path has to do with the plan, given the mark of the equation around it.
Marker = Callable[[str, Any, Mark], Mark]


def list_program(jaxpr: Any, inputs: Sequence[str], marker: Marker) -> Body:
    """Lists a closed jaxpr.

    Args:
      jaxpr: the program.
      inputs: what each of its inputs is, for people.
      marker: gives each equation its mark.
    """
    return _Lister(marker).body("", jaxpr, "", Mark(), list(inputs))


class _Lister:
    def __init__(self, marker: Marker):
        self._marker = marker
        self._made = 0

    def body(self, name: str, jaxpr: Any, prefix: str, mark: Mark, what: Sequence[str] = ()) -> Body:
        """Lists one body; ``mark`` is that of the equation around it."""
        inner, _ = compat.close(jaxpr)
        env: dict[Any, str] = {}
        inputs = []
        notes = [*["constant"] * len(inner.constvars), *what]
        for i, var in enumerate((*inner.constvars, *inner.invars)):
            env[var] = self._name()
            inputs.append(Named(env[var], type_text(var.aval), notes[i] if i < len(notes) else ""))
        atoms = [a for eqn in inner.eqns for a in eqn.invars] + list(inner.outvars)
        read = {a for a in atoms if not isinstance(a, compat.Literal)}
        equations = []
        for own_path, eqn in numbered(inner.eqns):
            equations.append(self._equation(eqn, label(eqn), f"{prefix}{own_path}", env, read, mark))
        return Body(name, inputs, [_operand(a, env) for a in inner.outvars], equations)

    def _equation(self, eqn: Any, kind: str, path: str, env: dict[Any, str], read: set[Any], around: Mark) -> Equation:
        operands = [_operand(a, env) for a in eqn.invars]
        mark = self._marker(path, eqn, around)
        bodies = [self.body(name, body, f"{path}/{where}", mark) for name, where, body in _bodies(eqn)]
        if mark.site is None and eqn.primitive in compat.CALL_PRIMITIVES:
            mark = _common([e.mark for b in bodies for e in b.equations]) or mark
        results = []
        for var in eqn.outvars:
            env[var] = self._name() if var in read else "_"
            results.append(Named(env[var], type_text(var.aval)))
        return Equation(path, kind, results, operands, _detail(eqn, kind), source_line(eqn), mark, bodies)

    def _name(self) -> str:
        number, name = self._made, ""
        self._made += 1
        while True:
            name = chr(ord("a") + number % 26) + name
            number = number // 26 - 1
            if number < 0:
                return name


def _bodies(eqn: Any) -> Iterator[tuple[str, str, Any]]:
    """The bodies of an equation: a name for each where there are several, its part of the path, the jaxpr."""
    if eqn.primitive in compat.CALL_PRIMITIVES:
        yield "", "", compat.call_jaxpr(eqn)
        return
    # What da_top_k carries says how it is partitioned, and nothing that its parameters do not.
    found = compat.sub_jaxprs(eqn) if eqn.primitive is not da_top_k_p else []
    for i, (parameter, body) in enumerate(found):
        if parameter.startswith("branches"):
            yield f"branch[{i}]", f"branch[{i}]/", body
        elif len(found) == 1 or parameter == "body_jaxpr":
            yield ("body" if len(found) > 1 else ""), "", body
        else:
            yield parameter.removesuffix("_jaxpr"), f"{parameter.removesuffix('_jaxpr')}/", body


def _common(marks: Sequence[Mark]) -> Mark | None:
    """The mark of a call whose equations all belong to one site."""
    return marks[0] if marks and marks[0].site is not None and len({m.site for m in marks}) == 1 else None


def _operand(atom: Any, env: dict[Any, str]) -> str:
    if not isinstance(atom, compat.Literal):
        return env[atom]
    if getattr(atom.val, "ndim", 0):
        return f"constant:{type_text(atom.aval)}"
    try:
        value = np.asarray(atom.val).item()
    except (TypeError, ValueError):
        return str(atom.val)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _detail(eqn: Any, kind: str) -> str:
    params = eqn.params
    if kind == "dot_general":
        (left, right), (left_batch, right_batch) = params["dimension_numbers"]
        text = f"contract {_axes(left)}x{_axes(right)}"
        return text + (f" batch {_axes(left_batch)}x{_axes(right_batch)}" if left_batch else "")
    if kind == "scan":
        return f"length {params['length']}"
    if kind == "da_top_k":
        shards = params.get("shards", 1)
        return f"k {params['k']}" + (f" of {shards} shards" if shards != 1 else "")
    if kind == "transpose":
        return f"to {_axes(params['permutation'])}"
    if kind.startswith("reduce_") and "axes" in params:
        return f"over {_axes(params['axes'])}"
    return ""


def _axes(axes: Sequence[int]) -> str:
    return ",".join(str(a) for a in axes)
