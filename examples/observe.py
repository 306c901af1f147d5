"""Evaluates a program and hands out values from inside it: what was selected, what an activation was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hire_xform.passes.ir import compat
from hire_xform.passes.ir.equation_contexts import EquationContexts
from hire_xform.passes.ir.graph import numbered

# Says whether an equation at a path is to be seen.
Wanted = Callable[[str, Any], bool]


def observe(jaxpr: Any, operands: Sequence[Any], wanted: Wanted) -> tuple[list[Any], list[tuple[list[Any], list[Any]]]]:
    """Evaluates a closed jaxpr; works under a trace.

    Args:
      jaxpr: the program.
      operands: its operands.
      wanted: which equations to see; looked for in calls, not in loops and branches.

    Returns:
      The program's results, and for each equation seen, in program order, its (operands, results).
    """
    seen: list[tuple[list[Any], list[Any]]] = []
    return _evaluate(jaxpr, operands, wanted, "", seen), seen


def _evaluate(
    jaxpr: Any, operands: Sequence[Any], wanted: Wanted, prefix: str, seen: list[tuple[list[Any], list[Any]]]
) -> list[Any]:
    inner, consts = compat.close(jaxpr)
    env = dict(zip((*inner.constvars, *inner.invars), (*consts, *operands), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, compat.Literal) else env[atom]

    with EquationContexts() as contexts:
        for own_path, eqn in numbered(inner.eqns):
            contexts.enter(eqn)
            path = f"{prefix}{own_path}"
            given = [read(a) for a in eqn.invars]
            if eqn.primitive in compat.CALL_PRIMITIVES and _holds(compat.call_jaxpr(eqn), wanted, f"{path}/"):
                results = _evaluate(compat.call_jaxpr(eqn), given, wanted, f"{path}/", seen)
            else:
                results = compat.bind(eqn, given)
            if wanted(path, eqn):
                seen.append((given, results))
            env.update(zip(eqn.outvars, results, strict=True))
    return [read(a) for a in inner.outvars]


def _holds(jaxpr: Any, wanted: Wanted, prefix: str) -> bool:
    for own_path, eqn in numbered(compat.close(jaxpr)[0].eqns):
        path = f"{prefix}{own_path}"
        if wanted(path, eqn):
            return True
        if eqn.primitive in compat.CALL_PRIMITIVES and _holds(compat.call_jaxpr(eqn), wanted, f"{path}/"):
            return True
    return False
