"""A dump as text: one equation a line, sites marked, nested bodies indented."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from hire_xform.dump.listing import PHASES, Body, Dump, Equation, Mark
from hire_xform.explain import exactly, size
from hire_xform.passes.plan.decisions import Plan, Site

_SOURCE = re.compile(r"(?P<file>.*?):(?P<line>\d+)(?P<rest>.*)")
# Source remarks start here, or where the equation ends.
_REMARK_COLUMN = 86
# Width of the margin in which sites are marked.
_MARGIN = 12


def render(made: Dump) -> str:
    """The text."""
    plan = made.plan
    lines = [f"{made.name} on {plan.platform}: {headline(plan)}"]
    if made.before is not None and made.after is not None:
        lines += _diff(plan, made.before, made.after)
    elif made.before is not None:
        lines += ["", f"original: {count_of(made.before.walk())}", *_program(plan, made.before)]
    elif made.after is not None:
        lines += ["", f"sparse: {count_of(made.after.walk())}", *_program(plan, made.after)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def headline(plan: Plan) -> str:
    """The plan in a line."""
    stays = f"{plural(len(plan.refusals), 'product')} left dense ({size(plan.refused_bytes)})"
    if not plan.sites:
        return f"no site is rewritten; {stays}"
    return (
        f"{plural(len(plan.sites), 'site')} rewritten, {size(plan.dense_bytes)} of weights read dense, "
        f"{size(plan.sparse_bytes)} sparse; {stays}"
    )


def count_of(equations: Iterable[Equation]) -> str:
    """How many equations there are."""
    return plural(sum(1 for _ in equations), "equation")


def plural(count: int, noun: str) -> str:
    """``3 sites``."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _program(plan: Plan, body: Body) -> list[str]:
    lines = _inputs(body, "")
    lines += [line for e in body.equations for line in _equation(plan, e, "")]
    return [*lines, f"{'':{_MARGIN}s}return {', '.join(body.outputs)}"]


def _inputs(body: Body, indent: str) -> list[str]:
    named = [f"{v.name}:{v.type}" for v in body.inputs]
    if not any(v.what for v in body.inputs):
        return [f"{'':{_MARGIN}s}{indent}in {', '.join(named)}"] if named else []
    width = max(map(len, named))
    return [
        f"{'':{_MARGIN}s}{indent}in {n:{width}s}  {v.what}".rstrip() for n, v in zip(named, body.inputs, strict=True)
    ]


def _equation(plan: Plan, equation: Equation, indent: str) -> list[str]:
    lines = [_line(_gutter(plan, equation.mark) + indent, equation)]
    for body in equation.bodies:
        inner = indent + "    "
        if body.name:
            lines.append(f"{'':{_MARGIN}s}{indent}  {body.name}:")
        lines += _inputs(body, inner)
        lines += [line for e in body.equations for line in _equation(plan, e, inner)]
        lines.append(f"{'':{_MARGIN}s}{inner}return {', '.join(body.outputs)}")
    return lines


def _gutter(plan: Plan, mark: Mark) -> str:
    if mark.site is not None:
        return f">> {plan.sites[mark.site].kind} {mark.site + 1}".ljust(_MARGIN)
    return ("   dense" if mark.refusal is not None else "").ljust(_MARGIN)


def _line(start: str, equation: Equation) -> str:
    results = ", ".join(f"{v.name}:{v.type}" for v in equation.results)
    text = f"{start}{results} = {equation.path}({', '.join(equation.operands)})"
    text += f" {equation.detail}" if equation.detail else ""
    source = "" if equation.source == "unknown" else short_source(equation.source)
    remark = "  ".join(filter(None, (equation.mark.phase, source)))
    return f"{text:{_REMARK_COLUMN}s}  # {remark}" if remark else text


def _diff(plan: Plan, before: Body, after: Body) -> list[str]:
    old, new = list(before.walk()), list(after.walk())
    lines = [f"original: {count_of(old)}; sparse: {count_of(new)}"]
    for number, site in enumerate(plan.sites):
        lines += ["", _site_header(number, site)]
        lines += [_line("- ", e) for e in old if e.mark.site == number and not e.bodies]
        mine = [e for e in new if e.mark.site == number]
        lines += [f"+ {phase:8s} {text}" for phase, text in phases_of(mine)]
    if plan.refusals:
        lines += ["", "left dense:"]
        for refusal in plan.refusals:
            lines.append(f"  {refusal.path}  {size(refusal.dense_bytes)}  # {short_source(refusal.source)}")
            lines.append(f"      {short_reason(refusal.reason)}")
    return lines


# A source line in the middle of a reason.
_SOURCE_INSIDE = re.compile(r"(?:[A-Za-z]:)?/[^\s:]+:\d+(?::\d+)?")


def short_reason(reason: str) -> str:
    """A reason with the files in it shortened."""
    return _SOURCE_INSIDE.sub(lambda found: short_source(found[0]), reason)


def _site_header(number: int, site: Site) -> str:
    return (
        f"@@ {site.kind} {number + 1}  {site.path}  {size(site.dense_bytes)} -> {size(site.sparse_bytes)}  "
        f"{exactly(site)}  # {short_source(site.source)}"
    )


def phases_of(equations: Sequence[Equation]) -> list[tuple[str, str]]:
    """Each phase of a spliced site, with its equations counted by primitive."""
    found = []
    for phase in (*PHASES, ""):
        counts: dict[str, int] = {}
        for equation in equations:
            if equation.mark.phase == phase and not equation.bodies:
                counts[equation.primitive] = counts.get(equation.primitive, 0) + 1
        if counts:
            names = ", ".join(name + (f" x{n}" if n > 1 else "") for name, n in counts.items())
            found.append((phase or "around", f"{plural(sum(counts.values()), 'equation')}: {names}"))
    return found


def short_source(source: str) -> str:
    """A source line with its file relative to the current folder, or to the installed packages, where it is there."""
    found = _SOURCE.fullmatch(source)
    if found is None:
        return source
    file = found["file"]
    if "site-packages" in file:
        short = file.split("site-packages", 1)[1].lstrip("/\\")
    else:
        here = os.path.join(os.getcwd(), "")
        short = file[len(here) :] if file.startswith(here) else file
    return f"{Path(short).as_posix()}:{found['line']}{found['rest']}"
