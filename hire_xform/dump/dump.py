"""A traced function as text, JSON or a page: the original program, the rewritten one, and what became of each site."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import jax

from hire_xform.dump import page as dump_page
from hire_xform.dump import text as dump_text
from hire_xform.dump.compiled import compile_both
from hire_xform.dump.listing import PHASES, Dump, Equation, Mark, Marker, list_program
from hire_xform.passes.plan.decisions import Decision, Plan

if TYPE_CHECKING:
    from hire_xform.call.stages import Traced

SHOWS = ("original", "sparse", "diff")
# What becomes of the program: no page is made of it.
LOWERED = ("stablehlo", "compiled")
FORMATS = ("text", "json", "html")

# The rewriter puts what it splices in under this name, followed by the site's path.
_SCOPE = "hire/"


def dump(
    traced: Traced, *, name: str = "", show: str = "diff", format: str = "text", platform: str | None = None
) -> str:
    """A traced function, to be read.

    Args:
      traced: from ``step.trace(...)``.
      name: what to call the function.
      show: "original", "sparse", or "diff", which shows what became of each site (as a page: both, side by side);
        "stablehlo", the sparse program as it is lowered; or "compiled", what the compiler of the arguments' device
        makes of it, after a table of it and of the dense program.
      format: "text", "json" or "html" (one page with nothing outside it). No page is made of the last two.
      platform: for "stablehlo", what to lower for, as JAX names it; None is where the arguments are.

    Raises:
      ValueError: ``show`` or ``format`` is none of these, or they do not go together; or, with "compiled", the
        arguments are on several devices.
    """
    if show not in (*SHOWS, *LOWERED):
        raise ValueError(f"dump: show={show!r}; expected one of {', '.join((*SHOWS, *LOWERED))}")
    if format not in FORMATS:
        raise ValueError(f"dump: format={format!r}; expected one of {', '.join(FORMATS)}")
    if show in LOWERED:
        return _dump_lowered(traced, name or "function", show, format, platform)
    made = make_dump(traced, name or "function", show)
    if format == "json":
        return _to_json(made)
    return dump_page.render(made) if format == "html" else dump_text.render(made)


def _dump_lowered(traced: Traced, name: str, show: str, format: str, platform: str | None) -> str:
    if format == "html":
        raise ValueError(f"dump: format='html' with show={show!r}; expected 'text' or 'json'")
    if show == "compiled":
        compiled = compile_both(traced, name)
        return compiled.to_json() if format == "json" else compiled.to_text()
    lowered = traced.lower(lowering_platforms=None if platform is None else (platform,)).as_text()
    return json.dumps({"function": name, "stablehlo": lowered}, indent=1) if format == "json" else lowered


def make_dump(traced: Traced, name: str, show: str) -> Dump:
    """Lists the programs that are to be shown."""
    before = after = None
    if show != "sparse":
        before = list_program(traced.laid_out, _input_names(traced, packed=False), _before_marker(traced.plan))
    if show != "original":
        after = list_program(traced.sparse_jaxpr, _input_names(traced, packed=True), _after_marker(traced.plan))
    return Dump(name, traced.plan, before, after)


def _input_names(traced: Traced, packed: bool) -> list[str]:
    """Names of the program's inputs, such as ``params['w_in']``."""
    names = traced.signature.names
    if packed:
        args, kwargs = traced.packed_call()
    else:
        args, kwargs = traced.call.rebuild([jax.ShapeDtypeStruct(a.shape, a.dtype) for a in traced.call.avals])
    found = []
    for path, leaf in jax.tree_util.tree_flatten_with_path((tuple(args), kwargs))[0]:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            continue
        key = path[1]
        number = getattr(key, "idx", None)
        first = str(getattr(key, "key", "")) if number is None else f"argument {number}"
        if number is not None and number < len(names):
            first = names[number]
        found.append(first + jax.tree_util.keystr(path[2:]))
    return found


def _before_marker(plan: Plan) -> Marker:
    sites: dict[str, int] = {}
    for number, decision in enumerate(plan.decisions):
        for path in _paths(decision):
            sites[path] = number
    refusals = {refusal.path: number for number, refusal in enumerate(plan.refusals)}

    def mark(path: str, eqn: Any, around: Mark) -> Mark:
        return Mark(site=sites[path]) if path in sites else Mark(refusal=refusals.get(path))

    return mark


def _paths(decision: Decision) -> set[str]:
    """The equations that a site replaces."""
    return {node.path for node in decision.match.nodes}


def _after_marker(plan: Plan) -> Marker:
    # Longest first: one site's path may begin another's.
    order = sorted(range(len(plan.sites)), key=lambda i: -len(plan.sites[i].path))

    def mark(path: str, eqn: Any, around: Mark) -> Mark:
        stack = str(eqn.source_info.name_stack)
        phase = next((part for part in stack.split("/") if part.strip("()") in PHASES), around.phase)
        if around.site is not None:
            return Mark(site=around.site, phase=phase)
        inside = stack[stack.rfind(_SCOPE) + len(_SCOPE) :] if _SCOPE in stack else ""
        for number in order:
            site = plan.sites[number].path
            if inside.startswith(site) and inside[len(site) : len(site) + 1] in ("", "/", ")"):
                return Mark(site=number, phase=phase)
        return Mark()

    return mark


def _to_json(made: Dump) -> str:
    found: dict[str, Any] = {"function": made.name, "plan": json.loads(made.plan.to_json())}
    for key, body in (("original", made.before), ("sparse", made.after)):
        if body is not None:
            found[key] = {
                "inputs": [{"name": v.name, "type": v.type, "what": v.what} for v in body.inputs],
                "outputs": body.outputs,
                "equations": [_entry(e) for e in body.walk()],
            }
    return json.dumps(found, indent=1)


def _entry(equation: Equation) -> dict[str, Any]:
    return {
        "path": equation.path,
        "primitive": equation.primitive,
        "results": [{"name": v.name, "type": v.type} for v in equation.results],
        "operands": equation.operands,
        "detail": equation.detail,
        "source": equation.source,
        "site": equation.mark.site,
        "phase": equation.mark.phase,
        "refusal": equation.mark.refusal,
    }
