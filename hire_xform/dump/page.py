"""A dump as one HTML page with nothing outside it: both programs side by side, sites in the same colour."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources
from itertools import groupby

from hire_xform.dump.listing import PHASES, Body, Dump, Equation
from hire_xform.dump.text import count_of, headline, phases_of, plural, short_reason, short_source
from hire_xform.explain import describe, exactly, size
from hire_xform.passes.plan.decisions import Plan, Refusal, Site

# Neighbouring sites get hues far apart.
_HUE_STEP = 137.5
_FIRST_HUE = 255.0


def render(made: Dump) -> str:
    """The page."""
    shell = resources.files("hire_xform").joinpath("templates/dump.html").read_text(encoding="utf-8")
    panes = []
    for name, side, body in (("original", "b", made.before), ("sparse", "a", made.after)):
        if body is not None:
            panes.append(_pane(made.plan, name, side, body))
    first = "a" if made.before is None else "b"
    filled = {
        "{{title}}": escape(made.name),
        "{{headline}}": escape(f"{made.plan.platform}: {headline(made.plan)}"),
        "{{bars}}": _bars(made.plan),
        "{{hues}}": "".join(f".s{i} {{ --hue: {_hue(i):.0f}; }}\n" for i in range(len(made.plan.sites))),
        "{{sites}}": "".join(_site(i, site, first) for i, site in enumerate(made.plan.sites))
        or "<p class=none>none</p>",
        "{{site_count}}": str(len(made.plan.sites)),
        "{{refusals}}": _refusals(made.plan.refusals, linked=made.before is not None) or "<p class=none>none</p>",
        "{{refusal_count}}": str(len(made.plan.refusals)),
        "{{panes}}": "".join(panes),
    }
    # One pass, so that a name that looks like a place to fill is left alone.
    for place in filled:
        shell = shell.replace(place, f"\0{place}\0")
    return "".join(filled.get(part, part) for part in shell.split("\0"))


def _hue(number: int) -> float:
    return (_FIRST_HUE + number * _HUE_STEP) % 360


def _bars(plan: Plan) -> str:
    """Weight bytes of one call before and after: sites, and what stays dense."""
    total = plan.dense_bytes + plan.refused_bytes
    if not total:
        return ""
    rows = []
    for name, sites in (("dense", plan.dense_bytes), ("sparse", plan.sparse_bytes)):
        read = sites + plan.refused_bytes
        parts = f"<i class=in style='width:{100 * sites / total:.2f}%'></i>"
        parts += f"<i class=out style='width:{100 * plan.refused_bytes / total:.2f}%'></i>"
        rows.append(f"<div class=bar><span>{name}</span><b>{parts}</b><span>{size(read)}</span></div>")
    legend = "<div class=legend><i class=in></i>sites <i class=out></i>left dense</div>"
    return f"<div class=bars title='weight bytes read by one call'>{''.join(rows)}{legend}</div>"


def _site(number: int, site: Site, side: str) -> str:
    share = site.sparse_bytes / max(site.dense_bytes, 1)
    facts = [
        short_source(site.source),
        f"{plural(site.tokens, 'token')}; {exactly(site)}",
        describe(site.settings),
    ]
    if site.activation:
        facts.append(f"activation: {site.activation}")
    if site.own:
        facts.append(f"the model's own choice: {site.own}")
    facts.append(", ".join(site.weights))
    if site.forced:
        facts.append("forced by a rule")
    lines = "".join(f"<span>{escape(fact)}</span>" for fact in facts)
    return (
        f"<a class='site s{number}' href='#{side}{number}' data-site={number}>"
        f"<em>{number + 1}</em><strong>{escape(site.kind)} <code>{escape(site.path)}</code></strong>"
        f"<span class=bytes>{size(site.dense_bytes)} &rarr; {size(site.sparse_bytes)} <b>{share:.0%}</b></span>"
        f"{lines}</a>"
    )


def _refusals(refusals: Sequence[Refusal], linked: bool) -> str:
    groups: dict[tuple[str, str], list[int]] = {}
    for number, refusal in enumerate(refusals):
        groups.setdefault((refusal.reason, refusal.source), []).append(number)
    found = []
    for (reason, source), numbers in groups.items():
        paths = {n: f"<code>{escape(refusals[n].path)}</code>" for n in numbers}
        if linked:
            paths = {n: f"<a href='#r{n}' data-refusal={n}>{path}</a>" for n, path in paths.items()}
        weights = list(dict.fromkeys(w for n in numbers for w in refusals[n].weights))
        read = sum(refusals[n].dense_bytes for n in numbers)
        found.append(
            f"<div class=refusal><p>{escape(short_reason(reason))}</p>"
            f"<span>{escape(short_source(source))}; {size(read)}</span>"
            f"<span>{escape(', '.join(weights))}</span><span>{' '.join(paths.values())}</span></div>"
        )
    return "".join(found)


def _pane(plan: Plan, name: str, side: str, body: Body) -> str:
    inputs = _inputs(body)
    return (
        f"<section class=pane id=pane-{side}><h2>{name} <small>{count_of(body.walk())}</small></h2>"
        f"<div class=code>{inputs}{_equations(plan, body.equations, side, set(), None)}{_return(body)}</div></section>"
    )


def _inputs(body: Body) -> str:
    if not body.inputs:
        return ""
    if not any(v.what for v in body.inputs):
        values = ", ".join(f"{_name(v.name)}<u>{escape(v.type)}</u>" for v in body.inputs)
        return f"<div class='eq dim'><span>in {values}</span></div>"
    rows = "".join(
        f"<div class='eq dim'><span>{_name(v.name)}<u>{escape(v.type)}</u> <q>{escape(v.what)}</q></span></div>"
        for v in body.inputs
    )
    return _fold("class='eq dim'", f"<span>{plural(len(body.inputs), 'input')}</span>", rows)


def _return(body: Body) -> str:
    return f"<div class='eq dim'><span>return {', '.join(map(_name, body.outputs))}</span></div>"


def _equations(plan: Plan, equations: Sequence[Equation], side: str, seen: set[int], around: int | None) -> str:
    """Equations, those of one site together in a block; ``seen`` holds the sites that can be scrolled to already."""
    found = []
    for number, run in groupby(equations, key=lambda e: e.mark.site):
        mine = list(run)
        if number is None or number == around:
            found += [_equation(plan, e, side, seen, around) for e in mine]
            continue
        anchor = "" if number in seen else f" id={side}{number}"
        seen.add(number)
        if side == "a":
            inner = _spliced(plan, number, mine, side, seen)
        else:
            inner = "".join(_equation(plan, e, side, seen, number) for e in mine)
        label = f"{plan.sites[number].kind} {number + 1}"
        found.append(f"<div class='block s{number}' data-site={number}{anchor} title='{escape(label)}'>{inner}</div>")
    return "".join(found)


def _spliced(plan: Plan, number: int, equations: Sequence[Equation], side: str, seen: set[int]) -> str:
    """What a site became: its phases, each to be unfolded."""
    found = []
    for phase, run in groupby(equations, key=lambda e: e.mark.phase):
        mine = list(run)
        if phase in PHASES:
            rows = "".join(_equation(plan, e, side, seen, number) for e in mine)
            counted = dict(phases_of([inner for e in mine for inner in e.walk()])).get(phase, "")
            summary = f"<span><b>{phase}</b> <small>{escape(counted)}</small></span>"
            found.append(_fold("class=eq", summary, f"<div class=nest>{rows}</div>"))
            continue
        for equation in mine:
            if any(e.mark.phase for e in equation.walk()):
                inner = "".join(
                    _inputs(b) + _spliced(plan, number, b.equations, side, seen) + _return(b) for b in equation.bodies
                )
                title = f"class=eq title='{escape(equation.path)}'"
                found.append(_fold(title, _line(equation), f"<div class=nest>{inner}</div>", " open"))
            else:
                found.append(_equation(plan, equation, side, seen, number))
    return "".join(found)


def _equation(plan: Plan, equation: Equation, side: str, seen: set[int], around: int | None) -> str:
    line = _line(equation)
    classes, anchor = "eq", ""
    if equation.mark.refusal is not None and side == "b":
        classes += " refused"
        anchor = f" id=r{equation.mark.refusal}"
    hint = equation.path + ("" if equation.source == "unknown" else f"\n{short_source(equation.source)}")
    attributes = f"class='{classes}' title='{escape(hint)}'{anchor}"
    if not equation.bodies:
        return f"<div {attributes}>{line}</div>"
    inner = []
    for body in equation.bodies:
        head = f"<div class='eq dim'><span>{escape(body.name)}</span></div>" if body.name else ""
        inner.append(head + _inputs(body) + _equations(plan, body.equations, side, seen, around) + _return(body))
    interesting = any(e.mark.site is not None and e.mark.site != around for b in equation.bodies for e in b.walk())
    shown = " open" if interesting or equation.primitive in ("scan", "while", "cond") else ""
    return _fold(attributes, line, f"<div class=nest>{''.join(inner)}</div>", shown)


def _fold(attributes: str, summary: str, inner: str, shown: str = "") -> str:
    return f"<details class=fold{shown}><summary {attributes}>{summary}</summary>{inner}</details>"


def _line(equation: Equation) -> str:
    results = " ".join(f"{_name(v.name)}<u>{escape(v.type)}</u>" for v in equation.results)
    operands = " ".join(map(_name, equation.operands))
    detail = f" <q>{escape(equation.detail)}</q>" if equation.detail else ""
    primitive = escape(equation.path.rsplit("/", 1)[-1])
    return f"<span>{results} = <b>{primitive}</b> {operands}{detail}</span><s>{escape(_place(equation.source))}</s>"


def _name(name: str) -> str:
    return f"<var>{escape(name)}</var>"


def _place(source: str) -> str:
    """The file and line alone: ``model.py:150``."""
    if source == "unknown":
        return ""
    place = source.rsplit(" (", 1)[0].replace("\\", "/").rsplit("/", 1)[-1]
    return ":".join(place.split(":")[:2])
