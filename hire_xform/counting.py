"""Evaluates a program and adds up the marks in it: how often each certified site ran its dense product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import jaxpr_as_fun
from jax.extend.core import primitives as prims

from hire_xform.lowering import fallback_p
from hire_xform.passes import compat

# Times that each site ran its dense product, int32, by the site's path.
Counts = dict[str, jax.Array]


def count_fallbacks(jaxpr: Any, operands: Sequence[Any]) -> tuple[list[Any], Counts]:
    """Evaluates a closed jaxpr; works under a trace. Calls, loops and branches are entered.

    Returns:
      The program's results, and for each certified site how often it fell back.
    """
    return _evaluate(jaxpr, operands)


def _paths(jaxpr: Any) -> list[str]:
    """The sites that are marked in a program, those in calls, loops and branches included."""
    found: list[str] = []
    for eqn in compat.close(jaxpr)[0].eqns:
        if eqn.primitive is fallback_p:
            found.append(eqn.params["path"])
        for _, sub in compat.sub_jaxprs(eqn):
            found += _paths(sub)
    return list(dict.fromkeys(found))


def _zeros(paths: Sequence[str]) -> Counts:
    return {path: jnp.zeros((), jnp.int32) for path in paths}


def _evaluate(jaxpr: Any, operands: Sequence[Any]) -> tuple[list[Any], Counts]:
    inner, consts = compat.close(jaxpr)
    counts = _zeros(_paths(jaxpr))
    env = dict(zip((*inner.constvars, *inner.invars), (*consts, *operands), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, compat.Literal) else env[atom]

    for eqn in inner.eqns:
        given = [read(a) for a in eqn.invars]
        found: Counts = {}
        if eqn.primitive is fallback_p:
            results = given
            found = {eqn.params["path"]: jnp.sum(given[0]).astype(jnp.int32)}
        elif not any(_paths(sub) for _, sub in compat.sub_jaxprs(eqn)):
            results = compat.bind(eqn, given)
        elif eqn.primitive in compat.CALL_PRIMITIVES:
            results, found = _evaluate(compat.call_jaxpr(eqn), given)
        elif eqn.primitive in _LOOPS:
            results, found = _LOOPS[eqn.primitive](eqn, given)
        else:
            raise NotImplementedError(
                f"certified sites inside {eqn.primitive} can't be counted; expected jax.lax loops"
            )
        for path, number in found.items():
            counts[path] = counts[path] + number
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(a) for a in inner.outvars], counts


def _scan(eqn: Any, given: list[Any]) -> tuple[list[Any], Counts]:
    scan = compat.scan_parts(eqn)
    consts = given[: scan.num_consts]
    carry = given[scan.num_consts : scan.num_consts + scan.num_carry]

    def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], tuple[list[Any], Counts]]:
        outs, counts = _evaluate(scan.jaxpr, [*consts, *carry, *xs])
        return outs[: scan.num_carry], (outs[scan.num_carry :], counts)

    carry, (ys, counts) = lax.scan(
        body,
        carry,
        given[scan.num_consts + scan.num_carry :],
        length=scan.length,
        reverse=scan.reverse,
        unroll=scan.unroll,
    )
    return [*carry, *ys], {path: jnp.sum(number).astype(jnp.int32) for path, number in counts.items()}


def _while(eqn: Any, given: list[Any]) -> tuple[list[Any], Counts]:
    loop = compat.while_parts(eqn)
    tested = given[: loop.cond_nconsts]
    consts = given[loop.cond_nconsts : loop.cond_nconsts + loop.body_nconsts]

    def going(state: tuple[list[Any], Counts]) -> Any:
        return jaxpr_as_fun(loop.cond_jaxpr)(*tested, *state[0])[0]

    def body(state: tuple[list[Any], Counts]) -> tuple[list[Any], Counts]:
        outs, found = _evaluate(loop.body_jaxpr, [*consts, *state[0]])
        return outs, {path: number + found[path] for path, number in state[1].items()}

    start = given[loop.cond_nconsts + loop.body_nconsts :]
    return lax.while_loop(going, body, (start, _zeros(_paths(loop.body_jaxpr))))


def _cond(eqn: Any, given: list[Any]) -> tuple[list[Any], Counts]:
    branches = eqn.params["branches"]
    paths = list(dict.fromkeys(p for branch in branches for p in _paths(branch)))

    def run(branch: Any) -> Any:
        def taken(*operands: Any) -> tuple[list[Any], Counts]:
            outs, counts = _evaluate(branch, operands)
            return outs, {**_zeros(paths), **counts}

        return taken

    return lax.switch(given[0], [run(branch) for branch in branches], *given[1:])


_LOOPS = {prims.scan_p: _scan, prims.while_p: _while, prims.cond_p: _cond}
